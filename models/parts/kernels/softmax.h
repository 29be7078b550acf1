/* Softmax, of values that lie beside each other or apart. */

#define OCTAVE 1.44269504f /* 1 / ln 2: of values times this, 2^x is what e^x was */
#define COLUMNS 128

/* 2^x for x <= 0: a polynomial on [-1/2, 1/2] (Taylor, 3e-8 of the value at most), the exponent by
   adding to the bits of a float. Below 2^-126 it stays there; what is no number stays so. */
TARGET INLINE float OF(exp2_of)(float x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = x < -126.0f ? -126.0f : x;
    float whole = x + shift, rest = x - (whole - shift);
    float value = 1.0f + rest * (0.69314718f + rest * (0.24022651f + rest * (0.055504109f
        + rest * (0.0096181291f + rest * (0.0013333558f + rest * 0.00015403530f)))));
    int32_t exponent, bits;
    memcpy(&exponent, &whole, 4);
    memcpy(&bits, &value, 4);
    bits += (int32_t)((uint32_t)exponent << 23);
    memcpy(&value, &bits, 4);
    return x == x ? value : x;
}

/* One block of n values beside each other. */
TARGET INLINE void OF(softmax_beside)(const float *restrict x, size_t n, float *restrict out)
{
    float best[LANES], sums[LANES] = {0}, most = x[0], sum = 0;
    const size_t whole = n / LANES * LANES;
    for (int i = 0; i < LANES; i++)
        best[i] = most;
    for (size_t j = 0; j < whole; j += LANES)
        for (int i = 0; i < LANES; i++)
            best[i] = x[j + i] > best[i] ? x[j + i] : best[i];
    for (size_t j = whole; j < n; j++)
        most = x[j] > most ? x[j] : most;
    for (int i = 0; i < LANES; i++)
        most = best[i] > most ? best[i] : most;
    for (size_t j = 0; j < whole; j += LANES)
        for (int i = 0; i < LANES; i++)
            sums[i] += out[j + i] = OF(exp2_of)((x[j + i] - most) * OCTAVE);
    for (size_t j = whole; j < n; j++)
        sum += out[j] = OF(exp2_of)((x[j] - most) * OCTAVE);
    for (int i = 0; i < LANES; i++)
        sum += sums[i];
    for (size_t j = 0; j < n; j++)
        out[j] *= 1 / sum;
}

/* Blocks of n values, each value `inner` places from the next; inner blocks lie between. */
TARGET static int OF(softmax)(const float *x, long outer, long n, long inner, float *out)
{
    _Alignas(64) float best[COLUMNS], sums[COLUMNS];
    if (n < 1)
        return DONE;
    for (; outer-- > 0; x += n * inner, out += n * inner) {
        if (inner == 1) {
            OF(softmax_beside)(x, n, out);
            continue;
        }
        for (long first = 0; first < inner; first += COLUMNS) {
            const int columns = inner - first < COLUMNS ? (int)(inner - first) : COLUMNS;
            memcpy(best, x + first, columns * sizeof(float));
            memset(sums, 0, sizeof(sums));
            for (long k = 1; k < n; k++) {
                const float *restrict own = x + k * inner + first;
                for (int i = 0; i < columns; i++)
                    best[i] = own[i] > best[i] ? own[i] : best[i];
            }
            for (long k = 0; k < n; k++) {
                const float *restrict own = x + k * inner + first;
                float *restrict to = out + k * inner + first;
                for (int i = 0; i < columns; i++)
                    sums[i] += to[i] = OF(exp2_of)((own[i] - best[i]) * OCTAVE);
            }
            for (int i = 0; i < columns; i++)
                sums[i] = 1 / sums[i];
            for (long k = 0; k < n; k++) {
                float *restrict to = out + k * inner + first;
                for (int i = 0; i < columns; i++)
                    to[i] *= sums[i];
            }
        }
    }
    return DONE;
}
