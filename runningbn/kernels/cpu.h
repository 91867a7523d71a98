/* What a call says, and what the rooms of cpu.c share. Shapes and equations are those of kernels/__init__.py.

   REAL is the dtype of the statistics: float for float and bfloat16 data, double for double data. All sums are double.

   The fields of Forward and Backward are 8 bytes each, in the order in which cpu.py packs them. */

#ifndef RUNNINGBN_CPU_H
#define RUNNINGBN_CPU_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT, BFLOAT16, DOUBLE };                           /* dtype */
enum { CONSTANT, CUMULATIVE, HORIZON, SQUARE_ROOT, GIVEN }; /* rule */
enum { SUMS = 1, ABSORB = 2, APPLY = 4 };                   /* stages */

typedef struct {
    int64_t dtype, stages, threads;
    int64_t rows; /* whether x is (outer, channels) rather than (outer, channels, inner) */
    int64_t outer, channels, inner;
    const void *x;
    void *y;
    const void *weight, *bias; /* REAL, or NULL */
    double eps;
    /* The law.Law, in its order. */
    double max_lag, lag_noise, trust_noise, window, variance_floor, warmup_samples;
    /* The sums of the batch: results of SUMS, or arguments of ABSORB without it; NULL if nobody asks. REAL. */
    void *batch_shift, *batch_sums, *batch_sqrs, *batch_count;
    /* What x is normalised by: results of ABSORB or SUMS, or arguments of APPLY alone; `var` or `rstd` may be NULL. */
    void *mean, *var, *rstd, *kappa_mean, *kappa_var, *trust, *offset, *batch_std;
    /* The update. Without ABSORB the following are not looked at. */
    int64_t running, absorbs, whole_batches, rule;
    double rule_arguments[3];
    const void *batch_weight; /* REAL, for GIVEN */
    double samples_of_batch;
    /* The state, see statistics.State. */
    void *shift, *sums, *sqrs, *count, *count_sqrs, *debias, *samples, *steps, *running_mean, *running_var;
    int64_t *num_batches_tracked;
    void *last_keep, *last_gain;
    /* With running gradients, a statistics.NoiseState; otherwise NULL. */
    void *noise, *noise_steps, *last_mean;
} Forward;

typedef struct {
    int64_t dtype, stages, threads, rows, outer, channels, inner;
    const void *dy, *x;
    void *dx;
    const void *weight, *mean, *rstd;    /* REAL; weight may be NULL */
    void *batch_sum_dy, *batch_sum_dy_xhat; /* results of SUMS, or arguments of ABSORB without it. REAL. */
    /* dx = weight·rstd·(dy − m0 − z·m1). With running means, m0 and m1 are results of ABSORB, unless NULL; without
       them they are arguments, or where NULL kappa times the sums of the batch; kappa NULL is 1/n. */
    void *m0, *m1;
    const void *kappa_mean, *kappa_var;
    void *sum_dy, *sum_dy_xhat, *count_dy; /* the running sums, see statistics.GradientState; or NULL */
    const void *trust, *offset, *batch_std;
    const void *pooled_count; /* elements per channel over all ranks, or NULL: then as here */
} Backward;

/* Scratch of one call: vectors over channels, or over `columns` of widened rows, see `widening` in cpu.c. */
typedef struct {
    double *pivot;         /* what the sums are about */
    double *first, *second; /* the two sums, `parts` times `columns` */
    double *weight;        /* a per channel */
    void *centre, *scale, *slope, *base; /* REAL, for the map */
    int64_t columns, repeats, parts;
} Scratch;

/* The loops over the data for one instruction set and dtype. Forward: `dy` and `dx` are NULL. */
typedef struct {
    void (*planes_sums)(const void *dy, const void *x, const double *pivot, int64_t channels, int64_t inner,
                        int64_t outer_begin, int64_t outer_end, int64_t begin, int64_t end, int64_t inner_begin,
                        int64_t inner_end, double *first, double *second);
    void (*rows_sums)(const void *dy, const void *x, const double *pivot, int64_t columns, int64_t begin, int64_t end,
                      double *first, double *second);
    void (*planes_map)(const void *dy, const void *x, void *out, const Scratch *scratch, int64_t channels,
                       int64_t inner, int64_t outer_begin, int64_t outer_end, int64_t begin, int64_t end,
                       int64_t inner_begin, int64_t inner_end);
    void (*rows_map)(const void *dy, const void *x, void *out, const Scratch *scratch, int64_t columns, int64_t begin,
                     int64_t end);
    void (*pivots)(const void *x, int64_t channels, int64_t stride, int64_t middle, int64_t last, double *pivot);
    void (*finish_forward)(const Forward *f, const Scratch *scratch, int64_t begin, int64_t end);
    void (*finish_backward)(const Backward *b, const Scratch *scratch, int64_t begin, int64_t end);
    int64_t element_size;
} Loops;

#endif
