/* The loops over the data. Included once for every instruction set and dtype, with

       NAME(name)  the function's name there
       TARGET      the function attribute that selects the instruction set
       LANES       doubles per vector register
       ELEMENT, REAL, LOAD(p), STORE(p, value), LOAD_VECTOR(p)
       SINGLE_RUNS whether runs of RUN additions to a channel are in float, for data of few digits
       SINGLE_ROWS whether those over the ROWS of a block are; then with
       FLOATS, LOAD_FLOATS(p), LOW(v), HIGH(v), FLOATS_OF(low, high): 2 LANES floats, their halves as doubles, and back
       STORE_FLOATS(p, v), FLOATS_OF_FLOATS(p) where compilers do not vectorise STORE well, and then MAP_VECTORS is 1

   What depends on the dtype is undefined at the end, for the next.

   The equations in plain torch: kernels/aten.py, `batch_sums`, `normalize`, `gradient_sums` and `input_gradient`, each
   in its branch for compilers.

   Sums are taken in double, about a pivot: no run of additions is long enough, and no mean far enough, to matter. Where
   conversions would take longer than the memory, at most 16 additions to an accumulator are in float first.
   Several accumulators hide the latency of an addition. */

typedef double NAME(vector) __attribute__((vector_size(8 * LANES), aligned(8), may_alias));
#define VECTOR NAME(vector)

/* Channels by themselves, each of them some rows of `inner` consecutive elements. For every outer index the channels
   begin to end are consecutive in memory, so that is the order; each channel has its accumulators in `first` and
   `second` afterwards. At most GROUP channels at a time. */
