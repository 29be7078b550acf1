/* What a core does faster when it is told every step: passes of an image's way on a CPU.

   Plain C that needs no headers of Python or torch; Python calls it by ctypes, without the GIL
   (__init__.py). Each pass is compiled once for every instruction set below (set.h), and Python
   takes the best of those that the core at hand knows. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Raised whenever something below takes or gives something else; __init__.py asks for it. */
const int maskfleet_interface = 4;

typedef int halved_twice_t(const float *x, int height, int width, int channels, const float *first,
                           const float *first_bias, int between, const float *second,
                           const float *second_bias, int features, float *out);
typedef int winograd_t(const float *x, int height, int width, int channels, const float *kernel,
                       const float *bias, int features, float *out);

/* A window of each channel's own, and two layers: rows of inputs, outputs up to a multiple of PANEL. */
struct block {
    const float *window, *window_bias; /* [9][channels] */
    const float *widen, *widen_bias, *narrow, *narrow_bias; /* [channels][inside], [inside][channels] */
};

typedef int block_t(const float *x, int height, int width, int channels, int spread,
                    const struct block *own, int inside, float *out);

/* Tokens that ask experts: their scores, and the answers that shares of experts add up to. */
struct asking {
    const float *score, *score_bias; /* [heads * experts][features] */
    const float *answer, *answer_bias; /* [outputs][heads * experts] */
};

/* A map and what it says through a layer, and what two coarser ones have said. */
struct maps {
    const float *fine, *lateral, *bias; /* [h][w][own], [own][features up to PANEL], that many */
    const float *half, *quarter; /* [h/2][w/2][features], [h/4][w/4][features] */
};

/* What follows in the shipped net: a layer, ReLU, and the classes of what was known and thought. */
struct thinking {
    const float *widen, *widen_bias; /* [thoughts][features] */
    const float *head, *narrow, *bias; /* [classes][features], [classes][thoughts] */
};

typedef int read_t(const float *x, long tokens, int features, const float *query, int rows,
                   float *out);
typedef int ask_t(const float *x, long tokens, int features, const struct asking *ask, int heads,
                  int experts, int outputs, float *out);
typedef int classify_t(const struct maps *maps, int height, int width, int own, int features,
                       const struct asking *ask, int heads, int experts,
                       const struct thinking *think, int thoughts, int classes, float epsilon,
                       float *out);

typedef int finish_t(const float *scores, int classes, long of_class, long of_row, int g0, int h,
                     int w, int height, int width, int y0, int y1, int wanted, const uint8_t *blank,
                     const int32_t *ids, int fill, int bytes, void *labels, uint8_t *certainty,
                     int64_t *counts, double *sums);
typedef int feed_t(const uint8_t *values, long of_row, int rows, long n, const float *scale,
                   const float *shift, float *out, long of_out);

struct set {
    int lanes;
    feed_t *feed;
    halved_twice_t *halved_twice;
    winograd_t *winograd;
    block_t *block;
    read_t *read;
    ask_t *ask;
    classify_t *classify;
    finish_t *finish;
};

enum { DONE, NO_MEMORY, NO_NUMBER };

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)
#define OF(name) JOIN(name, SET) /* this name, of the set that is being compiled */

#define LINE 16 /* floats of a cache line */

static float *floats(size_t n)
{   /* some to spare: registers are read and written whole */
    return aligned_alloc(LINE * sizeof(float), (n / LINE + 3) * LINE * sizeof(float));
}

static size_t up_to(size_t n, size_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

/* LANES: floats of a register. ROWS: twice as many sums stay in registers, beside their terms. LOWER
   and UPPER: the values of two registers in turn, of their lower and upper halves. GREATER: b where
   one is no number. PICKED: of a register the values at these places. */
#if defined(__x86_64__)
#define SET avx512
#define LANES 16
#define GREATER(a, b) (Floats)_mm512_max_ps((__m512)(a), (__m512)(b))
#define PICKED(cells, index) (Floats)_mm512_permutexvar_ps((__m512i)(index), (__m512)(cells))
#define ROWS 12
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "set.h"

#define SET avx2
#define LANES 8
#define GREATER(a, b) (Floats)_mm256_max_ps((__m256)(a), (__m256)(b))
#define PICKED(cells, index) (Floats)_mm256_permutevar8x32_ps((__m256)(cells), (__m256i)(index))
#define ROWS 6
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#define TARGET __attribute__((target("avx2,fma")))
#include "set.h"
#endif

#define SET plain
#define LANES 4
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#if defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif
#define TARGET
#include "set.h"

/* The sets that this core knows, the best first; NULL after the last. */
const struct set *maskfleet_set(int number)
{
    const struct set *known[4] = {NULL};
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        known[n++] = &set_avx512;
    if (avx2)
        known[n++] = &set_avx2;
#endif
    known[n++] = &set_plain;
    return number < n ? known[number] : NULL;
}
