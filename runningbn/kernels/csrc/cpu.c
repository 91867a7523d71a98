/* Fused kernels for CPUs: the sums of a batch, the update of the state and the map over the batch while it is in cache.

   Plain C without headers of torch or Python, called through ctypes, so it is tied to no version of either; on torch's
   own threads, by torch's C function for that, which is handed over once. For a given number of threads all results
   are the same bit for bit: how the work is cut depends on nothing else.

   Here is what other libraries call, and how a call is prepared. cpu_dtypes.h makes, for each instruction set and
   dtype, the loops over the data, cpu_loops.h, and what is done between them for each channel, cpu_state.h and
   cpu_gradient.h; cpu_threads.h shares all that out among the threads. */

#include "cpu.h"
#include "cpu_sixteen_bits.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CACHE_LINE 64          /* bytes */
#define GROUP 64               /* channels at a time, at most */
#define GROUP_BYTES (1 << 18)  /* of data in them: half of a small core's cache, with as much for what comes out */
#define ROWS 16                /* of a block of `rows_sums`; additions in float to one accumulator, at most */
#define RUN 16                 /* additions in float to one accumulator, at most */
#define NARROW 256             /* rows with fewer columns are widened */

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define NAME(name) JOIN(name, ISA, DTYPE)
#define STATE_NAME(name) JOIN(name, ISA, REAL)

/* Where a run of float additions to four vectors of 2 LANES ends, whole steps from i. */
#define END_OF_RUN(i, count) \
    ((i) + ((count) - (i) < RUN * 8 * LANES ? ((count) - (i)) / (8 * LANES) * (8 * LANES) : RUN * 8 * LANES))

typedef double pair __attribute__((vector_size(16)));

#define ISA baseline
#define TARGET
#define LANES 2
#include "cpu_dtypes.h"

#if defined(__x86_64__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define LANES 4
#include "cpu_dtypes.h"

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))
#define LANES 8
#include "cpu_dtypes.h"
#endif

#include "cpu_threads.h"

static const Loops *const *loops = loops_baseline_all;
static const char *instruction_set = "baseline";

/* Told once: torch's parallel_for, and the most that may be used of the processor: "avx512", "avx2" or "baseline".
   Returns what is used. */
const char *runningbn_initialize(ParallelFor function, const char *most) {
    parallel_for = function;
    loops = loops_baseline_all, instruction_set = "baseline";
#if defined(__x86_64__)
    if (strcmp(most, "baseline") == 0) return instruction_set;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2"))
        loops = loops_avx2_all, instruction_set = "avx2";
    if (strcmp(most, "avx2") == 0) return instruction_set;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        loops = loops_avx512_all, instruction_set = "avx512";
#else
    (void)most;
#endif
    return instruction_set;
}

const char *runningbn_interface(void) { return INTERFACE; }

/* As many rows side by side as make whole vector strips of them, where one alone would leave lanes idle. */
static int64_t widening(const Job *job) {
    if (!job->rows || job->channels >= NARROW) return 1;
    int64_t a = job->channels, b = 32;
    while (b) {
        const int64_t rest = a % b;
        a = b, b = rest;
    }
    /* 32 / a rows are whole strips of the widest vectors. */
    int64_t repeats = 32 / a;
    while (repeats * job->channels < NARROW) repeats *= 2;
    return job->outer >= 4 * repeats ? repeats : 1;
}

static int execute(Job *job, int64_t dtype, int64_t threads) {
    Scratch *s = &job->scratch;
    job->loops = loops[dtype];
    const int64_t elements = job->outer * job->channels * job->inner;
    const int64_t most = job->stages & (SUMS | APPLY) && elements >= LARGE ? elements / LARGE : 1;
    job->threads = threads < most ? threads : most;
    s->repeats = widening(job);
    s->columns = s->repeats * job->channels;
    const int64_t share = (job->channels + job->threads - 1) / job->threads;
    const int balanced = share * job->threads * 5 <= job->channels * 6;
    const int64_t bytes = job->outer * job->inner * job->loops->element_size * (job->dy ? 2 : 1);
    job->group = bytes * GROUP <= GROUP_BYTES ? GROUP : bytes >= GROUP_BYTES ? 1 : GROUP_BYTES / bytes;
    /* Doubles: pivot, 2 sums a thread and 2 for left-over rows; and four vectors for the map. */
    const int64_t columns = (s->columns + 7) / 8 * 8;
    const int64_t sums = s->columns * (job->threads + 1);
    void *allocated = malloc(sizeof(double) * (size_t)(5 * columns + 2 * sums) + CACHE_LINE);
    if (!allocated) return 1;
    /* The map reads three of these vectors beside x: where each load takes two cache lines, it is half as fast. */
    double *memory = (double *)(((uintptr_t)allocated + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
    s->pivot = memory;
    s->centre = memory + columns, s->scale = memory + 2 * columns;
    s->slope = memory + 3 * columns, s->base = memory + 4 * columns;
    s->first = memory + 5 * columns, s->second = s->first + sums;
    if (job->stages & SUMS) {
        if (job->forward) {
            /* Of rows, elements of a channel are `channels` apart; of planes, some are next to each other. */
            const int64_t last = (job->outer - 1) * job->channels * job->inner + job->inner - 1;
            const int64_t middle = job->outer / 2 * job->channels * job->inner + job->inner / 2;
            job->loops->pivots(job->x, job->channels, job->inner, middle, last, s->pivot);
        } else if (dtype == FLOAT64) {
            memcpy(s->pivot, job->backward->mean, sizeof(double) * (size_t)job->channels);
        } else {
            for (int64_t c = 0; c < job->channels; c++) s->pivot[c] = ((const float *)job->backward->mean)[c];
        }
        for (int64_t i = 1; i < s->repeats; i++)
            memcpy(s->pivot + i * job->channels, s->pivot, sizeof(double) * (size_t)job->channels);
    }
    if (!(job->stages & (SUMS | APPLY)))
        finish(job, 0, job->channels);
    else if (!job->rows && balanced && job->stages & SUMS)
        run(job->threads, by_channels, job);
    else
        by_parts(job);
    free(allocated);
    return 0;
}

/* The stages of `f`, in order. Returns 0, or 1 if there was no memory, and then nothing has changed. */
int runningbn_forward(const Forward *f) {
    Job job = {.forward = f, .stages = f->stages, .rows = f->rows, .outer = f->outer, .channels = f->channels,
               .inner = f->inner, .x = f->x, .out = f->y};
    return execute(&job, f->dtype, f->threads);
}

int runningbn_backward(const Backward *b) {
    Job job = {.backward = b, .stages = b->stages, .rows = b->rows, .outer = b->outer, .channels = b->channels,
               .inner = b->inner, .dy = b->dy, .x = b->x, .out = b->dx};
    return execute(&job, b->dtype, b->threads);
}
