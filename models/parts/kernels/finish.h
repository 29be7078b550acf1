/* From scores on a coarse grid to the label of every pixel, its confidence, and what is counted.

   Bilinear, half-pixel centres, as torch's interpolate(align_corners=False): rows are widened once
   for all pixel rows between them, and of no more columns at a time than stay in a cache. */

#define COLUMNS 128

/* One row of pixels between two widened rows: who wins, and its softmax. Ties go to the first. Of a few
   neighbours at a time all classes, so that what is best stays in registers. */
#define BESIDE 4 /* 1 to 4: 15 % apart (AVX2, 2026-12-01) */
TARGET static void OF(row)(const float *restrict above, const float *restrict below, int classes,
                           float share, float *restrict octaves, int32_t *restrict index,
                           float *restrict sure)
{
    for (int x = 0; x < COLUMNS; x += BESIDE * LANES) {
        Floats best[BESIDE], sum[BESIDE];
        Ints at[BESIDE];
        for (int i = 0; i < BESIDE; i++) {
            const Floats a = AT(above + x + i * LANES), b = AT(below + x + i * LANES);
            *(Floats *)(octaves + i * LANES) = best[i] = a + share * (b - a);
            at[i] = (Ints){0}, sum[i] = (Floats){0};
        }
        for (int k = 1; k < classes; k++)
            for (int i = 0; i < BESIDE; i++) {
                const size_t place = (size_t)k * COLUMNS + x + i * LANES;
                const Floats a = AT(above + place), one = a + share * (AT(below + place) - a);
                const Ints more = one > best[i];
                *(Floats *)(octaves + (k * BESIDE + i) * LANES) = one;
                best[i] = (Floats)((more & (Ints)one) | (~more & (Ints)best[i]));
                at[i] = (more & k) | (~more & at[i]);
            }
        for (int k = 0; k < classes; k++)
            for (int i = 0; i < BESIDE; i++)
                sum[i] += OF(exp2_of)(AT(octaves + (k * BESIDE + i) * LANES) - best[i]);
        for (int i = 0; i < BESIDE; i++) {
            *(Ints *)(index + x + i * LANES) = at[i];
            *(Floats *)(sure + x + i * LANES) = 1.0f / sum[i];
        }
    }
}

/* Adds a row to the first, second, .. of WAYS counts and sums by turns: neighbours, which are often of
   one class, need not wait for each other. What class -1 counts is in the place before the first. */
#define WAYS 4
TARGET INLINE void OF(count)(const int32_t *index, const float *sure, int n, int classes,
                             int64_t *counts, double *sums)
{
    const long apart = classes + 1;
    for (int x = 0; x < n; x += WAYS)
#pragma GCC unroll 4
        for (int way = 0; way < WAYS; way++) {
            if (x + way >= n)
                break;
            const long place = way * apart + 1 + index[x + way];
            counts[place]++;
            sums[place] += sure[x + way];
        }
}

/* Where LANES neighbours lie between cells of a row. */
struct OF(stretch) {
    int first, near; /* near: LANES cells, the first of them this, are all that they lie between */
    int32_t left[LANES], right[LANES]; /* cells, from that one on */
    float share[LANES];
};

TARGET INLINE void OF(stretched)(int x, int w, int width, struct OF(stretch) *out)
{
    for (int i = 0; i < LANES; i++) /* beyond the last pixel: as there */
        OF(between)(x + i < width ? x + i : width - 1, w, width, out->left + i, out->right + i,
                    out->share + i);
    out->first = out->left[0] + LANES <= w || w < LANES ? out->left[0] : w - LANES;
    out->near = w >= LANES && out->right[LANES - 1] - out->first < LANES;
    for (int i = 0; i < LANES; i++)
        out->left[i] -= out->first, out->right[i] -= out->first;
}

TARGET INLINE Floats OF(picked)(const float *cells, int near, const int32_t *which)
{
    float out[LANES];
#ifdef PICKED
    if (near)
        return PICKED(AT(cells), *(const Ints *)which);
#else
    (void)near;
#endif
    for (int i = 0; i < LANES; i++)
        out[i] = cells[which[i]];
    return AT(out);
}

/* Pixel rows y0 to y1 of a picture, `wanted` columns of each.

   scores begin with grid row g0 of h, w cells wide, which are stretched over height x width pixels.
   blank (or NULL) is not 0 where there is no data, ids (or NULL: 0, 1, ..) are the classes' labels,
   labels have one or four bytes. counts and sums are set, not added to.
   NO_NUMBER: some score is none, or near the end of floats; nothing is said then. */