TARGET static void NAME(planes_sums)(const void *dy_, const void *x_, const double *pivot, int64_t channels,
                                     int64_t inner, int64_t outer_begin, int64_t outer_end, int64_t begin, int64_t end,
                                     int64_t inner_begin, int64_t inner_end, double *first, double *second) {
    const ELEMENT *dy = dy_, *x = x_;
    VECTOR partial_first[GROUP], partial_second[GROUP];
    memset(partial_first, 0, sizeof(VECTOR) * (size_t)(end - begin));
    memset(partial_second, 0, sizeof(VECTOR) * (size_t)(end - begin));
    for (int64_t c = begin; c < end; c++) first[c] = second[c] = 0;
    for (int64_t n = outer_begin; n < outer_end; n++)
        for (int64_t c = begin; c < end; c++) {
            const int64_t row = (n * channels + c) * inner, count = inner_end - inner_begin;
            const ELEMENT *restrict xs = x + row + inner_begin;
            const double p = pivot[c];
            VECTOR s0 = partial_first[c - begin], q0 = partial_second[c - begin];
            VECTOR s1 = {0}, s2 = {0}, s3 = {0}, q1 = {0}, q2 = {0}, q3 = {0};
            double s = 0, q = 0;
            int64_t i = 0;
            if (dy) {
                const ELEMENT *restrict gs = dy + row + inner_begin;
#if SINGLE_RUNS
                while (i + 8 * LANES <= count) {
                    FLOATS a0 = NO_FLOATS, a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
                    const int64_t stop = END_OF_RUN(i, count);
                    for (; i < stop; i += 8 * LANES) {
#define TERM(k)                                                          \
    {                                                                    \
        const FLOATS g = LOAD_FLOATS(gs + i + 2 * k * LANES);            \
        a##k += g;                                                       \
        b##k += g * (LOAD_FLOATS(xs + i + 2 * k * LANES) - (float)p);    \
    }
                        TERM(0) TERM(1) TERM(2) TERM(3)
#undef TERM
                    }
                    a0 = (a0 + a1) + (a2 + a3), b0 = (b0 + b1) + (b2 + b3);
                    s0 += LOW(a0), s1 += HIGH(a0), q0 += LOW(b0), q1 += HIGH(b0);
                }
#endif
#define TERM(k)                                                                          \
    {                                                                                    \
        const VECTOR g = LOAD_VECTOR(gs + i + k * LANES);                                \
        s##k += g;                                                                       \
        q##k += g * (LOAD_VECTOR(xs + i + k * LANES) - p);                               \
    }
                for (; i + 4 * LANES <= count; i += 4 * LANES) { TERM(0) TERM(1) TERM(2) TERM(3) }
                for (; i + LANES <= count; i += LANES) TERM(0)
#undef TERM
                for (; i < count; i++) {
                    const double g = (double)LOAD(gs + i);
                    s += g;
                    q += g * ((double)LOAD(xs + i) - p);
                }
            } else {
#if SINGLE_RUNS
                while (i + 8 * LANES <= count) {
                    FLOATS a0 = NO_FLOATS, a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
                    const int64_t stop = END_OF_RUN(i, count);
                    for (; i < stop; i += 8 * LANES) {
#define TERM(k)                                                                \
    {                                                                          \
        const FLOATS d = LOAD_FLOATS(xs + i + 2 * k * LANES) - (float)p;       \
        a##k += d;                                                             \
        b##k += d * d;                                                         \
    }
                        TERM(0) TERM(1) TERM(2) TERM(3)
#undef TERM
                    }
                    a0 = (a0 + a1) + (a2 + a3), b0 = (b0 + b1) + (b2 + b3);
                    s0 += LOW(a0), s1 += HIGH(a0), q0 += LOW(b0), q1 += HIGH(b0);
                }
#endif
#define TERM(k)                                                    \
    {                                                              \
        const VECTOR d = LOAD_VECTOR(xs + i + k * LANES) - p;      \
        s##k += d;                                                 \
        q##k += d * d;                                             \
    }
                for (; i + 4 * LANES <= count; i += 4 * LANES) { TERM(0) TERM(1) TERM(2) TERM(3) }
                for (; i + LANES <= count; i += LANES) TERM(0)
#undef TERM
                for (; i < count; i++) {
                    const double d = (double)LOAD(xs + i) - p;
                    s += d;
                    q += d * d;
                }
            }
            partial_first[c - begin] = (s0 + s1) + (s2 + s3);
            partial_second[c - begin] = (q0 + q1) + (q2 + q3);
            first[c] += s;
            second[c] += q;
        }
    for (int64_t c = begin; c < end; c++)
        for (int k = 0; k < LANES; k++) {
            first[c] += partial_first[c - begin][k];
            second[c] += partial_second[c - begin][k];
        }
}

/* Columns side by side. A block of rows is read strip by strip, so that the accumulators of a strip stay in registers
   over the block while memory is still read along ROWS streams. More streams than processors expect: the strip below is
   fetched meanwhile. */
