/* 3 x 3 convolutions of stride 1 with a border of one zero, rows of pixels of channels (HWC), by
   minimal filtering as in Lavin and Gray 2016 (arXiv 1509.09308).

   `winograd` is for many channels: F(4 x 4, 3 x 3), 36 products of matrices for the 144 that 16 outputs
   would take. `halved` is for few, of which the transforms would cost more than they save: F(4, 3) of
   columns alone, 18 products for 36; of four neighbours ReLU and the 2 x 2 maximum leave one.
   `halved_twice` is one behind the other, of which no more is kept than what the second reads next.
   Kernels come transformed and packed, zeros behind the last feature: [panels of features][6 or 36]
   [channels, or 3 columns of them][PANEL]. */

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

/* LANES features of a pixel, of which `left` are wanted. */
TARGET INLINE void OF(stored)(Floats value, int left, float *out)
{
    if (left >= LANES)
        *(Floats *)out = value;
    else
        memcpy(out, &value, left * sizeof(float));
}

/* The same of four pixels, after the maximum, the bias and ReLU. */
TARGET INLINE void OF(pooled)(const Floats upper[2], const Floats lower[2], Floats bias, int left,
                              float *out)
{
    Floats most = OF(greater)(OF(greater)(upper[0], upper[1]), OF(greater)(lower[0], lower[1]));
    OF(stored)(OF(positive)(most + bias), left, out);
}

#define COLUMNS 48 /* whose sums stay in the innermost cache (24 to 96: alike) */

/* How many floats `halved` works in: sums, planes, and a row beyond the map. */
static size_t OF(room_of_halved)(int width, int channels)
{
    return 6 * COLUMNS * PANEL + (size_t)channels * (6 * (width + 2) + width);
}

/* A picture's rows `top` to `top + rows` of the halved map; those beyond the map are zeros. `m` is room,
   for the first rows of a picture of zeros, and then as it was left. */
TARGET static void OF(halved)(const float *x, int height, int width, int channels,
                              const float *kernel, const float *bias, int features, int top,
                              int rows, float *m, float *out)
{
    const int w = width / 2, window = 3 * channels;
    const size_t inside = (size_t)width * channels, of_plane = inside + 2 * channels;
    const size_t of_m = COLUMNS * PANEL, of_row = (size_t)w * features;
    float *planes = m + 6 * of_m; /* they stay zeros beside the map */
    const float *nothing = planes + 6 * of_plane;
    for (int i = 0; i < rows; i += 2) {
        const int y = top + i, some = rows - i < 2 ? 1 : 2;
        const float *six[6];
        for (int r = 0; r < 6; r++) {
            int from = 2 * y - 1 + r;
            six[r] = from < 0 || from >= height ? nothing : x + from * inside;
        }
        OF(mixed)(six, inside, planes + channels, of_plane);
        for (int f = 0; f < features; f += PANEL)
            for (int first = 0; first < 2 * w; first += COLUMNS) {
                const int n = 2 * w - first < COLUMNS ? 2 * w - first : COLUMNS;
                const float *panel = kernel + (size_t)6 * f * window;
                for (int p = 0; p < 6; p++, panel += (size_t)window * PANEL)
                    OF(products)(planes + p * of_plane + (size_t)first * channels, channels, n,
                                 window, panel, PANEL, 0, m + p * of_m, PANEL);
                for (int g = f; g < f + PANEL && g < features; g += LANES)
                    for (int column = 0; column < n; column += 2) {
                        const float *sums = m + (size_t)column * PANEL + g - f;
                        Floats left[6], right[6], four[2][4];
                        for (int p = 0; p < 6; p++) {
                            left[p] = AT(sums + p * of_m);
                            right[p] = AT(sums + p * of_m + PANEL);
                        }
                        OF(unmixed)(left, four[0]);
                        OF(unmixed)(right, four[1]);
                        float *to = out + (size_t)(first + column) / 2 * features + g;
                        OF(pooled)(four[0], four[1], AT(bias + g), features - g, to);
                        if (some > 1)
                            OF(pooled)(four[0] + 2, four[1] + 2, AT(bias + g), features - g,
                                       to + of_row);
                    }
            }
        for (int r = 0; r < some; r++, out += of_row)
            if (y + r < 0 || y + r >= height / 2)
                memset(out, 0, of_row * sizeof(float));
    }
}

