/* A training step in two operators of torch, for compiled code: what cpu.py does around the calls of cpu.c.

   Through torch's stable C interface, without its headers: cpu_operators.py hands over the addresses of the functions,
   in the order of `Torch`. Arguments and results lie on a stack of 8 bytes each; tensors on it are handles, which
   belong to whoever takes them. Buffers and coefficients have the order of the fields in cpu.h, since both are made of
   the same tables. The compiler may give inputs and gradients in any layout, so that it need not convert what the
   kernels take as it is. */

#include <stdbool.h>
#include <stddef.h>

#include "cpu.h"
#include "layout.h"

typedef void *Tensor;
typedef uint64_t Value;

typedef struct {
    int32_t (*get_data_ptr)(Tensor, void **);
    int32_t (*get_dtype)(Tensor, int32_t *);
    int32_t (*get_dim)(Tensor, int64_t *);
    int32_t (*get_sizes)(Tensor, int64_t **);
    int32_t (*get_strides)(Tensor, int64_t **);
    int32_t (*empty_strided)(int64_t dimensions, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, Tensor *out);
    int32_t (*copy)(Tensor self, Tensor from, int32_t non_blocking);
    int32_t (*delete_tensor)(Tensor);
    int32_t (*get_num_threads)(uint32_t *);
    int32_t (*backward_running)(void); /* -1 outside of a backward pass */
    /* torch's way to raise a RuntimeError; it does not return. */
    void (*raise)(const char *function, const char *file, uint32_t line, const char *message);
} Torch;

enum { MOST_DIMENSIONS = 64 }; /* of torch's tensors */
enum { TORCH_INT64 = 4, TORCH_HALF = 5, TORCH_FLOAT = 6, TORCH_DOUBLE = 7, TORCH_BFLOAT16 = 15, TORCH_CPU = 0 };

static Torch torch;

void runningbn_initialize_operators(const Torch *functions) { torch = *functions; }

static void fail(const char *message) { torch.raise(__func__, __FILE__, __LINE__, message); }

static const char NO_MEMORY[] = "no memory for the results of a normalisation";

typedef struct {
    int64_t dimensions, *shape, *strides;
    int32_t dtype;
    void *data;
} View;

static View look_at(Tensor tensor) {
    View v = {0, NULL, NULL, 0, NULL};
    if (torch.get_dim(tensor, &v.dimensions) || torch.get_sizes(tensor, &v.shape) ||
        torch.get_strides(tensor, &v.strides) || torch.get_dtype(tensor, &v.dtype) ||
        torch.get_data_ptr(tensor, &v.data))
        fail("a tensor has no memory");
    return v;
}

static Tensor new_tensor(int64_t dimensions, const int64_t *shape, const int64_t *strides, int32_t dtype, void **data) {
    Tensor out = NULL;
    if (torch.empty_strided(dimensions, shape, strides, dtype, TORCH_CPU, 0, &out) || torch.get_data_ptr(out, data))
        fail(NO_MEMORY);
    return out;
}

static Tensor new_like(const View *v, void **data) {
    return new_tensor(v->dimensions, v->shape, v->strides, v->dtype, data);
}

/* A copy of a tensor with other strides. */
static Tensor copy_of(Tensor tensor, const View *v, const int64_t *strides) {
    void *data;
    const Tensor copy = new_tensor(v->dimensions, v->shape, strides, v->dtype, &data);
    if (torch.copy(copy, tensor, 0)) fail("a tensor cannot be copied");
    return copy;
}

/* What the arguments of a call have in common: the data, and the dtype of vectors over channels, torch's code. */
typedef struct {
    Tensor copy; /* that x lies in, or NULL */
    View x;
    Layout layout;
    int64_t dtype, threads;
    int32_t of_vectors;
} Data;

