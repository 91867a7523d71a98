/* The updates of the state as operators of torch, for compiled code: what `ops/update.py` does, without Python.

   Through torch's stable C interface, without its headers: cpu_operators.py hands over the addresses of the functions,
   in the order of `Torch`. Arguments and results lie on a stack of 8 bytes each; tensors on it are handles, which
   belong to whoever takes them. The arguments have the order of the fields in cpu.h, since both are made of the same
   tables. */

#include <stdbool.h>
#include <stddef.h>

#include "cpu.h"

typedef void *Tensor;
typedef uint64_t Value;

typedef struct {
    int32_t (*get_data_ptr)(Tensor, void **);
    int32_t (*get_dtype)(Tensor, int32_t *);
    int32_t (*get_numel)(Tensor, int64_t *);
    int32_t (*is_contiguous)(Tensor, bool *);
    int32_t (*empty_strided)(int64_t dimensions, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, Tensor *out);
    int32_t (*delete_tensor)(Tensor);
    int32_t (*backward_running)(void); /* -1 outside of a backward pass */
    /* torch's way to raise a RuntimeError; it does not return. */
    void (*raise)(const char *function, const char *file, uint32_t line, const char *message);
} Torch;

enum { TORCH_FLOAT = 6, TORCH_DOUBLE = 7, TORCH_INT64 = 4, TORCH_CPU = 0 };

static Torch torch;

void runningbn_initialize_operators(const Torch *functions) { torch = *functions; }

/* The arguments of a call that are tensors, and their results. */
typedef struct {
    Value *stack;
    int64_t count, channels;
    int32_t dtype; /* of the statistics, torch's code */
} Call;

static const char NO_MEMORY[] = "no memory for the vectors over channels of a normalisation";

static void fail(const char *message) { torch.raise(__func__, __FILE__, __LINE__, message); }

/* The first tensor tells the channels and the dtype. */
static Call call_of(Value *stack, int64_t count) {
    Call call = {stack, count, 0, 0};
    const Tensor first = (Tensor)stack[0];
    if (torch.get_numel(first, &call.channels) || torch.get_dtype(first, &call.dtype)) fail("no size or dtype");
    if (call.dtype != TORCH_FLOAT && call.dtype != TORCH_DOUBLE) fail("expected float32 or float64");
    return call;
}

static int64_t code_of(const Call *call) { return call->dtype == TORCH_FLOAT ? FLOAT32 : FLOAT64; }

/* The address of a tensor's data, which has to be `numel` contiguous elements. */
static void *data_of(Tensor tensor, int64_t numel, int32_t dtype) {
    void *data = NULL;
    int64_t elements = 0;
    int32_t found = 0;
    bool contiguous = false;
    if (torch.get_numel(tensor, &elements) || torch.get_dtype(tensor, &found) ||
        torch.is_contiguous(tensor, &contiguous) || torch.get_data_ptr(tensor, &data))
        fail("a tensor has no memory");
    if (elements != numel || found != dtype || !contiguous || (numel && !data))
        fail("expected contiguous vectors over the channels, all of one dtype");
    return data;
}

/* Addresses of `count` vectors of the stack from `first` on, into consecutive fields of a call. */
static void set_vectors(const Call *call, int64_t first, int64_t count, void **fields) {
    for (int64_t i = 0; i < count; i++)
        fields[i] = data_of((Tensor)call->stack[first + i], call->channels, call->dtype);
}

static Tensor new_vector(const Call *call, void **data) {
    const int64_t one = 1;
    Tensor out = NULL;
    if (torch.empty_strided(1, &call->channels, &one, call->dtype, TORCH_CPU, 0, &out) || torch.get_data_ptr(out, data))
        fail(NO_MEMORY);
    return out;
}

static void leave(const Call *call, const Tensor *results, int64_t count) {
    for (int64_t i = 0; i < call->count; i++) torch.delete_tensor((Tensor)call->stack[i]);
    for (int64_t i = 0; i < count; i++) call->stack[i] = (Value)(uintptr_t)results[i];
}

static double real(Value value) {
    double result;
    memcpy(&result, &value, sizeof result);
    return result;
}

/* How many fields of a struct lie from one to another, both included. All have 8 bytes. */
#define FIELDS(type, first, last) ((int64_t)(offsetof(type, last) - offsetof(type, first)) / 8 + 1)
enum { MOST_RESULTS = 8 };