#define FETCH(p) __builtin_prefetch(p), __builtin_prefetch((const char *)(p) + CACHE_LINE);
TARGET static void NAME(rows_sums)(const void *dy_, const void *x_, const double *pivot, int64_t columns,
                                   int64_t begin, int64_t end, double *first, double *second) {
    const ELEMENT *dy = dy_, *x = x_;
    for (int64_t c = 0; c < columns; c++) first[c] = second[c] = 0;
    for (int64_t top = begin; top < end; top += ROWS) {
        const int64_t bottom = top + ROWS < end ? top + ROWS : end;
        int64_t c = 0;
        for (; c + 4 * LANES <= columns; c += 4 * LANES) {
            VECTOR *s = (VECTOR *)(first + c), *q = (VECTOR *)(second + c);
            const VECTOR *p = (const VECTOR *)(pivot + c);
#if SINGLE_ROWS
            const FLOATS p0 = FLOATS_OF(p[0], p[1]), p1 = FLOATS_OF(p[2], p[3]);
            FLOATS a0 = NO_FLOATS, a1 = a0, b0 = a0, b1 = a0;
            for (int64_t r = top; r < bottom; r++) {
                const ELEMENT *xs = x + r * columns + c, *gs = dy ? dy + r * columns + c : xs;
                FETCH(xs + ROWS * columns)
                if (dy) FETCH(gs + ROWS * columns)
                const FLOATS d0 = LOAD_FLOATS(xs) - p0, d1 = LOAD_FLOATS(xs + 2 * LANES) - p1;
                const FLOATS g0 = dy ? (FLOATS)LOAD_FLOATS(gs) : d0, g1 = dy ? (FLOATS)LOAD_FLOATS(gs + 2 * LANES) : d1;
                a0 += g0, a1 += g1, b0 += g0 * d0, b1 += g1 * d1;
            }
            s[0] += LOW(a0), s[1] += HIGH(a0), s[2] += LOW(a1), s[3] += HIGH(a1);
            q[0] += LOW(b0), q[1] += HIGH(b0), q[2] += LOW(b1), q[3] += HIGH(b1);
#else
            VECTOR s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], q0 = q[0], q1 = q[1], q2 = q[2], q3 = q[3];
            if (dy) {
                for (int64_t r = top; r < bottom; r++) {
                    const ELEMENT *xs = x + r * columns + c, *gs = dy + r * columns + c;
#define TERM(k)                                                \
    {                                                          \
        const VECTOR g = LOAD_VECTOR(gs + k * LANES);          \
        s##k += g;                                             \
        q##k += g * (LOAD_VECTOR(xs + k * LANES) - p[k]);      \
    }
                    TERM(0) TERM(1) TERM(2) TERM(3)
#undef TERM
                }
            } else {
                for (int64_t r = top; r < bottom; r++) {
                    const ELEMENT *xs = x + r * columns + c;
#define TERM(k)                                                \
    {                                                          \
        const VECTOR d = LOAD_VECTOR(xs + k * LANES) - p[k];   \
        s##k += d;                                             \
        q##k += d * d;                                         \
    }
                    TERM(0) TERM(1) TERM(2) TERM(3)
#undef TERM
                }
            }
            s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3, q[0] = q0, q[1] = q1, q[2] = q2, q[3] = q3;
#endif
        }
        for (; c + LANES <= columns; c += LANES) {
            VECTOR *s = (VECTOR *)(first + c), *q = (VECTOR *)(second + c);
            const VECTOR p = *(const VECTOR *)(pivot + c);
            for (int64_t r = top; r < bottom; r++) {
                const VECTOR d = LOAD_VECTOR(x + r * columns + c) - p;
                const VECTOR g = dy ? (VECTOR)LOAD_VECTOR(dy + r * columns + c) : d;
                *s += g;
                *q += g * d;
            }
        }
        for (; c < columns; c++)
            for (int64_t r = top; r < bottom; r++) {
                const double d = (double)LOAD(x + r * columns + c) - pivot[c];
                const double g = dy ? (double)LOAD(dy + r * columns + c) : d;
                first[c] += g;
                second[c] += g * d;
            }
    }
}

/* out = (x − centre)·slope + base, and with dy, + dy·scale. */
TARGET static void NAME(planes_map)(const void *dy_, const void *x_, void *out_, const Scratch *scratch,
                                    int64_t channels, int64_t inner, int64_t outer_begin, int64_t outer_end,
                                    int64_t begin, int64_t end, int64_t inner_begin, int64_t inner_end) {
    const ELEMENT *dy = dy_, *x = x_;
    ELEMENT *out = out_;
    /* Samples backwards: what the sums have read last is still in cache. */
    for (int64_t n = outer_end - 1; n >= outer_begin; n--)
        for (int64_t c = begin; c < end; c++) {
            const int64_t row = (n * channels + c) * inner + inner_begin, count = inner_end - inner_begin;
            const ELEMENT *restrict xs = x + row;
            ELEMENT *restrict outs = out + row;
            const REAL centre = ((const REAL *)scratch->centre)[c], slope = ((const REAL *)scratch->slope)[c];
            const REAL base = ((const REAL *)scratch->base)[c];
            const ELEMENT *restrict gs = dy ? dy + row : NULL;
            const REAL scale = dy ? ((const REAL *)scratch->scale)[c] : 0;
            int64_t done = 0;
#if MAP_VECTORS
            for (; done + 2 * LANES <= count; done += 2 * LANES) {
                FLOATS y = (LOAD_FLOATS(xs + done) - centre) * slope + base;
                if (dy) y += LOAD_FLOATS(gs + done) * scale;
                STORE_FLOATS(outs + done, y);
            }
#endif
            if (dy) {
#pragma omp simd
                for (int64_t i = done; i < count; i++)
                    STORE(outs + i, LOAD(gs + i) * scale + ((LOAD(xs + i) - centre) * slope + base));
            } else {
#pragma omp simd
                for (int64_t i = done; i < count; i++) STORE(outs + i, (LOAD(xs + i) - centre) * slope + base);
            }
        }
}