#define STRIP 12 /* tiles whose rows stay in the innermost cache between the two transforms */

/* B^T x B of n tiles, the first at pixel row y and column 4 * tile less one each: v, [36][of_v]. */
TARGET static void OF(tiles_in)(const float *x, int height, int width, int channels, int y, int tile,
                                int n, const float *nothing, float *planes, float *v, size_t of_v)
{
    const size_t of_plane = (4 * STRIP + 2) * channels;
    for (int done = 0; done < n; done += STRIP, v += (size_t)STRIP * channels) {
        const int some = n - done < STRIP ? n - done : STRIP;
        const int left = 4 * (tile + done) - 1, right = left + 4 * some + 2; /* columns that are read */
        const int first = left < 0 ? 0 : left, last = right < width ? right : width;
        const float *six[6];
        for (int i = 0; i < 6; i++)
            six[i] = y - 1 + i < 0 || y - 1 + i >= height
                         ? nothing : x + ((size_t)(y - 1 + i) * width + first) * channels;
        for (int p = 0; p < 6; p++) { /* zeros beside the map */
            float *plane = planes + p * of_plane;
            memset(plane, 0, (size_t)(first - left) * channels * sizeof(float));
            memset(plane + (size_t)(last - left) * channels, 0,
                   (size_t)(right - last) * channels * sizeof(float));
        }
        OF(mixed)(six, (size_t)(last - first) * channels, planes + (size_t)(first - left) * channels,
                  of_plane);
        for (int p = 0; p < 6; p++)
            for (int t = 0; t < some; t++) {
                for (int i = 0; i < 6; i++)
                    six[i] = planes + p * of_plane + (size_t)(4 * t + i) * channels;
                OF(mixed)(six, channels, v + 6 * p * of_v + (size_t)t * channels, of_v);
            }
    }
}

/* A^T m A of LANES features of a tile, m [36][PANEL], and what follows: rows x columns of pixels, at
   most 4 x 4, or 2 x 2 halved ones. */
TARGET INLINE void OF(tile_out)(const float *m, Floats bias, int left, int halve, int rows,
                                int columns, float *out, size_t of_row, int features)
{
    Floats half[4][6], done[4][4];
    for (int q = 0; q < 6; q++) {
        Floats six[6], four[4];
        for (int p = 0; p < 6; p++)
            six[p] = AT(m + (6 * p + q) * PANEL);
        OF(unmixed)(six, four);
        for (int i = 0; i < 4; i++)
            half[i][q] = four[i];
    }
    for (int i = 0; i < 4; i++)
        OF(unmixed)(half[i], done[i]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float *to = out + i * of_row + (size_t)j * features;
            if (i >= rows || j >= columns)
                continue;
            if (!halve)
                OF(stored)(done[i][j] + bias, left, to);
            else if (i < 2 && j < 2)
                OF(pooled)(done[2 * i] + 2 * j, done[2 * i + 1] + 2 * j, bias, left, to);
        }
}

#define AT_ONCE (1 << 18) /* bytes of tiles and their sums, or a little more (1/8 to 1/2 MB: alike) */
#define LEAST 12 /* tiles at least, for which all of a kernel is read once */
#define DEEP 256 /* channels of a panel that stay in the innermost cache */

/* How many tiles of a row go through all of a kernel together. */
static size_t OF(together)(int width, int channels)
{
    size_t tiles = up_to((width + 3) / 4, ROWS);
    size_t each = AT_ONCE / (36 * sizeof(float) * (channels + PANEL));
    each = up_to(each < LEAST ? LEAST : each, ROWS);
    return each < tiles ? each : tiles;
}

/* How many floats `by_tiles` works in: sums, tiles, planes, and one beyond the map. */
static size_t OF(room_of_tiles)(int width, int channels)
{
    return OF(together)(width, channels) * 36 * (channels + PANEL) + 7 * (4 * STRIP + 2) * (size_t)channels;
}

/* `rows` rows of outputs from row `top` of x on, or half as many and half as wide: after ReLU and a
   2 x 2 maximum. Beyond x are zeros. `m` is room. */