static Data data_of(Value handle) {
    Data d = {.x = look_at((Tensor)handle), .threads = 1, .of_vectors = TORCH_FLOAT};
    if (d.x.dimensions < 2 || d.x.dimensions > MOST_DIMENSIONS || !d.x.data) fail("expected an input (N, C, *), not empty");
    if (!look_at_layout(d.x.shape, d.x.strides, d.x.dimensions, &d.layout)) {
        int64_t strides[MOST_DIMENSIONS], next = 1;
        for (int64_t i = d.x.dimensions - 1; i >= 0; i--) strides[i] = next, next *= d.x.shape[i];
        if (next == 0) fail("expected an input (N, C, *), not empty");
        d.copy = copy_of((Tensor)handle, &d.x, strides);
        d.x = look_at(d.copy);
        look_at_layout(d.x.shape, d.x.strides, d.x.dimensions, &d.layout);
    }
    switch (d.x.dtype) {
        case TORCH_FLOAT: d.dtype = FLOAT32; break;
        case TORCH_BFLOAT16: d.dtype = BFLOAT16; break;
        case TORCH_HALF: d.dtype = FLOAT16; break;
        case TORCH_DOUBLE: d.dtype = FLOAT64, d.of_vectors = TORCH_DOUBLE; break;
        default: fail("expected an input of float32, float64, float16 or bfloat16");
    }
    uint32_t threads = 1;
    if (d.layout.outer * d.layout.channels * d.layout.inner >= 2 * LARGE && torch.get_num_threads(&threads))
        fail("the number of threads is not known");
    d.threads = threads;
    return d;
}

#define SET_DATA(call, d)                                    \
    ((call)->dtype = (d)->dtype, (call)->threads = (d)->threads, (call)->x = (d)->x.data, \
     SET_LAYOUT(call, &(d)->layout))

/* The address of a vector over the channels. */
static void *vector_of(Value handle, const Data *d) {
    const View v = look_at((Tensor)handle);
    if (v.dimensions != 1 || v.shape[0] != d->layout.channels || v.dtype != d->of_vectors || !v.data ||
        !is_dense(v.shape, v.strides, 1, 0))
        fail("expected contiguous vectors over the channels, all of one dtype");
    return v.data;
}

/* That of a parameter: NULL for an empty one, which stands for none. */
static void *parameter_of(Value handle, const Data *d) {
    const View v = look_at((Tensor)handle);
    return v.dimensions == 1 && v.shape[0] == 0 ? NULL : vector_of(handle, d);
}

/* Sets `count` consecutive fields of a call. */
static void set_vectors(const Value *handles, int64_t count, void **fields, const Data *d) {
    for (int64_t i = 0; i < count; i++) fields[i] = vector_of(handles[i], d);
}

static void leave(Value *stack, int64_t tensors, const Data *d, const Tensor *results, int64_t count) {
    if (d->copy) torch.delete_tensor(d->copy);
    for (int64_t i = 0; i < tensors; i++) torch.delete_tensor((Tensor)stack[i]);
    for (int64_t i = 0; i < count; i++) stack[i] = (Value)(uintptr_t)results[i];
}

static double real(Value value) {
    double result;
    memcpy(&result, &value, sizeof result);
    return result;
}

/* How many fields of a struct lie from one to another, both included. All have 8 bytes. */
#define FIELDS(type, first, last) ((int64_t)(offsetof(type, last) - offsetof(type, first)) / 8 + 1)

/* The coefficients of a mode in the order of their rows, as spec.Mode has them: fields of a Forward or a Backward. */
#define BATCH(X) X(mean) X(rstd)
#define EXACT(X) BATCH(X) X(kappa_mean) X(kappa_var)
#define RUNNING(X) BATCH(X) X(trust) X(offset) X(batch_std)
#define IN_FORWARD(name) offsetof(Forward, name),
#define IN_BACKWARD(name) offsetof(Backward, name),
typedef struct {
    const size_t *places;
    int64_t count;
    bool by_state, running;
} Mode;

/* Sets the fields of the coefficients to the rows of a tensor. */
static void set_rows(void *call, const Mode *m, char *rows, const Data *d) {
    const int64_t size = d->layout.channels * (d->of_vectors == TORCH_DOUBLE ? 8 : 4);
    for (int64_t i = 0; i < m->count; i++) *(void **)((char *)call + m->places[i]) = rows + i * size;
}

