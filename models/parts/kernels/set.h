/* Included once for each instruction set: its registers, the passes, and the table of them. */

typedef float OF(floats_of) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t OF(ints_of) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define Floats OF(floats_of)
#define Ints OF(ints_of)
#define PANEL (2 * LANES) /* features that are summed up at once */
#define AT(p) (*(const Floats *)(p))

/* The greater one; what is no number stays so. */
TARGET INLINE Floats OF(greater)(Floats a, Floats b)
{
    Ints more = (a > b) | (a != a);
    return (Floats)((more & (Ints)a) | (~more & (Ints)b));
}

#include "feed.h"
#include "conv3x3.h"
#include "softmax.h"
#include "finish.h"

static const struct set OF(set) = {
    LANES, OF(feed), OF(halved), OF(winograd), OF(softmax), OF(finish),
};

#undef Floats
#undef Ints
#undef PANEL
#undef AT
#undef COLUMNS
#undef OCTAVE
#undef SET
#undef LANES
#undef ROWS
#undef TARGET
