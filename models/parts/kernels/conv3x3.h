/* 3 x 3 convolutions of stride 1 with a border of one zero, rows of pixels of channels (HWC).

   `halved` is for few channels: the direct sums, of four neighbours at a time, of which ReLU and the
   2 x 2 maximum leave one. `winograd` is for many: F(4 x 4, 3 x 3) as in Lavin and Gray 2016 (arXiv
   1509.09308), 36 products of matrices instead of the 144 that 16 outputs would take. Kernels come
   packed: [.., panels of features, channels, PANEL], zeros behind the last feature. `halved_twice` is
   one behind the other, of which no more is kept than what the second reads next. */

/* A picture's rows `top` to `top + rows` of the halved map; those beyond the map are zeros. */
TARGET static int OF(halved)(const float *x, int height, int width, int channels,
                             const float *kernel, const float *bias, int features, int top,
                             int rows, float *out)
{
    const int w = width / 2, window = 3 * channels;
    const size_t row = (size_t)(width + 2) * channels;
    float *near = floats(4 * row); /* the four rows that two rows of outputs read */
    if (!near)
        return NO_MEMORY;
    memset(near, 0, 4 * row * sizeof(float));
    for (int y = top; y < top + rows; y++, out += (size_t)w * features) {
        if (y < 0 || y >= height / 2) {
            memset(out, 0, (size_t)w * features * sizeof(float));
            continue;
        }
        for (int i = 0; i < 4; i++) {
            int from = 2 * y - 1 + i;
            float *inside = near + i * row + channels;
            size_t bytes = (size_t)width * channels * sizeof(float);
            if (from < 0 || from >= height)
                memset(inside, 0, bytes);
            else
                memcpy(inside, x + (size_t)from * width * channels, bytes);
        }
        for (int f = 0; f < features; f += PANEL)
            for (int col = 0; col < w; col++) {
                Floats a0 = {0}, a1 = a0, b0 = a0, b1 = a0, c0 = a0, c1 = a0, d0 = a0, d1 = a0;
                const float *k = kernel + (size_t)f * 3 * window;
                for (int dy = 0; dy < 3; dy++) {
                    const float *upper = near + dy * row + (size_t)2 * col * channels;
                    const float *lower = upper + row;
                    for (int i = 0; i < window; i++, k += PANEL) {
                        Floats k0 = AT(k), k1 = AT(k + LANES);
                        a0 += upper[i] * k0, a1 += upper[i] * k1;
                        b0 += upper[i + channels] * k0, b1 += upper[i + channels] * k1;
                        c0 += lower[i] * k0, c1 += lower[i] * k1;
                        d0 += lower[i + channels] * k0, d1 += lower[i + channels] * k1;
                    }
                }
                Floats most[2] = {
                    OF(greater)(OF(greater)(a0, b0), OF(greater)(c0, d0)) + AT(bias + f),
                    OF(greater)(OF(greater)(a1, b1), OF(greater)(c1, d1)) + AT(bias + f + LANES),
                };
                most[0] = OF(greater)(most[0], (Floats){0});
                most[1] = OF(greater)(most[1], (Floats){0});
                int keep = features - f < PANEL ? features - f : PANEL;
                memcpy(out + (size_t)col * features + f, most, keep * sizeof(float));
            }
    }
    free(near);
    return DONE;
}

/* B^T of Lavin and Gray for the points 0, +-NEAR, +-FAR and infinity (conv3x3.py says why those): n
   values of each of six rows. */