/* (x, State, [NoiseState,] eps, Law, rule, its three arguments, whole_batches) -> coefficients. */
static void forward(Value *stack, const Mode *m) {
    const int64_t of_state = FIELDS(Forward, shift, last_gain);
    const int64_t of_noise = m->running ? FIELDS(Forward, noise, last_mean) : 0;
    const int64_t tracked = FIELDS(Forward, shift, num_batches_tracked) - 1, tensors = 1 + of_state + of_noise;
    const Data d = data_of(stack[0]);
    Forward f = {.by_state = m->by_state, .batch_samples = (double)d.x.shape[0]};
    SET_DATA(&f, &d);
    const Value *state = stack + 1, *constants = stack + tensors;
    const View counter = look_at((Tensor)state[tracked]);
    if (counter.dimensions != 0 || counter.dtype != TORCH_INT64 || !counter.data)
        fail("num_batches_tracked: expected an int64");
    f.num_batches_tracked = counter.data;
    set_vectors(state, tracked, &f.shift, &d);
    set_vectors(state + tracked + 1, of_state - tracked - 1, &f.num_batches_tracked + 1, &d);
    set_vectors(state + of_state, of_noise, &f.noise, &d);
    /* The fields of eps and the law lie side by side, and so do those of the rule. */
    for (int64_t i = 0; i < FIELDS(Forward, eps, warmup_samples); i++) (&f.eps)[i] = real(*constants++);
    f.rule = (int64_t)*constants++;
    for (int64_t i = 0; i < FIELDS(Forward, rule_first, rule_third); i++) (&f.rule_first)[i] = real(*constants++);
    f.whole_batches = (bool)(*constants & 1);

    /* A forward within a backward pass is one that activation checkpointing repeats. */
    f.updates = torch.backward_running() == -1;
    f.stages = stages_of_step(&f);
    const int64_t shape[] = {m->count, d.layout.channels}, strides[] = {d.layout.channels, 1};
    void *rows;
    const Tensor out[] = {new_tensor(2, shape, strides, d.of_vectors, &rows)};
    set_rows(&f, m, rows, &d);
    if (runningbn_forward(&f)) fail(NO_MEMORY);
    leave(stack, tensors, &d, out, 1);
}

/* (dy, x, weight, coefficients, [GradientState,] needs_dx) -> dx, sum_dy, sum_dy_xhat; dx is empty if not needed. */
static void backward(Value *stack, const Mode *m) {
    const int64_t of_state = m->running ? FIELDS(Backward, sum_dy, count_dy) : 0, before = 4, tensors = before + of_state;
    const Data d = data_of(stack[1]);
    View dy = look_at((Tensor)stack[0]);
    const View rows = look_at((Tensor)stack[3]);
    bool alike = dy.dimensions == d.x.dimensions && dy.dtype == d.x.dtype;
    for (int64_t i = 0; alike && i < dy.dimensions; i++) alike = dy.shape[i] == d.x.shape[i];
    if (!alike) fail("expected a gradient of the shape and dtype of the input");
    Tensor dy_copy = NULL;
    if (!lies_as(dy.strides, dy.shape, d.x.strides, dy.dimensions)) {
        dy_copy = copy_of((Tensor)stack[0], &dy, d.x.strides);
        dy = look_at(dy_copy);
    }
    if (rows.dimensions != 2 || rows.shape[0] != m->count || rows.shape[1] != d.layout.channels ||
        rows.dtype != d.of_vectors || !is_dense(rows.shape, rows.strides, 2, 0))
        fail("expected the coefficients of the forward");
    Backward b = {.dy = dy.data, .stages = SUMS | (m->running ? UPDATE : 0)};
    SET_DATA(&b, &d);
    b.weight = parameter_of(stack[2], &d);
    set_rows(&b, m, rows.data, &d);
    set_vectors(stack + before, of_state, &b.sum_dy, &d);
    const int64_t none = 0, one = 1, *channels = &d.layout.channels;
    const bool needs_dx = stack[tensors] & 1;
    if (needs_dx) b.stages |= APPLY;
    const Tensor out[] = {
        needs_dx ? new_like(&d.x, &b.dx) : new_tensor(1, &none, &one, d.x.dtype, &b.dx),
        new_tensor(1, channels, &one, d.of_vectors, &b.batch_sum_dy),
        new_tensor(1, channels, &one, d.of_vectors, &b.batch_sum_dy_xhat),
    };
    if (runningbn_backward(&b)) fail(NO_MEMORY);
    if (dy_copy) torch.delete_tensor(dy_copy);
    leave(stack, tensors, &d, out, 3);
}

#define OPERATOR(direction, name, by_state, running, ...)                                     \
    void runningbn_##direction##_##name(Value *stack, uint64_t arguments, uint64_t outputs) { \
        static const size_t places[] = {__VA_ARGS__};                                         \
        const Mode mode = {places, sizeof places / sizeof *places, by_state, running};        \
        (void)arguments, (void)outputs;                                                       \
        direction(stack, &mode);                                                              \
    }
OPERATOR(forward, batch, false, false, BATCH(IN_FORWARD))
OPERATOR(forward, exact, true, false, EXACT(IN_FORWARD))
OPERATOR(forward, running, true, true, RUNNING(IN_FORWARD))
OPERATOR(backward, batch, false, false, BATCH(IN_BACKWARD))
OPERATOR(backward, exact, true, false, EXACT(IN_BACKWARD))
OPERATOR(backward, running, true, true, RUNNING(IN_BACKWARD))
