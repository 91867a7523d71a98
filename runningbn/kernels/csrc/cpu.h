/* The arguments of a call, and what the parts of cpu.c share. Shapes and equations are those of contract.py.

   REAL is the dtype of the statistics: double for double data, float for all other. All sums are double.

   Codes and fields are listed by macros, from which the names come that cpu_library.py compares with its own when it
   loads the library. Every field is 8 bytes: I an integer, P a pointer, R a double. */

#ifndef RUNNINGBN_CPU_H
#define RUNNINGBN_CPU_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* In the order of their codes. */
#define DTYPES(X) X(FLOAT32) X(BFLOAT16) X(FLOAT16) X(FLOAT64)
#define RULES(X) X(CONSTANT) X(CUMULATIVE) X(HORIZON) X(SQUARE_ROOT) X(GIVEN)
/* See operators.c. */
#define OPERATORS(X)                                          \
    X(forward_batch) X(forward_exact) X(forward_running)      \
    X(backward_batch) X(backward_exact) X(backward_running)
#define AS_ENUM(name) name,
enum { DTYPES(AS_ENUM) };
enum { RULES(AS_ENUM) };
/* Bits. */
#define STAGES(X) X(SUMS) X(UPDATE) X(APPLY)
#define AS_PLACE(name) PLACE_OF_##name,
#define AS_BIT(name) name = 1 << PLACE_OF_##name,
enum { STAGES(AS_PLACE) };
enum { STAGES(AS_BIT) };

/* - `rows`: whether x is (outer, channels) rather than (outer, channels, inner).
   - `weight`, `bias`: REAL, or NULL.
   - From `max_lag` on: the law.Law.
   - From `batch_shift` on: the sums of the batch: results of SUMS, or arguments of UPDATE without it; NULL if they
     are not needed. REAL.
   - From `mean` on: what x is normalised by, and the spec.Coefficients: results of UPDATE or SUMS, or arguments of
     APPLY alone; NULL if they are not needed.
   - From `by_state` on: the update. Without UPDATE it is not looked at. `updates` is 0 in a recomputation.
   - `batch_weight`: REAL, for GIVEN.
   - From `shift` on: the state.State. `num_batches_tracked` is one int64, all others are REAL.
   - From `noise` on: with running gradients the state.NoiseState, otherwise NULL. */
#define FORWARD_FIELDS(I, P, R)                                                                                   \
    I(dtype) I(stages) I(threads) I(rows) I(outer) I(channels) I(inner)                                           \
    P(x) P(y) P(weight) P(bias) R(eps)                                                                            \
    R(max_lag) R(lag_noise) R(trust_noise) R(window) R(variance_floor) R(warmup_samples)                          \
    P(batch_shift) P(batch_sums) P(batch_sqrs) P(batch_count)                                                     \
    P(mean) P(var) P(rstd) P(kappa_mean) P(kappa_var) P(trust) P(offset) P(batch_std)                             \
    I(by_state) I(updates) I(whole_batches) I(rule) R(rule_first) R(rule_second) R(rule_third)                    \
    P(batch_weight) R(batch_samples)                                                                              \
    P(shift) P(sums) P(sqrs) P(count) P(count_sqrs) P(debias) P(samples) P(steps) P(running_mean) P(running_var)  \
    P(num_batches_tracked) P(last_keep) P(last_gain)                                                              \
    P(noise) P(noise_steps) P(last_mean)

/* - `weight`, `mean`, `rstd`: REAL; `weight` may be NULL.
   - `batch_sum_dy`, `batch_sum_dy_xhat`: results of SUMS, or arguments of UPDATE without it. REAL.
   - `m0`, `m1`: dx = weight·rstd·(dy − m0 − z·m1). With running means they are results of UPDATE, unless NULL; without,
     they are arguments, or where NULL kappa times the sums of the batch; kappa NULL is 1/n.
   - From `sum_dy` on: the state.GradientState, or NULL.
   - `pooled_count`: elements per channel over all ranks, or NULL: then as here. */
#define BACKWARD_FIELDS(I, P, R)                                                                                  \
    I(dtype) I(stages) I(threads) I(rows) I(outer) I(channels) I(inner)                                           \
    P(dy) P(x) P(dx) P(weight) P(mean) P(rstd) P(batch_sum_dy) P(batch_sum_dy_xhat)                               \
    P(m0) P(m1) P(kappa_mean) P(kappa_var) P(sum_dy) P(sum_dy_xhat) P(count_dy)                                   \
    P(trust) P(offset) P(batch_std) P(pooled_count)

#define INTEGER_FIELD(name) int64_t name;
#define POINTER_FIELD(name) void *name;
#define DOUBLE_FIELD(name) double name;
typedef struct {
    FORWARD_FIELDS(INTEGER_FIELD, POINTER_FIELD, DOUBLE_FIELD)
} Forward;
typedef struct {
    BACKWARD_FIELDS(INTEGER_FIELD, POINTER_FIELD, DOUBLE_FIELD)
} Backward;

/* What comes before the map in a training step: an exact gradient needs no sums where the state is taken as it is. */
static inline int64_t stages_of_step(const Forward *f) {
    return (f->updates || !f->by_state || f->noise ? SUMS : 0) | (f->updates || f->by_state ? UPDATE : 0);
}

/* What other libraries call; see cpu.c. */
typedef void (*Task)(int64_t begin, int64_t end, void *context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Task task, void *context);
const char *runningbn_interface(void);
const char *runningbn_initialize(ParallelFor function, const char *most);
int runningbn_forward(const Forward *f);
int runningbn_backward(const Backward *b);

/* What cpu_library.py compares with its own, so that it never calls a library that was built from other sources. */
#define AS_NAME(name) #name " "
#define AS_INTEGER(name) "I:" #name " "
#define AS_POINTER(name) "P:" #name " "
#define AS_DOUBLE(name) "R:" #name " "
#define INTERFACE                                                                      \
    DTYPES(AS_NAME) RULES(AS_NAME) STAGES(AS_NAME) OPERATORS(AS_NAME)                  \
    FORWARD_FIELDS(AS_INTEGER, AS_POINTER, AS_DOUBLE) BACKWARD_FIELDS(AS_INTEGER, AS_POINTER, AS_DOUBLE)

/* Elements that each thread has to get: waking it for fewer costs more than it saves. Measured, the best of thousands
   of forwards on two cores: of 36864 elements 7.7 us on one thread and 8.4 us on two, of 73728 11.0 us and 8.6 us. */
#define LARGE (1 << 15)

/* Scratch of one call: vectors over channels, or over `columns` of widened rows, see `widening` in cpu.c. */
typedef struct {
    double *pivot;         /* what the sums are about */
    double *first, *second; /* the two sums, `parts` times `columns` */
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
