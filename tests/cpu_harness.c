/* The kernels of cpu.c by themselves, on threads of their own and on memory that ends where the data end, for the
   sanitizers of a compiler. Results are only looked at for what nobody wrote. */

#include "cpu.h"
#include "cpu_sixteen_bits.h"

#include <pthread.h>
#include <stdio.h>

typedef struct {
    Task task;
    int64_t index;
    void *context;
} Share;

static void *work(void *share_) {
    const Share *share = share_;
    share->task(share->index, share->index + 1, share->context);
    return NULL;
}

/* A thread for every index. */
static int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, Task task, void *context) {
    pthread_t threads[8];
    Share shares[8];
    (void)grain;
    for (int64_t i = begin; i < end; i++) {
        shares[i - begin] = (Share){task, i, context};
        if (pthread_create(&threads[i - begin], NULL, work, &shares[i - begin])) abort();
    }
    for (int64_t i = begin; i < end; i++) pthread_join(threads[i - begin], NULL);
    return 0;
}

/* Where numbers lie, behind some bytes that are not theirs. */
typedef struct {
    char *memory;
    void *data;
} Numbers;

static const int64_t SIZES[] = {4, 2, 2, 8};
static uint64_t seed = 1;

static void set(void *data, int64_t dtype, int64_t i, double value) {
    const float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    if (dtype == FLOAT32) ((float *)data)[i] = narrow;
    if (dtype == BFLOAT16) ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
    if (dtype == FLOAT16) ((uint16_t *)data)[i] = to_float16(narrow);
    if (dtype == FLOAT64) ((double *)data)[i] = value;
}

static double get(const void *data, int64_t dtype, int64_t i) {
    if (dtype == FLOAT32) return (double)((const float *)data)[i];
    if (dtype == FLOAT64) return ((const double *)data)[i];
    if (dtype == FLOAT16) return (double)from_float16(((const uint16_t *)data)[i]);
    const uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* In [0, 1), which a weight may be. */
static double drawn(void) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 40) / (1 << 24);
}

static Numbers numbers(int64_t count, int64_t dtype, int64_t gap, int draws, double value) {
    Numbers made = {malloc((size_t)(count * SIZES[dtype] + gap)), NULL};
    if (!made.memory) abort();
    made.data = made.memory + gap;
    for (int64_t i = 0; i < count; i++) set(made.data, dtype, i, draws ? drawn() : value);
    return made;
}

static int written(const char *name, Numbers values, int64_t count, int64_t dtype) {
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(get(values.data, dtype, i))) {
            fprintf(stderr, "%s: element %lld of %lld is not finite\n", name, (long long)i, (long long)count);
            return 1;
        }
    return 0;
}

enum { VECTORS = 36 };

