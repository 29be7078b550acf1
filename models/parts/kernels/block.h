/* A window of each channel's own, a layer, ReLU, a layer, added to what was there: cell by cell, rows
   of cells of channels (HWC). Weights come as rows of inputs, outputs up to a multiple of PANEL. */

#define CELLS 48 /* at once: what they are on the way stays in the innermost caches */

/* What a cell sees through some of its window's places; with a constant for `taps` in registers. */
TARGET INLINE void OF(look)(const int taps, const float *x, const long *near, const float *window,
                            const long *weight, const float *bias, int channels, float *out)
{
    int c = 0;
    for (; c + LANES <= channels; c += LANES) {
        Floats sum = AT(bias + c);
#pragma GCC unroll 9
        for (int i = 0; i < taps; i++)
            sum += AT(window + weight[i] + c) * AT(x + near[i] + c);
        *(Floats *)(out + c) = sum;
    }
    for (; c < channels; c++) {
        out[c] = bias[c];
        for (int i = 0; i < taps; i++)
            out[c] += window[weight[i] + c] * x[near[i] + c];
    }
}

/* What n cells from the `first` on see: 3 x 3, `spread` cells apart, zeros beyond the map. */
TARGET static void OF(seen)(const float *x, int height, int width, int channels, int spread,
                            const float *window, const float *bias, long first, int n, float *out)
{
    int y = (int)(first / width), col = (int)(first % width), taps = 0;
    long near[9], weight[9];
    x += first * channels;
    for (int t = 0; t < n; t++, x += channels, out += channels) {
        if (t == 0 || col <= spread || col >= width - spread) { /* else as for the cell before */
            taps = 0;
            for (int i = 0; i < 9; i++) {
                const int y_near = y + (i / 3 - 1) * spread, x_near = col + (i % 3 - 1) * spread;
                near[taps] = ((long)(y_near - y) * width + x_near - col) * channels;
                weight[taps] = (long)i * channels;
                taps += y_near >= 0 && y_near < height && x_near >= 0 && x_near < width;
            }
        }
        if (taps == 9)
            OF(look)(9, x, near, window, weight, bias, channels, out);
        else
            OF(look)(taps, x, near, window, weight, bias, channels, out);
        col = col + 1 < width ? col + 1 : 0;
        y += !col;
    }
}

TARGET static int OF(block)(const float *x, int height, int width, int channels, int spread,
                            const struct block *own, int inside, float *out)
{
    const int padded = (int)up_to(channels, PANEL), wide = (int)up_to(inside, PANEL);
    float *seen = floats((size_t)CELLS * (channels + padded + wide));
    if (!seen)
        return NO_MEMORY;
    float *sums = seen + (size_t)CELLS * channels, *thought = sums + (size_t)CELLS * padded;
    const long cells = (long)height * width;
    for (long first = 0; first < cells; first += CELLS) {
        const int n = cells - first < CELLS ? (int)(cells - first) : CELLS;
        OF(seen)(x, height, width, channels, spread, own->window, own->window_bias, first, n, seen);
        OF(biased)(own->widen_bias, n, wide, thought);
        OF(layered)(seen, channels, n, channels, own->widen, wide, thought);
        OF(cut_off)(thought, (size_t)n * wide);
        OF(biased)(own->narrow_bias, n, padded, sums);
        OF(layered)(thought, wide, n, inside, own->narrow, padded, sums);
        for (int t = 0; t < n; t++) {
            const float *was = x + (first + t) * channels, *sum = sums + (size_t)t * padded;
            float *to = out + (first + t) * channels;
            for (int c = 0; c < channels; c++)
                to[c] = was[c] + sum[c];
        }
    }
    free(seen);
    return DONE;
}

#undef CELLS
