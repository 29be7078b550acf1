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
#ifdef GREATER
    return (Floats)((a != a) | (Ints)GREATER(a, b)); /* b if one is no number */
#else
    Ints more = (a > b) | (a != a);
    return (Floats)((more & (Ints)a) | (~more & (Ints)b));
#endif
}

/* ReLU; what is no number stays so. */
TARGET INLINE Floats OF(positive)(Floats x)
{
#ifdef GREATER
    return GREATER((Floats){0}, x);
#else
    return (Floats)(~(x < 0) & (Ints)x);
#endif
}

#define OCTAVE 1.44269504f /* 1 / ln 2: of values times this, 2^x is what e^x was */

/* 2^x for x <= 0: a polynomial on [-1/2, 1/2] (Taylor, 3e-8 of the value at most), times a power of two
   of which the exponent is written. Below 2^-126 it stays there; what is no number stays so. */
TARGET INLINE Floats OF(exp2_of)(Floats x)
{
    /* 1.5 * 2^23: adding it rounds to a whole number, here to one that is an exponent as floats have it */
    const Floats shift = (Floats){0} + 12582912.0f + 127.0f, least = (Floats){0} - 126.0f;
#ifdef GREATER
    Floats near = GREATER(least, x);
#else
    const Ints below = x < least;
    Floats near = (Floats)((below & (Ints)least) | (~below & (Ints)x));
#endif
    Floats whole = near + shift, rest = near - (whole - shift);
    Floats value = 1.0f + rest * (0.69314718f + rest * (0.24022651f + rest * (0.055504109f
        + rest * (0.0096181291f + rest * (0.0013333558f + rest * 0.00015403530f)))));
    return value * (Floats)((Ints)whole << 23);
}

/* Where a pixel lies between two of n cells that are stretched over `length` pixels. */
TARGET INLINE void OF(between)(int pixel, int n, int length, int32_t *before, int32_t *after, float *share)
{
    double at = (pixel + 0.5) * n / length - 0.5;
    at = at < 0 ? 0 : at;
    *before = (int32_t)at < n - 1 ? (int32_t)at : n - 1;
    *after = *before + 1 < n ? *before + 1 : n - 1;
    *share = (float)(at - *before);
}

#include "product.h"
#include "feed.h"
#include "conv3x3.h"
#include "block.h"
#include "tokens.h"
#include "finish.h"

static const struct set OF(set) = {
    LANES, OF(feed), OF(halved_twice), OF(winograd), OF(block), OF(read), OF(ask), OF(classify),
    OF(finish),
};

#undef Floats
#undef Ints
#undef PANEL
#undef AT
#undef OCTAVE
#undef SET
#undef GREATER
#undef PICKED
#undef LANES
#undef ROWS
#undef LOWER
#undef UPPER
#undef TARGET