/* A forward and its backward. running: 0 for statistics of the batch, 1 for running ones, 2 for running sums, too. */
static int step(int64_t dtype, int64_t rows, int64_t outer, int64_t channels, int64_t inner, int64_t threads,
                int64_t running, int64_t rule, int affine, int64_t gap) {
    const int64_t real = dtype == FLOAT64 ? FLOAT64 : FLOAT32, count = outer * channels * inner;
    Numbers x = numbers(count, dtype, gap, 1, 0), dy = numbers(count, dtype, gap, 1, 0);
    Numbers y = numbers(count, dtype, gap, 0, NAN), dx = numbers(count, dtype, gap, 0, NAN);
    Numbers v[VECTORS];
    /* The first fourteen are results; the state is empty but for a variance of 1; 30 and 31 are weight and bias; 32 to
       34 are a NoiseState. */
    for (int i = 0; i < VECTORS; i++)
        v[i] = numbers(channels, real, 0, i == 30 || i == 31, i < 14 ? NAN : i == 25 ? 1 : 0);
    /* In every other channel as after many batches without noise, with which limits are near. */
    for (int64_t c = 0; c < channels; c++) set(v[33].data, real, c, c % 2 ? 50 : 0);
    const int exact = running == 1, limited = running == 2;
    int64_t *tracked = malloc(sizeof *tracked);
    if (!tracked) abort();
    *tracked = 0;
    const Forward forward = {
        .dtype = dtype, .stages = SUMS | UPDATE | APPLY, .threads = threads, .rows = rows, .outer = outer,
        .channels = channels, .inner = inner, .x = x.data, .y = y.data, .weight = affine ? v[30].data : NULL,
        .bias = affine ? v[31].data : NULL, .eps = 1e-5, .batch_shift = v[0].data, .batch_sums = v[1].data,
        .batch_sqrs = v[2].data, .batch_count = v[3].data, .mean = v[4].data, .var = v[5].data, .rstd = v[6].data,
        .max_lag = affine ? 0.05 : INFINITY, .lag_noise = 512, .trust_noise = 64, .window = 100,
        .variance_floor = 0.01, .warmup_samples = 20,
        .kappa_mean = exact ? v[7].data : NULL, .kappa_var = exact ? v[8].data : NULL,
        .trust = limited ? v[9].data : NULL, .offset = limited ? v[10].data : NULL,
        .batch_std = limited ? v[13].data : NULL, .noise = limited ? v[32].data : NULL,
        .noise_steps = limited ? v[33].data : NULL, .last_mean = limited ? v[34].data : NULL,
        .by_state = running != 0, .updates = 1, .whole_batches = rule == HORIZON, .rule = rule,
        .rule_first = rule == HORIZON ? 128 : 0.1, .rule_second = 8, .rule_third = 0.05, .batch_weight = v[30].data,
        .batch_samples = (double)outer, .shift = v[16].data, .sums = v[17].data, .sqrs = v[18].data,
        .count = v[19].data, .count_sqrs = v[20].data, .debias = v[21].data, .samples = v[22].data,
        .steps = v[23].data, .running_mean = v[24].data, .running_var = v[25].data, .num_batches_tracked = tracked,
        .last_keep = v[26].data, .last_gain = v[14].data};
    const Backward backward = {
        .dtype = dtype, .stages = SUMS | APPLY | (running == 2 ? UPDATE : 0), .threads = threads, .rows = rows,
        .outer = outer, .channels = channels, .inner = inner, .dy = dy.data, .x = x.data, .dx = dx.data,
        .weight = forward.weight, .mean = v[4].data, .rstd = v[6].data, .batch_sum_dy = v[11].data,
        .batch_sum_dy_xhat = v[12].data, .kappa_mean = running == 1 ? v[7].data : NULL,
        .kappa_var = running == 1 ? v[8].data : NULL, .sum_dy = running == 2 ? v[27].data : NULL,
        .sum_dy_xhat = running == 2 ? v[28].data : NULL, .count_dy = running == 2 ? v[29].data : NULL,
        .trust = forward.trust, .offset = forward.offset, .batch_std = forward.batch_std};
    /* The same once more without an update, as in a recomputation, and the sums alone. */
    Forward again = forward;
    Backward sums_alone = backward;
    again.updates = 0, sums_alone.stages &= ~APPLY, sums_alone.dx = NULL;
    int failed = runningbn_forward(&forward) || runningbn_forward(&again) || runningbn_backward(&backward) ||
                 runningbn_backward(&sums_alone);
    failed |= written("y", y, count, dtype) | written("dx", dx, count, dtype);
    for (int i = 0; i < (exact ? 9 : 7); i++) failed |= written("forward", v[i], channels, real);
    for (int i = 9; limited && i < 11; i++) failed |= written("forward", v[i], channels, real);
    if (limited) failed |= written("forward", v[13], channels, real);
    for (int i = 11; i < 13; i++) failed |= written("backward", v[i], channels, real);
    for (int i = 14; i < VECTORS; i++) failed |= written("state", v[i], channels, real);
    if (*tracked != 1) failed = 1, fprintf(stderr, "batches tracked: %lld\n", (long long)*tracked);
    if (failed)
        fprintf(stderr, "dtype %d rows %d (%d, %d, %d) threads %d running %d rule %d\n", (int)dtype, (int)rows,
                (int)outer, (int)channels, (int)inner, (int)threads, (int)running, (int)rule);
    free(x.memory), free(dy.memory), free(y.memory), free(dx.memory), free(tracked);
    for (int i = 0; i < VECTORS; i++) free(v[i].memory);
    return failed;
}

int main(void) {
    /* outer, channels, inner; inner = 0 for rows. From 2**16 elements on three threads take part. */
    static const int64_t shapes[][3] = {
        {1, 5, 0},  {2, 1, 0},    {7, 37, 0},     {130, 3, 0},    {33, 65, 0},  {22001, 3, 0}, {1100, 65, 0},
        {300, 260, 0}, {1, 3, 1}, {5, 37, 2},     {4, 65, 49},    {9, 1, 16},   {2, 3, 3136},  {1, 1, 70001},
        {13, 2, 2701}, {1, 4, 17501}, {1, 67, 1000}, {2, 2, 17501}, {2, 700, 49},
    };
    static const char *const sets[] = {"baseline", "avx2", "avx512"};
    int failures = 0, steps = 0;
    for (int s = 0; s < 3; s++) {
        if (strcmp(runningbn_initialize(parallel_for, sets[s]), sets[s])) continue;
        for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
            for (int64_t dtype = FLOAT32; dtype <= FLOAT64; dtype++)
                for (int64_t threads = 1; threads <= 3; threads++) {
                    const int64_t *shape = shapes[k], rows = shape[2] == 0, running = steps % 3;
                    failures += step(dtype, rows, shape[0], shape[1], rows ? 1 : shape[2], threads, running,
                                     steps / 3 % 5, steps % 2, steps / 2 % 2 ? SIZES[dtype] : 0);
                    steps += 1;
                }
    }
    return failures != 0;
}