#define NEAR 0.625f
#define FAR 1.5f
#define NEAR2 (NEAR * NEAR)
#define FAR2 (FAR * FAR)
#define MIX(T, i)                                                                                  \
    do {                                                                                           \
        T a = *(const T *)(r[0] + i), b = *(const T *)(r[1] + i), c = *(const T *)(r[2] + i);      \
        T d = *(const T *)(r[3] + i), e = *(const T *)(r[4] + i), f = *(const T *)(r[5] + i);      \
        T near = NEAR * (d - FAR2 * b), far = FAR * (d - NEAR2 * b);                               \
        T near_even = e - FAR2 * c, far_even = e - NEAR2 * c;                                      \
        *(T *)(out + i) = NEAR2 * FAR2 * a - (NEAR2 + FAR2) * c + e;                               \
        *(T *)(out + apart + i) = near_even + near;                                                \
        *(T *)(out + 2 * apart + i) = near_even - near;                                            \
        *(T *)(out + 3 * apart + i) = far_even + far;                                              \
        *(T *)(out + 4 * apart + i) = far_even - far;                                              \
        *(T *)(out + 5 * apart + i) = NEAR2 * FAR2 * b - (NEAR2 + FAR2) * d + f;                   \
    } while (0)

TARGET INLINE void OF(mixed)(const float *const r[6], size_t n, float *out, size_t apart)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        MIX(Floats, i);
    for (; i < n; i++)
        MIX(float, i);
}

/* A^T: six products to four outputs. */
TARGET INLINE void OF(unmixed)(const Floats m[6], Floats out[4])
{
    Floats near = m[1] + m[2], near_less = m[1] - m[2], far = m[3] + m[4], far_less = m[3] - m[4];
    out[0] = m[0] + near + far;
    out[1] = NEAR * near_less + FAR * far_less;
    out[2] = NEAR2 * near + FAR2 * far;
    out[3] = NEAR2 * NEAR * near_less + FAR2 * FAR * far_less + m[5];
}

#define AT_ONCE (1 << 20) /* bytes of tiles and their products, or a little more (1/4 to 2 MB: alike) */
#define LEAST 48 /* tiles at least, for which all of a kernel is read once */
#define DEEP 256 /* channels of a panel that stay in the innermost cache */

/* `rows` rows of outputs from row `top` of x on, or half as many and half as wide: after ReLU and a
   2 x 2 maximum. Beyond x are zeros. */