/* (State, [NoiseState,] Sums, weight, samples, whole_batches, Law) -> mean, var and the other coefficients, which
   `results` names in their order. */
static void update(Value *stack, bool running, bool by_state, const size_t *results, int64_t count) {
    const int64_t of_state = FIELDS(Forward, shift, last_gain);
    const int64_t of_noise = running ? FIELDS(Forward, noise, last_mean) : 0;
    const int64_t tracked = FIELDS(Forward, shift, num_batches_tracked) - 1;
    const int64_t sums = of_state + of_noise, of_sums = FIELDS(Forward, batch_shift, batch_count);
    const int64_t tensors = sums + of_sums + 1;
    const Call call = call_of(stack, tensors);
    Forward f = {.dtype = code_of(&call), .stages = UPDATE, .threads = 1, .outer = 1, .channels = call.channels,
                 .inner = 1, .by_state = by_state, .rule = GIVEN};
    set_vectors(&call, 0, tracked, &f.shift);
    f.num_batches_tracked = data_of((Tensor)stack[tracked], 1, TORCH_INT64);
    set_vectors(&call, tracked + 1, of_state - tracked - 1, &f.num_batches_tracked + 1);
    set_vectors(&call, of_state, of_noise, &f.noise);
    set_vectors(&call, sums, of_sums, &f.batch_shift);
    set_vectors(&call, tensors - 1, 1, &f.batch_weight);
    f.batch_samples = (double)(int64_t)stack[tensors];
    f.whole_batches = (bool)(stack[tensors + 1] & 1);
    double *law = &f.max_lag;
    for (int64_t i = 0; i < FIELDS(Forward, max_lag, warmup_samples); i++) law[i] = real(stack[tensors + 2 + i]);
    /* A forward within a backward pass is one that activation checkpointing repeats. */
    f.updates = torch.backward_running() == -1;
    Tensor out[MOST_RESULTS];
    for (int64_t i = 0; i < count; i++) out[i] = new_vector(&call, (void **)((char *)&f + results[i]));
    if (runningbn_forward(&f)) fail(NO_MEMORY);
    leave(&call, out, count);
}

#define RESULTS(...)                                \
    static const size_t results[] = {__VA_ARGS__}; \
    const int64_t count = sizeof results / sizeof *results
#define PLACE(name) offsetof(Forward, name)

void runningbn_update_batch(Value *stack, uint64_t arguments, uint64_t outputs) {
    RESULTS(PLACE(mean), PLACE(var));
    (void)arguments, (void)outputs;
    update(stack, false, false, results, count);
}

void runningbn_update_exact(Value *stack, uint64_t arguments, uint64_t outputs) {
    RESULTS(PLACE(mean), PLACE(var), PLACE(kappa_mean), PLACE(kappa_var));
    (void)arguments, (void)outputs;
    update(stack, false, true, results, count);
}

void runningbn_update_running(Value *stack, uint64_t arguments, uint64_t outputs) {
    RESULTS(PLACE(mean), PLACE(var), PLACE(trust), PLACE(offset), PLACE(batch_std));
    (void)arguments, (void)outputs;
    update(stack, true, true, results, count);
}

/* (GradientState, GradientSums, rstd, trust, offset, batch_std, n) -> s*G0, s*G1 */
void runningbn_update_gradient(Value *stack, uint64_t arguments, uint64_t outputs) {
    (void)arguments, (void)outputs;
    const int64_t of_state = FIELDS(Backward, sum_dy, count_dy);
    const int64_t of_sums = FIELDS(Backward, batch_sum_dy, batch_sum_dy_xhat);
    const int64_t rstd = of_state + of_sums, of_batch = FIELDS(Backward, trust, batch_std);
    const int64_t tensors = rstd + 1 + of_batch;
    const Call call = call_of(stack, tensors);
    Backward b = {.dtype = code_of(&call), .stages = UPDATE, .threads = 1, .outer = (int64_t)stack[tensors],
                  .channels = call.channels, .inner = 1};
    set_vectors(&call, 0, of_state, &b.sum_dy);
    set_vectors(&call, of_state, of_sums, &b.batch_sum_dy);
    set_vectors(&call, rstd, 1, &b.rstd);
    set_vectors(&call, rstd + 1, of_batch, &b.trust);
    const Tensor out[] = {new_vector(&call, &b.m0), new_vector(&call, &b.m1)};
    if (runningbn_backward(&b)) fail(NO_MEMORY);
    leave(&call, out, 2);
}