TARGET static void NAME(rows_map)(const void *dy_, const void *x_, void *out_, const Scratch *scratch, int64_t columns,
                                  int64_t begin, int64_t end) {
    const REAL *restrict centre = scratch->centre, *restrict slope = scratch->slope, *restrict base = scratch->base;
    const REAL *restrict scale = scratch->scale;
    for (int64_t r = begin; r < end; r++) {
        const ELEMENT *restrict xs = (const ELEMENT *)x_ + r * columns;
        ELEMENT *restrict outs = (ELEMENT *)out_ + r * columns;
        const ELEMENT *restrict gs = dy_ ? (const ELEMENT *)dy_ + r * columns : NULL;
        int64_t done = 0;
#if MAP_VECTORS
        for (; done + 2 * LANES <= columns; done += 2 * LANES) {
            const FLOATS deviation = LOAD_FLOATS(xs + done) - FLOATS_OF_FLOATS(centre + done);
            FLOATS y = deviation * FLOATS_OF_FLOATS(slope + done) + FLOATS_OF_FLOATS(base + done);
            if (gs) y += LOAD_FLOATS(gs + done) * FLOATS_OF_FLOATS(scale + done);
            STORE_FLOATS(outs + done, y);
        }
#endif
        if (gs) {
#pragma omp simd
            for (int64_t c = done; c < columns; c++)
                STORE(outs + c, LOAD(gs + c) * scale[c] + ((LOAD(xs + c) - centre[c]) * slope[c] + base[c]));
        } else {
#pragma omp simd
            for (int64_t c = done; c < columns; c++) STORE(outs + c, (LOAD(xs + c) - centre[c]) * slope[c] + base[c]);
        }
    }
}

/* The median of three elements of each channel, at 0, `middle` and `last`: one outlier does not make a pivot. */
TARGET static void NAME(pivots)(const void *x_, int64_t channels, int64_t stride, int64_t middle, int64_t last,
                                double *pivot) {
    const ELEMENT *x = x_;
    for (int64_t c = 0; c < channels; c++) {
        const double a = (double)LOAD(x + c * stride), b = (double)LOAD(x + c * stride + middle);
        const double z = (double)LOAD(x + c * stride + last);
        const double low = a < b ? a : b, high = a < b ? b : a;
        pivot[c] = z < low ? low : z > high ? high : z;
    }
}

static const Loops NAME(loops) = {
    NAME(planes_sums), NAME(rows_sums), NAME(planes_map), NAME(rows_map), NAME(pivots),
    STATE_NAME(finish_forward), STATE_NAME(finish_backward), sizeof(ELEMENT),
};
#undef VECTOR
#undef DTYPE
#undef SINGLE_RUNS
#undef SINGLE_ROWS
#undef MAP_VECTORS
#undef STORE_FLOATS
#undef FETCH
#undef LOAD_FLOATS
#undef ELEMENT
#undef LOAD
#undef STORE
#undef LOAD_VECTOR
