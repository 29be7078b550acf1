/* Pixels of 8 bits to a model's numbers: n values of each row times a scale, plus a shift. */

TARGET static int OF(feed)(const uint8_t *values, long of_row, int rows, long n, const float *scale,
                           const float *shift, float *restrict out, long of_out)
{
    for (int y = 0; y < rows; y++, values += of_row, out += of_out)
        for (long i = 0; i < n; i++)
            out[i] = shift[i] + values[i] * scale[i];
    return DONE;
}