TARGET static int OF(finish)(const float *scores, int classes, long of_class, long of_row, int g0,
                             int h, int w, int height, int width, int y0, int y1, int wanted,
                             const uint8_t *blank, const int32_t *ids, int fill, int bytes,
                             void *labels, uint8_t *certainty, int64_t *counts, double *sums)
{
    _Alignas(64) float sure[COLUMNS];
    _Alignas(64) int32_t index[COLUMNS];
    struct OF(stretch) stretches[COLUMNS / LANES];
    const size_t plane = (size_t)classes * COLUMNS;
    int32_t upper, lower;
    float share;

    OF(between)(y0, h, height, &upper, &lower, &share);
    const int32_t first = upper;
    OF(between)(y1 - 1, h, height, &upper, &lower, &share);
    for (int k = 0; k < classes; k++)
        for (int32_t y = first; y <= lower; y++) {
            const float *row = scores + k * of_class + (y - g0) * of_row;
            int32_t none = 0, bits;
            for (int x = 0; x < w; x++) {
                memcpy(&bits, row + x, 4);
                none |= (bits & 0x7f800000) >= 0x7e000000; /* 2^125: so that no sum overflows */
            }
            if (none)
                return NO_NUMBER;
        }

    float *wide[2], *octaves = floats(3 * plane);
    int64_t *counted = calloc((size_t)WAYS * (classes + 1), sizeof(*counted));
    double *summed = calloc((size_t)WAYS * (classes + 1), sizeof(*summed));
    if (!octaves || !counted || !summed) {
        free(octaves), free(counted), free(summed);
        return NO_MEMORY;
    }
    memset(octaves, 0, 3 * plane * sizeof(float));
    wide[0] = octaves + plane, wide[1] = octaves + 2 * plane;
    for (int x0 = 0; x0 < wanted; x0 += COLUMNS) {
        const int n = wanted - x0 < COLUMNS ? wanted - x0 : COLUMNS;
        int32_t there[2] = {-1, -1};
        for (int x = 0; x < n; x += LANES)
            OF(stretched)(x0 + x, w, width, stretches + x / LANES);
        for (int y = y0; y < y1; y++) {
            OF(between)(y, h, height, &upper, &lower, &share);
            for (int32_t y_grid = upper; y_grid <= lower; y_grid++) {
                if (there[y_grid & 1] == y_grid)
                    continue;
                there[y_grid & 1] = y_grid;
                for (int k = 0; k < classes; k++) {
                    const float *row = scores + k * of_class + (y_grid - g0) * of_row;
                    float *out = wide[y_grid & 1] + (size_t)k * COLUMNS;
                    for (int x = 0; x < n; x += LANES) {
                        const struct OF(stretch) *at = stretches + x / LANES;
                        const Floats before = OF(picked)(row + at->first, at->near, at->left);
                        const Floats after = OF(picked)(row + at->first, at->near, at->right);
                        *(Floats *)(out + x) =
                            OCTAVE * ((1 - AT(at->share)) * before + AT(at->share) * after);
                    }
                }
            }
            OF(row)(wide[upper & 1], wide[lower & 1], classes, share, octaves, index, sure);
            const size_t at = (size_t)(y - y0) * wanted + x0;
            if (blank)
                for (int x = 0; x < n; x++)
                    if (blank[at + x])
                        index[x] = -1, sure[x] = 0;
            OF(count)(index, sure, n, classes, counted, summed);
            if (certainty)
                for (int x = 0; x < n; x++)
                    certainty[at + x] = (uint8_t)rintf(sure[x] * 255);
            if (ids)
                for (int x = 0; x < n; x++)
                    index[x] = index[x] < 0 ? index[x] : ids[index[x]];
            if (blank)
                for (int x = 0; x < n; x++)
                    index[x] = index[x] < 0 ? fill : index[x];
            if (bytes == 1)
                for (int x = 0; x < n; x++)
                    ((uint8_t *)labels)[at + x] = (uint8_t)index[x];
            else
                memcpy((int32_t *)labels + at, index, n * sizeof(int32_t));
        }
    }
    for (int k = 0; k < classes; k++) {
        counts[k] = 0, sums[k] = 0;
        for (size_t i = k + 1; i < (size_t)WAYS * (classes + 1); i += classes + 1)
            counts[k] += counted[i], sums[k] += summed[i];
    }
    free(octaves), free(counted), free(summed);
    return DONE;
}

#undef WAYS
#undef BESIDE
#undef COLUMNS