TARGET static void OF(by_tiles)(const float *x, int height, int width, int channels,
                                const float *kernel, const float *bias, int features, int top,
                                int rows, int halve, float *m, float *out)
{
    const int tiles = (width + 3) / 4, side = halve ? 2 : 4;
    const int out_rows = halve ? rows / 2 : rows, out_width = halve ? width / 2 : width;
    const size_t each = OF(together)(width, channels), of_v = each * channels, of_m = 36 * PANEL;
    const size_t of_row = (size_t)out_width * features, of_plane = (4 * STRIP + 2) * (size_t)channels;
    float *v = m + each * of_m, *planes = v + 36 * of_v, *nothing = planes + 6 * of_plane;
    memset(nothing, 0, of_plane * sizeof(float)); /* beyond the map */

    for (int y = 0; y < out_rows; y += side)
        for (int tile = 0; tile < tiles; tile += (int)each) {
            const int n = tiles - tile < (int)each ? tiles - tile : (int)each;
            OF(tiles_in)(x, height, width, channels, top + 4 * (y / side), tile, n, nothing, planes, v,
                         of_v);
            for (int f = 0; f < features; f += PANEL) {
                const float *panel = kernel + (size_t)36 * f * channels;
                for (int p = 0; p < 36; p++)
                    for (int c = 0; c < channels; c += DEEP) {
                        int deep = channels - c < DEEP ? channels - c : DEEP;
                        OF(products)(v + p * of_v + c, channels, n, deep, panel, PANEL, c > 0,
                                     m + p * PANEL, (int)of_m);
                        panel += (size_t)deep * PANEL;
                    }
                for (int g = f; g < f + PANEL && g < features; g += LANES)
                    for (int t = 0; t < n; t++) {
                        const int column = side * (tile + t);
                        const int i = out_rows - y < side ? out_rows - y : side;
                        const int j = out_width - column < side ? out_width - column : side;
                        OF(tile_out)(m + t * of_m + g - f, AT(bias + g), features - g, halve, i, j,
                                     out + y * of_row + (size_t)column * features + g, of_row, features);
                    }
            }
        }
}

TARGET static int OF(winograd)(const float *x, int height, int width, int channels,
                               const float *kernel, const float *bias, int features, float *out)
{
    float *room = floats(OF(room_of_tiles)(width, channels));
    if (!room)
        return NO_MEMORY;
    OF(by_tiles)(x, height, width, channels, kernel, bias, features, 0, height, 0, room, out);
    free(room);
    return DONE;
}

/* Two convolutions, each with a 2 x 2 maximum and ReLU behind it: a quarter as many rows and columns. */
TARGET static int OF(halved_twice)(const float *x, int height, int width, int channels,
                                   const float *first, const float *first_bias, int between,
                                   const float *second, const float *second_bias, int features,
                                   float *out)
{
    const int rows = height / 4 * 2, w = width / 2;
    const size_t row = (size_t)w * between, of_near = up_to(6 * row, LINE);
    const size_t of_first = up_to(OF(room_of_halved)(width, channels), LINE);
    float *room = floats(of_first + of_near + OF(room_of_tiles)(w, between));
    if (!room)
        return NO_MEMORY;
    float *near = room + of_first; /* what four rows of the second read */
    memset(room, 0, of_first * sizeof(float));
    for (int y = 0; y < rows; y += 4) {
        const int kept = y ? 2 : 0, wanted = rows - y < 4 ? rows - y : 4;
        memcpy(near, near + 4 * row, kept * row * sizeof(float));
        OF(halved)(x, height, width, channels, first, first_bias, between, y - 1 + kept, 6 - kept,
                   room, near + kept * row);
        OF(by_tiles)(near, 6, w, between, second, second_bias, features, 1, wanted, 1,
                     near + of_near, out + (size_t)(y / 2) * (w / 2) * features);
    }
    free(room);
    return DONE;
}

#undef MIX
#undef NEAR
#undef FAR
#undef NEAR2
#undef FAR2
#undef COLUMNS
#undef STRIP
#undef AT_ONCE
#undef LEAST
#undef DEEP
