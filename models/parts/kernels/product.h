/* Products of matrices small enough for a core's caches. */

/* `rows` rows of v, at most ROWS, times a panel of `deep` rows of PANEL values; `more` adds to what
   is there. A row's values lie `apart`. The number of rows is a constant where this is called, so that
   sums are registers. */
TARGET INLINE void OF(product)(const int rows, const float *v, int of_v, int apart, int deep,
                               const float *panel, int of_panel, int more, float *m, int of_m)
{
    Floats sums[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        sums[i][0] = more ? AT(m + (size_t)i * of_m) : (Floats){0};
        sums[i][1] = more ? AT(m + (size_t)i * of_m + LANES) : (Floats){0};
    }
    for (int c = 0; c < deep; c++, v += apart, panel += of_panel) {
        Floats p0 = AT(panel), p1 = AT(panel + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float value = v[(size_t)i * of_v];
            sums[i][0] += value * p0;
            sums[i][1] += value * p1;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        *(Floats *)(m + (size_t)i * of_m) = sums[i][0];
        *(Floats *)(m + (size_t)i * of_m + LANES) = sums[i][1];
    }
}

/* The same for any number of rows. */
TARGET INLINE void OF(product_of_all)(const float *v, int of_v, int apart, int rows, int deep,
                                      const float *panel, int of_panel, int more, float *m, int of_m)
{
    int i = 0;
#define SOME(n)                                                                                    \
    for (; i + n <= rows; i += n)                                                                  \
        OF(product)(n, v + (size_t)i * of_v, of_v, apart, deep, panel, of_panel, more,             \
                    m + (size_t)i * of_m, of_m)
    SOME(ROWS);
    SOME(4);
    SOME(2);
    SOME(1);
#undef SOME
}

/* The rows of v. Not inlined: among other code gcc finds no registers for all sums. */
TARGET APART void OF(products)(const float *v, int of_v, int rows, int deep, const float *panel,
                               int of_panel, int more, float *m, int of_m)
{
    OF(product_of_all)(v, of_v, 1, rows, deep, panel, of_panel, more, m, of_m);
}

/* The columns of v. */
TARGET APART void OF(products_turned)(const float *v, int of_v, int columns, int deep,
                                      const float *panel, int of_panel, int more, float *m, int of_m)
{
    OF(product_of_all)(v, 1, of_v, columns, deep, panel, of_panel, more, m, of_m);
}

/* Adds what a layer makes of n rows of v: weights are [deep][wide], outputs a multiple of PANEL. */
TARGET static void OF(layered)(const float *v, int of_v, int n, int deep, const float *weight,
                               int wide, float *out)
{
    for (int f = 0; f < wide; f += PANEL)
        OF(products)(v, of_v, n, deep, weight + f, wide, 1, out + f, wide);
}

/* n rows that begin as a layer's bias. */
TARGET INLINE void OF(biased)(const float *bias, int n, int wide, float *out)
{
    for (int t = 0; t < n; t++)
        memcpy(out + (size_t)t * wide, bias, wide * sizeof(float));
}

/* ReLU of n values, in place; what is no number stays so. */
TARGET INLINE void OF(cut_off)(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] < 0 ? 0 : x[i];
}