TARGET static int OF(winograd)(const float *x, int height, int width, int channels,
                               const float *kernel, const float *bias, int features, int top,
                               int rows, int halve, float *out)
{
    const int padded = (int)up_to(features, PANEL), tiles = (width + 3) / 4, side = halve ? 2 : 4;
    const int out_rows = halve ? rows / 2 : rows, out_width = halve ? width / 2 : width;
    size_t each = AT_ONCE / (36 * sizeof(float) * (channels + padded));
    each = up_to(each < LEAST ? LEAST : each, ROWS);
    each = each < up_to(tiles, ROWS) ? each : up_to(tiles, ROWS);
    const size_t of_plane = (4 * each + 2) * channels;
    const size_t of_v = each * channels, of_m = each * padded;
    float *planes = floats(7 * of_plane + 36 * (of_v + of_m));
    if (!planes)
        return NO_MEMORY;
    float *nothing = planes + 6 * of_plane, *v = nothing + of_plane, *m = v + 36 * of_v;
    memset(nothing, 0, of_plane * sizeof(float)); /* beyond the map */

    for (int group = 0; side * group < out_rows; group++)
        for (int t0 = 0; t0 < tiles; t0 += (int)each) {
            const int n = tiles - t0 < (int)each ? tiles - t0 : (int)each;
            const int left = 4 * t0 - 1, right = 4 * (t0 + n) + 1; /* columns that are read */
            const int first = left < 0 ? 0 : left, last = right < width ? right : width;
            const float *six[6];
            for (int i = 0; i < 6; i++) {
                int y = top + 4 * group - 1 + i;
                six[i] = y < 0 || y >= height ? nothing : x + ((size_t)y * width + first) * channels;
            }
            for (int p = 0; p < 6; p++) { /* zeros beside the map */
                float *plane = planes + p * of_plane;
                memset(plane, 0, (size_t)(first - left) * channels * sizeof(float));
                memset(plane + (size_t)(last - left) * channels, 0,
                       (size_t)(right - last) * channels * sizeof(float));
            }
            OF(mixed)(six, (size_t)(last - first) * channels,
                      planes + (size_t)(first - left) * channels, of_plane);
            for (int p = 0; p < 6; p++)
                for (int t = 0; t < n; t++) {
                    for (int i = 0; i < 6; i++)
                        six[i] = planes + p * of_plane + (size_t)(4 * t + i) * channels;
                    OF(mixed)(six, channels, v + 6 * p * of_v + (size_t)t * channels, of_v);
                }
            for (int p = 0; p < 36; p++)
                for (int c = 0; c < channels; c += DEEP)
                    for (int f = 0; f < padded; f += PANEL) {
                        const float *panel = kernel + ((size_t)p * padded + f) * channels + c * PANEL;
                        int deep = channels - c < DEEP ? channels - c : DEEP;
                        OF(products)(v + p * of_v + c, channels, n, deep, panel, PANEL, c > 0,
                                     m + p * of_m + f, padded);
                    }
            for (int t = 0; t < n; t++)
                for (int f = 0; f < features; f += LANES) {
                    Floats half[4][6], done[4][4];
                    const size_t keep = (features - f < LANES ? features - f : LANES) * sizeof(float);
                    for (int q = 0; q < 6; q++) {
                        Floats six[6], four[4];
                        for (int p = 0; p < 6; p++)
                            six[p] = AT(m + (6 * p + q) * of_m + (size_t)t * padded + f);
                        OF(unmixed)(six, four);
                        for (int i = 0; i < 4; i++)
                            half[i][q] = four[i];
                    }
                    for (int i = 0; i < 4; i++) {
                        OF(unmixed)(half[i], done[i]);
                        for (int j = 0; j < 4; j++)
                            done[i][j] += AT(bias + f);
                    }
                    if (halve)
                        for (int i = 0; i < 2; i++)
                            for (int j = 0; j < 2; j++) {
                                Floats *upper = done[2 * i] + 2 * j, *lower = done[2 * i + 1] + 2 * j;
                                Floats most = OF(greater)(OF(greater)(upper[0], upper[1]),
                                                          OF(greater)(lower[0], lower[1]));
                                done[i][j] = OF(greater)(most, (Floats){0});
                            }
                    for (int i = 0; i < side && side * group + i < out_rows; i++)
                        for (int j = 0; j < side && side * (t0 + t) + j < out_width; j++) {
                            size_t pixel = (size_t)(side * group + i) * out_width + side * (t0 + t) + j;
                            memcpy(out + pixel * features + f, &done[i][j], keep);
                        }
                }
        }
    free(planes);
    return DONE;
}

/* Two convolutions, each with a 2 x 2 maximum and ReLU behind it: a quarter as many rows and columns. */
TARGET static int OF(halved_twice)(const float *x, int height, int width, int channels,
                                   const float *first, const float *first_bias, int between,
                                   const float *second, const float *second_bias, int features,
                                   float *out)
{
    const int rows = height / 4 * 2, w = width / 2;
    const size_t row = (size_t)w * between;
    float *near = floats(6 * row); /* what four rows of the second read */
    int said = near ? DONE : NO_MEMORY;
    for (int y = 0; y < rows && said == DONE; y += 4) {
        const int kept = y ? 2 : 0, wanted = rows - y < 4 ? rows - y : 4;
        memcpy(near, near + 4 * row, kept * row * sizeof(float));
        said = OF(halved)(x, height, width, channels, first, first_bias, between, y - 1 + kept,
                          6 - kept, near + kept * row);
        if (said == DONE)
            said = OF(winograd)(near, 6, w, between, second, second_bias, features, 1, wanted, 1,
                                out + (size_t)(y / 2) * (w / 2) * features);
    }
    free(near);
    return said;
}

#undef MIX
#undef NEAR
#undef FAR
#undef NEAR2
#undef FAR2
#undef AT_ONCE
#undef LEAST
#undef DEEP
