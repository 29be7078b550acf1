/* Tokens, rows of features, that are read by experts or ask them: a block at a time, which stays in
   the caches, through all layers.

   To go through a layer PANEL tokens lie beside each other (a tile: [features][PANEL]), so that a
   layer is `products` of its weights, and a softmax or a norm takes every token in its own lane. */

#define BLOCK 128 /* tokens that are read at once: their scores stay near (96 to 256: 3 % apart) */
#define TILE(n) ((size_t)(n) * PANEL)

/* LANES rows of LANES values, turned: by interleaving each row with the one half of them further. */
TARGET INLINE void OF(square)(const float *x, size_t of_row, float *out, size_t of_out)
{
    Floats rows[LANES], mixed[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        rows[i] = AT(x + i * of_row);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = SHUFFLED(rows[i], rows[i + LANES / 2], LOWER);
            mixed[2 * i + 1] = SHUFFLED(rows[i], rows[i + LANES / 2], UPPER);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            rows[i] = mixed[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        *(Floats *)(out + i * of_out) = rows[i];
}

/* n tokens, PANEL at most, as a tile. Features and tokens beyond are zeros: to that end `spare` and
   `out` have room for a tile of features, up to a multiple of LANES. */
TARGET static void OF(turned)(const float *x, int n, int features, float *spare, float *out)
{
    const int padded = (int)up_to(features, LANES);
    if (n < PANEL || padded != features) {
        memset(spare, 0, TILE(padded) * sizeof(float));
        for (int t = 0; t < n; t++)
            memcpy(spare + (size_t)t * padded, x + (size_t)t * features, features * sizeof(float));
        x = spare;
    }
    for (int f = 0; f < padded; f += LANES)
        for (int t = 0; t < PANEL; t += LANES)
            OF(square)(x + (size_t)t * padded + f, padded, out + TILE(f) + t, PANEL);
}

/* A linear layer of a tile; with `more` added to what is there. */
TARGET static void OF(linear)(const float *weight, const float *bias, int outputs, int inputs,
                              const float *tile, int more, float *out)
{
    for (int o = 0; o < outputs; o++) {
        const float start = bias[o];
        for (int t = 0; t < PANEL; t++)
            out[TILE(o) + t] = more ? out[TILE(o) + t] + start : start;
    }
    OF(products)(weight, inputs, outputs, inputs, tile, PANEL, 1, out, PANEL);
}

/* Softmax over n rows of a tile, in place. */
TARGET static void OF(softmax)(float *tile, int n)
{
    Floats *own = (Floats *)tile, best[2] = {own[0], own[1]}, sum[2] = {0};
    for (int k = 1; k < n; k++)
        for (int i = 0; i < 2; i++)
            best[i] = OF(greater)(own[2 * k + i], best[i]);
    for (int k = 0; k < n; k++)
        for (int i = 0; i < 2; i++)
            sum[i] += own[2 * k + i] = OF(exp2_of)((own[2 * k + i] - best[i]) * OCTAVE);
    for (int i = 0; i < 2; i++)
        sum[i] = 1 / sum[i];
    for (int k = 0; k < n; k++)
        for (int i = 0; i < 2; i++)
            own[2 * k + i] *= sum[i];
}

/* A layer norm without weights. */
TARGET static void OF(normalised)(const float *restrict tile, int features, float epsilon,
                                  float *restrict out)
{
    float mean[PANEL] = {0}, scale[PANEL] = {0};
    for (int f = 0; f < features; f++)
        for (int t = 0; t < PANEL; t++)
            mean[t] += tile[TILE(f) + t];
    for (int t = 0; t < PANEL; t++)
        mean[t] /= features;
    for (int f = 0; f < features; f++)
        for (int t = 0; t < PANEL; t++) {
            float apart = out[TILE(f) + t] = tile[TILE(f) + t] - mean[t];
            scale[t] += apart * apart;
        }
    for (int t = 0; t < PANEL; t++)
        scale[t] = 1 / sqrtf(scale[t] / features + epsilon);
    for (int f = 0; f < features; f++)
        for (int t = 0; t < PANEL; t++)
            out[TILE(f) + t] *= scale[t];
}

/* What a tile is told by the experts that it asks: through scores and, for each head, shares. */
TARGET static void OF(told)(const struct asking *ask, int heads, int experts, int inputs,
                            const float *tile, float *shares, int outputs, int more, float *out)
{
    OF(linear)(ask->score, ask->score_bias, heads * experts, inputs, tile, 0, shares);
    for (int head = 0; head < heads; head++)
        OF(softmax)(shares + TILE(head * experts), experts);
    OF(linear)(ask->answer, ask->answer_bias, outputs, heads * experts, shares, more, out);
}

/* A tile's rows into those of a map: n tokens from token t on. */
TARGET INLINE void OF(put)(const float *tile, int rows, int n, float *out, long of_row, long t)
{
    for (int k = 0; k < rows; k++)
        memcpy(out + k * of_row + t, tile + TILE(k), n * sizeof(float));
}

/* Every token asks; outputs first: [outputs][tokens]. */
TARGET static int OF(ask)(const float *x, long tokens, int features, const struct asking *ask,
                          int heads, int experts, int outputs, float *out)
{
    const size_t padded = up_to(features, LANES);
    float *tile = floats(TILE(2 * padded + heads * experts + outputs));
    if (!tile)
        return NO_MEMORY;
    float *spare = tile + TILE(padded), *shares = spare + TILE(padded);
    float *answer = shares + TILE(heads * experts);
    for (long t = 0; t < tokens; t += PANEL) {
        const int n = tokens - t < PANEL ? (int)(tokens - t) : PANEL;
        OF(turned)(x + t * features, n, features, spare, tile);
        OF(told)(ask, heads, experts, features, tile, shares, outputs, 0, answer);
        OF(put)(answer, outputs, n, out, tokens, t);
    }
    free(tile);
    return DONE;
}

/* A row of cells between two of a coarser map, `factor` times as many rows apart. */
TARGET INLINE void OF(row_between)(const float *map, int y, int height, int factor, size_t n,
                                   float *out)
{
    int32_t upper, lower;
    float share;
    OF(between)(y, height / factor, height, &upper, &lower, &share);
    const float *above = map + upper * n, *below = map + lower * n;
    for (size_t i = 0; i < n; i++)
        out[i] = above[i] + share * (below[i] - above[i]);
}

/* Adds to n cells from column x on what that row says there: [n][features]. */
TARGET INLINE void OF(widened)(const float *row, int x, int n, int width, int factor,
                               int features, int padded, float *restrict out)
{
    for (int t = 0; t < n; t++, out += padded) {
        int32_t before, after;
        float share;
        OF(between)(x + t, width / factor, width, &before, &after, &share);
        const float *left = row + (size_t)before * features, *right = row + (size_t)after * features;
        for (int f = 0; f < features; f++)
            out[f] += left[f] + share * (right[f] - left[f]);
    }
}

/* Every cell of a map is what it says itself and what two coarser maps say there; asks, normalised;
   keeps what it is beside what it is told; thinks about both, again normalised; and what it knows
   and what it thought are classified: [classes][height][width]. */
TARGET static int OF(classify)(const struct maps *maps, int height, int width, int own,
                               int features, const struct asking *ask, int heads, int experts,
                               const struct thinking *think, int thoughts, int classes,
                               float epsilon, float *out)
{
    const int padded = (int)up_to(features, PANEL), shares_rows = heads * experts;
    const size_t half = (size_t)width / 2 * features, quarter = half / 2;
    float *cells = floats(TILE(3 * padded + shares_rows + thoughts + classes) + half + quarter);
    if (!cells)
        return NO_MEMORY;
    float *known = cells + TILE(padded), *normal = known + TILE(padded);
    float *shares = normal + TILE(padded), *thought = shares + TILE(shares_rows);
    float *scores = thought + TILE(thoughts), *at_half = scores + TILE(classes);
    float *at_quarter = at_half + half;
    for (int y = 0; y < height; y++) {
        OF(row_between)(maps->half, y, height, 2, half, at_half);
        OF(row_between)(maps->quarter, y, height, 4, quarter, at_quarter);
        for (int x = 0; x < width; x += PANEL) {
            const int n = width - x < PANEL ? width - x : PANEL;
            const size_t at = (size_t)y * width + x;
            OF(biased)(maps->bias, n, padded, cells);
            OF(widened)(at_half, x, n, width, 2, features, padded, cells);
            OF(widened)(at_quarter, x, n, width, 4, features, padded, cells);
            OF(layered)(maps->fine + at * own, own, n, own, maps->lateral, padded, cells);
            OF(turned)(cells, n, padded, normal, known);
            OF(normalised)(known, features, epsilon, normal);
            OF(told)(ask, heads, experts, features, normal, shares, features, 1, known);
            OF(normalised)(known, features, epsilon, normal);
            OF(linear)(think->widen, think->widen_bias, thoughts, features, normal, 0, thought);
            OF(cut_off)(thought, TILE(thoughts));
            OF(linear)(think->head, think->bias, classes, features, known, 0, scores);
            OF(products)(think->narrow, thoughts, classes, thoughts, thought, PANEL, 1, scores, PANEL);
            OF(put)(scores, classes, n, out, (long)height * width, (long)at);
        }
    }
    free(cells);
    return DONE;
}

/* Scores of n tokens, BLOCK at most, [n][wide], a column for each query, as shares: 2^ of how far below
   the greatest they are, of these and of `most` so far, which becomes it. `scale` is what earlier shares
   are worth now. */
TARGET static void OF(shared)(float *scores, int n, int wide, float *most, float *sums, float *scale)
{
    for (int r = 0; r < wide; r += PANEL) {
        Floats best[2] = {AT(most + r), AT(most + r + LANES)}, from[2], sum[2] = {0};
        for (int t = 0; t < n; t++)
            for (int i = 0; i < 2; i++)
                best[i] = OF(greater)(AT(scores + (size_t)t * wide + r + i * LANES), best[i]);
        for (int i = 0; i < 2; i++) {
            const Ints none = best[i] == -INFINITY; /* -inf less itself would be no number */
            from[i] = (Floats)(~none & (Ints)best[i]);
        }
        for (int t = 0; t < n; t++)
            for (int i = 0; i < 2; i++) {
                float *own = scores + (size_t)t * wide + r + i * LANES;
                sum[i] += *(Floats *)own = OF(exp2_of)((AT(own) - from[i]) * OCTAVE);
            }
        for (int i = 0; i < 2; i++) {
            float *before = most + r + i * LANES;
            *(Floats *)(scale + r + i * LANES) = OF(exp2_of)((AT(before) - from[i]) * OCTAVE);
            *(Floats *)(sums + r + i * LANES) = sum[i];
            *(Floats *)before = best[i];
        }
    }
}

/* `rows` fixed queries read all tokens: every one's mean of them, weighted by the softmax of its
   scores. Block by block, as Milakov and Gimelshein 2018 (arXiv 1805.02867): the sums so far are
   scaled down whenever a greater score comes. Queries lie beside each other here, not tokens. */
TARGET static int OF(read)(const float *x, long tokens, int features, const float *query, int rows,
                           float *out)
{
    const int padded = (int)up_to(features, PANEL), wide = (int)up_to(rows, PANEL);
    float *shares = floats((size_t)BLOCK * (wide + padded) + (size_t)rows * padded
                           + (size_t)(features + 3) * wide);
    double *means = calloc((size_t)rows * (padded + 1), sizeof(double)); /* of any number of blocks */
    if (!shares || !means) {
        free(shares), free(means);
        return NO_MEMORY;
    }
    double *sums = means + (size_t)rows * padded;
    float *copied = shares + (size_t)BLOCK * wide, *some = copied + (size_t)BLOCK * padded;
    float *most = some + (size_t)rows * padded, *sum = most + wide, *scale = sum + wide;
    float *turned = scale + wide;
    memset(turned, 0, (size_t)features * wide * sizeof(float));
    for (int r = 0; r < rows; r++)
        for (int f = 0; f < features; f++)
            turned[(size_t)f * wide + r] = query[(size_t)r * features + f];
    memset(copied, 0, (size_t)BLOCK * padded * sizeof(float));
    for (int r = 0; r < wide; r++)
        most[r] = -INFINITY;
    for (long t = 0; t < tokens; t += BLOCK) {
        const int n = tokens - t < BLOCK ? (int)(tokens - t) : BLOCK;
        const float *own = x + t * features;
        for (int r = 0; r < wide; r += PANEL)
            OF(products)(own, features, n, features, turned + r, wide, 0, shares + r, wide);
        OF(shared)(shares, n, wide, most, sum, scale);
        if (padded != features) {
            for (int i = 0; i < n; i++)
                memcpy(copied + (size_t)i * padded, own + (size_t)i * features, features * sizeof(float));
            own = copied;
        }
        for (int f = 0; f < padded; f += PANEL)
            OF(products_turned)(shares, wide, rows, n, own + f, padded, 0, some + f, padded);
        for (int r = 0; r < rows; r++) {
            sums[r] = sums[r] * scale[r] + sum[r];
            for (size_t i = (size_t)r * padded; i < (size_t)(r + 1) * padded; i++)
                means[i] = means[i] * scale[r] + some[i];
        }
    }
    for (int r = 0; r < rows; r++) {
        const double sum_of_all = most[r] == -INFINITY ? NAN : sums[r]; /* as for any softmax */
        for (int f = 0; f < features; f++)
            out[(size_t)r * features + f] = (float)(means[(size_t)r * padded + f] / sum_of_all);
    }
    free(shares), free(means);
    return DONE;
}

#undef BLOCK
#undef TILE
