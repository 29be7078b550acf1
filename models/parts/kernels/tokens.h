/* Tokens, rows of features, that are read by experts or ask them: a block at a time, which stays in
   the caches, through all layers.

   To go through a layer PANEL tokens lie beside each other (a tile: [features][PANEL]), so that a
   layer is `products` of its weights, and a softmax or a norm takes every token in its own lane. */

#define BLOCK 256 /* tokens that are read at once */
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
    for (Floats *own = (Floats *)tile; own < (Floats *)(tile + PANEL); own++) {
        Floats best = own[0], sum = {0};
        for (int k = 1; k < n; k++)
            best = OF(greater)(own[2 * k], best);
        for (int k = 0; k < n; k++)
            sum += own[2 * k] = OF(exp2_of)((own[2 * k] - best) * OCTAVE);
        sum = 1 / sum;
        for (int k = 0; k < n; k++)
            own[2 * k] *= sum;
    }
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

/* n scores, BLOCK at most, as shares: 2^ of how far below the greatest they are, of these and of
   `before`. That one is returned, and their sum. */
TARGET static float OF(shared)(float *scores, int n, float before, float *sum)
{
    Floats best = (Floats){0} + before, sums = {0};
    float most = before;
    for (int i = n; i < (int)up_to(n, LANES); i++)
        scores[i] = -INFINITY; /* no token */
    for (int i = 0; i < n; i += LANES)
        best = OF(greater)(AT(scores + i), best);
    for (int j = 0; j < LANES; j++)
        most = best[j] > most ? best[j] : most;
    const float from = most == -INFINITY ? 0 : most; /* -inf less itself would be no number */
    for (int i = 0; i < n; i += LANES)
        sums += *(Floats *)(scores + i) = OF(exp2_of)((AT(scores + i) - from) * OCTAVE);
    *sum = 0;
    for (int j = 0; j < LANES; j++)
        *sum += sums[j];
    return most;
}

/* `rows` fixed queries read all tokens: every one's mean of them, weighted by the softmax of its
   scores. Block by block, as Milakov and Gimelshein 2018 (arXiv 1805.02867): the sums so far are
   scaled down whenever a greater score comes. */
TARGET static int OF(read)(const float *x, long tokens, int features, const float *query, int rows,
                           float *out)
{
    const size_t padded = up_to(features, PANEL);
    float *tile = floats(TILE(2 * padded) + (BLOCK + rows) * padded + (size_t)rows * (BLOCK + 1));
    double *means = calloc(rows * (padded + 1), sizeof(double)); /* of any number of blocks */
    if (!tile || !means) {
        free(tile), free(means);
        return NO_MEMORY;
    }
    double *sums = means + rows * padded;
    float *spare = tile + TILE(padded), *copied = spare + TILE(padded);
    float *some = copied + BLOCK * padded, *shares = some + rows * padded;
    float *most = shares + (size_t)rows * BLOCK;
    memset(copied, 0, BLOCK * padded * sizeof(float));
    for (int r = 0; r < rows; r++)
        most[r] = -INFINITY;
    for (long t = 0; t < tokens; t += BLOCK) {
        const int n = tokens - t < BLOCK ? (int)(tokens - t) : BLOCK;
        float sum;
        const float *own = x + t * features;
        for (int i = 0; i < n; i += PANEL) {
            OF(turned)(own + (size_t)i * features, n - i < PANEL ? n - i : PANEL, features, spare, tile);
            OF(products)(query, features, rows, features, tile, PANEL, 0, shares + i, BLOCK);
        }
        for (int r = 0; r < rows; r++) {
            const float before = most[r];
            most[r] = OF(shared)(shares + (size_t)r * BLOCK, n, before, &sum);
            const float scale = most[r] > before ? exp2f((before - most[r]) * OCTAVE) : 1;
            sums[r] = sums[r] * scale + sum;
            for (size_t f = 0; scale != 1 && f < padded; f++)
                means[r * padded + f] *= scale;
        }
        if (padded != (size_t)features) {
            for (int i = 0; i < n; i++)
                memcpy(copied + i * padded, own + (size_t)i * features, features * sizeof(float));
            own = copied;
        }
        for (size_t f = 0; f < padded; f += PANEL)
            OF(products)(shares, BLOCK, rows, n, own + f, (int)padded, 0, some + f, (int)padded);
        for (size_t i = 0; i < rows * padded; i++)
            means[i] += some[i];
    }
    for (int r = 0; r < rows; r++) {
        const double sum_of_all = most[r] == -INFINITY ? NAN : sums[r]; /* as for any softmax */
        for (int f = 0; f < features; f++)
            out[(size_t)r * features + f] = (float)(means[r * padded + f] / sum_of_all);
    }
    free(tile), free(means);
    return DONE;
}

#undef BLOCK
#undef TILE
