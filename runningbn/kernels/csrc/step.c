/* What kernels/cpu.py does in Python around the calls of cpu.c, for a step in which nothing is out of the ordinary:
   for a small input that takes longer than the step itself.

   `forward` and `backward` take tensors of the layer and of autograd. They look at all of them before they change
   anything, and decline, by returning None, whatever the Python code would not hand to the library as it is. That code
   is the definition, and gives the errors. What both hand over is the same, and so the results are, bit for bit.

   The memory of a tensor is asked for by DLPack's C function for that, which torch has from 2.10 on; everything else,
   by calling torch as Python does. The calls of cpu.c go to the library that ctypes has loaded. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stddef.h>

#include "cpu.h"

/* ------------------------------------------------------------------------------------------------------- tensors */

/* dlpack.h, version 1: a DLTensor and, of DLPackExchangeAPI, what is needed to get one. */
typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t dimensions;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} View;
typedef struct {
    struct {
        uint32_t major, minor;
    } version;
    void *previous, *allocate, *from_object, *to_object;
    int (*view)(void *tensor, View *out);
} Exchange;
enum { CPU = 1 };
enum { SIGNED = 0, REALS = 2, BFLOATS = 4 };

/* Told once, by `initialize`. */
static int (*view_of)(void *tensor, View *out);
static int (*kernel_forward)(const Forward *f);
static int (*kernel_backward)(const Backward *b);
static PyObject *tensor_type, *parameter_type, *empty_like, *increment_version, *get_num_threads, *plan_of;

#define STRINGS(X)                                                                                              \
    X(training) X(track_running_stats) X(num_features) X(eps) X(momentum) X(gradient) X(max_lag)         \
    X(_parameters) X(_buffers) X(weight) X(bias) X(is_neg) X(new_empty)
#define AS_OBJECT(name) static PyObject *s_##name;
STRINGS(AS_OBJECT)

/* The memory of a tensor on the CPU; 0 where it has none, or another class. Sets no error. */
static int look(PyObject *tensor, View *view) {
    const PyObject *type = (PyObject *)Py_TYPE(tensor);
    if (type != tensor_type && type != parameter_type) return 0;
    if (view_of(tensor, view) != 0) { /* sparse, nested, wrapped by a transform, of a dtype that DLPack has not */
        PyErr_Clear();
        return 0;
    }
    view->data = (char *)view->data + view->byte_offset;
    return view->device.type == CPU && view->data && view->dtype.lanes == 1;
}

static int is_real(const View *v, int bits) { return v->dtype.code == REALS && v->dtype.bits == bits; }

/* Whether x.permute(0, *order, 1) or, without `last`, x itself is contiguous. */
static int is_dense(const View *v, int channels_last) {
    int64_t expected = 1;
    if (channels_last) {
        if (v->shape[1] != 1 && v->strides[1] != 1) return 0;
        expected = v->shape[1];
    }
    for (int i = v->dimensions - 1; i >= 0; i--) {
        if (channels_last && i == 1) continue;
        if (v->shape[i] != 1 && v->strides[i] != expected) return 0;
        expected *= v->shape[i];
    }
    return 1;
}

/* Whether it is a vector over the channels, in the dtype of the statistics. */
static int is_vector(const View *v, int64_t channels, int bits) {
    return v->dimensions == 1 && v->shape[0] == channels && is_real(v, bits) && (channels == 1 || v->strides[0] == 1);
}

/* Whether what lies there is what the tensor means: of a negated view it is not. */
static int is_literal(PyObject *tensor) {
    PyObject *negative = PyObject_CallMethodObjArgs(tensor, s_is_neg, NULL);
    if (!negative) PyErr_Clear();
    Py_XDECREF(negative);
    return negative == Py_False;
}

/* A parameter as the library takes it, with its address; None, with NULL, goes, too. */
static int look_at_parameter(PyObject *parameter, int64_t channels, int bits, void **address) {
    View view;
    *address = NULL;
    if (parameter == Py_None) return 1;
    if (!look(parameter, &view) || !is_vector(&view, channels, bits) || !is_literal(parameter)) return 0;
    *address = view.data;
    return 1;
}

/* An input as dense rows or planes: `data_of` in cpu_calls.py. */
typedef struct {
    View view;
    int64_t dtype, rows, outer, channels, inner, elements;
    int bits; /* of the statistics */
} Data;

static int look_at_data(PyObject *x, Data *data) {
    const View *v = &data->view;
    if (!look(x, &data->view) || v->dimensions < 2) return 0;
    if (is_real(v, 32))
        data->dtype = FLOAT32, data->bits = 32;
    else if (is_real(v, 64))
        data->dtype = FLOAT64, data->bits = 64;
    else if (v->dtype.code == BFLOATS && v->dtype.bits == 16)
        data->dtype = BFLOAT16, data->bits = 32;
    else
        return 0;
    data->outer = v->shape[0], data->channels = v->shape[1], data->inner = 1;
    for (int i = 2; i < v->dimensions; i++) data->inner *= v->shape[i];
    data->elements = data->outer * data->channels * data->inner;
    if (data->elements == 0) return 0;
    if (is_dense(v, 0)) {
        data->rows = data->channels > 1 && data->inner == 1;
        if (data->channels == 1) data->inner *= data->outer, data->outer = 1;
    } else if (v->dimensions > 2 && is_dense(v, 1)) {
        data->rows = 1, data->outer *= data->inner, data->inner = 1;
    } else {
        return 0;
    }
    return is_literal(x);
}

/* Whether a gradient is laid out as x: `like_data` in cpu_calls.py has nothing to copy. */
static int is_like(const View *dy, const View *x) {
    if (dy->dimensions != x->dimensions || dy->dtype.code != x->dtype.code || dy->dtype.bits != x->dtype.bits) return 0;
    for (int i = 0; i < x->dimensions; i++)
        if (dy->shape[i] != x->shape[i]) return 0;
    if (is_dense(x, 0)) return is_dense(dy, 0);
    for (int i = 0; i < x->dimensions; i++)
        if (dy->strides[i] != x->strides[i]) return 0;
    return 1;
}

/* The threads of torch, where there is work for more than one; 0 for an error. */
static int64_t threads_for(const Data *data) {
    if (data->elements <= LARGE) return 1;
    PyObject *number = PyObject_CallNoArgs(get_num_threads);
    if (!number) return 0;
    const long threads = PyLong_AsLong(number);
    Py_DECREF(number);
    return threads > 0 ? threads : 0;
}

/* ------------------------------------------------------------------------------------------------ plans of layers */

#define MOST_COEFFICIENTS 8

/* What is the same in all steps of a layer, and mostly in all layers of a model. */
typedef struct {
    Forward call;        /* all that needs no tensor */
    PyObject *buffers;   /* names of those that a forward updates, */
    PyObject *gradients; /* and a backward, */
    int64_t *places, *gradient_places; /* and their places in a call */
    int64_t coefficients, forward_places[MOST_COEFFICIENTS], backward_places[MOST_COEFFICIENTS]; /* of those, or −1 */
} Plan;

#define AS_STRING(name) #name,
static const char *const forward_fields[] = {FORWARD_FIELDS(AS_STRING, AS_STRING, AS_STRING)};
static const char *const backward_fields[] = {BACKWARD_FIELDS(AS_STRING, AS_STRING, AS_STRING)};
#define FIELDS(names) (int64_t)(sizeof(names) / sizeof(*names))
/* A pointer field by its place. */
#define FIELD(call, place) (((void **)(call))[place])
_Static_assert(sizeof(Forward) == sizeof(void *) * (sizeof(forward_fields) / sizeof(*forward_fields)), "fields");
_Static_assert(sizeof(Backward) == sizeof(void *) * (sizeof(backward_fields) / sizeof(*backward_fields)), "fields");

static int64_t place_of(PyObject *name, const char *const *fields, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (PyUnicode_CompareWithASCIIString(name, fields[i]) == 0) return i;
    return -1;
}

static const char *const PLAN = "runningbn.kernels._step.plan";

static void free_plan(PyObject *capsule) {
    Plan *plan = PyCapsule_GetPointer(capsule, PLAN);
    Py_XDECREF(plan->buffers);
    Py_XDECREF(plan->gradients);
    PyMem_Free(plan->places);
    PyMem_Free(plan->gradient_places);
    PyMem_Free(plan);
}

/* The places of all names, of which each has one. */
static int64_t *places_of(PyObject *names, const char *const *fields, int64_t count) {
    const Py_ssize_t length = PyTuple_Size(names);
    int64_t *places = PyMem_Malloc(sizeof(int64_t) * (size_t)(length + 1));
    if (!places) return (int64_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < length; i++) {
        places[i] = place_of(PyTuple_GetItem(names, i), fields, count);
        if (places[i] < 0) {
            PyErr_SetString(PyExc_ValueError, "a name that is no field");
            PyMem_Free(places);
            return NULL;
        }
    }
    return places;
}

PyDoc_STRVAR(plan_doc,
"plan(call, coefficients, buffers, gradients)\n--\n\n"
"What `forward` needs of a kind of step: the bytes of a call in which all is set that needs no tensor, and names of\n"
"fields: of the coefficients in the order of their rows, of the buffers of a forward, and of those of a backward.");

static PyObject *make_plan(PyObject *module, PyObject *args) {
    const char *bytes;
    Py_ssize_t size;
    PyObject *coefficients, *buffers, *gradients;
    (void)module;
    if (!PyArg_ParseTuple(args, "y#O!O!O!:plan", &bytes, &size, &PyTuple_Type, &coefficients, &PyTuple_Type, &buffers,
                          &PyTuple_Type, &gradients))
        return NULL;
    if (size != sizeof(Forward) || PyTuple_Size(coefficients) > MOST_COEFFICIENTS) {
        PyErr_SetString(PyExc_ValueError, "not a call of this library");
        return NULL;
    }
    Plan *plan = PyMem_Calloc(1, sizeof *plan);
    if (!plan) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(plan, PLAN, free_plan);
    if (!capsule) {
        PyMem_Free(plan);
        return NULL;
    }
    memcpy(&plan->call, bytes, sizeof plan->call);
    Py_INCREF(plan->buffers = buffers);
    Py_INCREF(plan->gradients = gradients);
    plan->places = places_of(buffers, forward_fields, FIELDS(forward_fields));
    plan->gradient_places = plan->places ? places_of(gradients, backward_fields, FIELDS(backward_fields)) : NULL;
    if (!plan->gradient_places) {
        Py_DECREF(capsule);
        return NULL;
    }
    plan->coefficients = PyTuple_Size(coefficients);
    for (int64_t i = 0; i < plan->coefficients; i++) {
        PyObject *name = PyTuple_GetItem(coefficients, i);
        plan->forward_places[i] = place_of(name, forward_fields, FIELDS(forward_fields));
        plan->backward_places[i] = place_of(name, backward_fields, FIELDS(backward_fields));
        if (plan->forward_places[i] < 0 || plan->backward_places[i] < 0) {
            PyErr_SetString(PyExc_ValueError, "a coefficient that is no field");
            Py_DECREF(capsule);
            return NULL;
        }
    }
    return capsule;
}

/* The plans that were used last, by what a plan depends on. Objects of one identity are taken to stay what they are, as
   momentum rules promise. */
#define MOST_PLANS 32
enum { OF_TYPE, OF_MOMENTUM, OF_GRADIENT, OF_EPS, OF_MAX_LAG, KEYS };
static struct {
    PyObject *keys[KEYS], *kind;
} known[MOST_PLANS];
static int64_t next_known;

static int is_same(PyObject *a, PyObject *b) {
    if (a == b) return 1;
    if (!a || !b) return 0;
    if (PyFloat_CheckExact(a) && PyFloat_CheckExact(b)) return PyFloat_AsDouble(a) == PyFloat_AsDouble(b);
    return PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0;
}

/* Of what `plan_of` has returned. */
static const Plan *plan_in(PyObject *kind) {
    PyObject *capsule = PyTuple_Check(kind) && PyTuple_Size(kind) > 0 ? PyTuple_GetItem(kind, 0) : Py_None;
    return PyCapsule_GetPointer(capsule, PLAN);
}

/* A new reference to what `plan_of` says of a layer: a tuple with its plan, None where the library cannot do its steps,
   or NULL with an error. */
static PyObject *kind_for(PyObject *layer, PyObject *const *keys) {
    for (int64_t i = 0; i < MOST_PLANS && known[i].kind; i++) {
        int64_t k = 0;
        while (k < KEYS && is_same(known[i].keys[k], keys[k])) k++;
        if (k == KEYS) {
            Py_INCREF(known[i].kind);
            return known[i].kind;
        }
    }
    /* Calls Python: the keys may be gone after it. */
    PyObject *held[KEYS], *old[KEYS];
    for (int64_t k = 0; k < KEYS; k++) Py_XINCREF(held[k] = keys[k]);
    PyObject *kind = PyObject_CallFunctionObjArgs(plan_of, layer, NULL);
    if (kind && kind != Py_None && !plan_in(kind)) Py_CLEAR(kind);
    if (!kind) {
        for (int64_t k = 0; k < KEYS; k++) Py_XDECREF(held[k]);
        return NULL;
    }
    PyObject *old_kind = known[next_known].kind;
    for (int64_t k = 0; k < KEYS; k++) old[k] = known[next_known].keys[k], known[next_known].keys[k] = held[k];
    known[next_known].kind = kind;
    next_known = (next_known + 1) % MOST_PLANS;
    Py_INCREF(kind);
    /* Last, as it may run any code. */
    for (int64_t k = 0; k < KEYS && old_kind; k++) Py_XDECREF(old[k]);
    Py_XDECREF(old_kind);
    return kind;
}

/* --------------------------------------------------------------------------------------------------------- steps */

static PyObject *own(PyObject *dict, PyObject *name) {
    PyObject *value = PyDict_GetItemWithError(dict, name);
    if (!value) PyErr_Clear();
    return value;
}

/* A buffer that the library can update, `are_vectors` in layout.py; its address, or NULL. */
static void *look_at_buffer(PyObject *buffer, const Data *data) {
    View view;
    if (!buffer || !look(buffer, &view)) return NULL;
    if (view.dimensions == 0) return view.dtype.code == SIGNED && view.dtype.bits == 64 ? view.data : NULL;
    return is_vector(&view, data->channels, data->bits) ? view.data : NULL;
}

/* A new tuple of the buffers of these names; NULL, without an error, where one is missing. */
static PyObject *buffers_of(PyObject *dict, PyObject *names) {
    const Py_ssize_t count = PyTuple_Size(names);
    PyObject *found = PyTuple_New(count);
    for (Py_ssize_t i = 0; found && i < count; i++) {
        PyObject *buffer = own(dict, PyTuple_GetItem(names, i));
        if (buffer) {
            Py_INCREF(buffer);
            PyTuple_SetItem(found, i, buffer);
        } else {
            Py_CLEAR(found);
        }
    }
    if (!found) PyErr_Clear();
    return found;
}

static int look_at_buffers(PyObject *buffers, const int64_t *places, void *call, const Data *data) {
    const Py_ssize_t count = PyTuple_Size(buffers);
    for (Py_ssize_t i = 0; i < count; i++)
        if (!(FIELD(call, places[i]) = look_at_buffer(PyTuple_GetItem(buffers, i), data))) return 0;
    return 1;
}

/* Tells autograd that the buffers are written, in case one was saved for a backward pass. */
static int note_change(PyObject *buffers) {
    PyObject *nothing = PyObject_CallFunctionObjArgs(increment_version, buffers, NULL);
    Py_XDECREF(nothing);
    return nothing != NULL;
}

/* An empty tensor (rows, channels), or without rows (channels), in the dtype of another. */
static PyObject *made_of_size(PyObject *like, int64_t rows, int64_t channels) {
    PyObject *second = PyLong_FromLongLong(channels), *first = rows ? PyLong_FromLongLong(rows) : second, *made = NULL;
    if (first && second) made = PyObject_CallMethodObjArgs(like, s_new_empty, first, rows ? second : NULL, NULL);
    if (rows) Py_XDECREF(first);
    Py_XDECREF(second);
    return made;
}

static PyObject *made_like(PyObject *tensor) { return PyObject_CallFunctionObjArgs(empty_like, tensor, NULL); }

static int refuse(void) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch made a tensor that is not as it was asked for");
    return 0;
}

/* Of a result that the library writes to; 0 with an error. */
static int look_at_result(PyObject *result, View *view) { return result && look(result, view) ? 1 : refuse(); }

/* What a forward looks at and then holds. */
typedef struct {
    PyObject *kind, *weight, *bias, *buffers, *gradient, *y, *rows;
    const Plan *plan; /* in `kind` */
    Data data;
    Forward call;
} Step;

static void drop(Step *s) {
    Py_XDECREF(s->kind);
    Py_XDECREF(s->weight);
    Py_XDECREF(s->bias);
    Py_XDECREF(s->buffers);
    Py_XDECREF(s->gradient);
    Py_XDECREF(s->y);
    Py_XDECREF(s->rows);
}

/* A step of a layer with these attributes that is in order; 0, mostly without an error, if it is not. */
static int look_at_step(PyObject *layer, PyObject *dict, PyObject *x, Step *s) {
    if (own(dict, s_training) != Py_True || own(dict, s_track_running_stats) != Py_True) return 0;
    if (!look_at_data(x, &s->data)) return 0;
    const Data *data = &s->data;
    PyObject *features = own(dict, s_num_features), *eps = own(dict, s_eps), *momentum = own(dict, s_momentum);
    if (!features || !PyLong_CheckExact(features) || !momentum) return 0;
    const long long number = PyLong_AsLongLong(features);
    if (number == -1) PyErr_Clear();
    if (number != data->channels || !eps || !PyFloat_CheckExact(eps) || !(PyFloat_AsDouble(eps) > 0)) return 0;
    PyObject *const keys[KEYS] = {(PyObject *)Py_TYPE(layer), momentum, own(dict, s_gradient), eps,
                                  own(dict, s_max_lag)};
    if (!(s->kind = kind_for(layer, keys)) || s->kind == Py_None) return 0;

    const Plan *plan = s->plan = plan_in(s->kind);
    s->call = plan->call;
    if (!s->call.by_state && data->elements == data->channels) return 0;
    PyObject *parameters = own(dict, s__parameters), *buffers = own(dict, s__buffers);
    if (!parameters || !PyDict_Check(parameters) || !buffers || !PyDict_Check(buffers)) return 0;
    Py_XINCREF(s->weight = own(parameters, s_weight));
    Py_XINCREF(s->bias = own(parameters, s_bias));
    if (!s->weight || !look_at_parameter(s->weight, data->channels, data->bits, &s->call.weight)) return 0;
    if (!s->bias || !look_at_parameter(s->bias, data->channels, data->bits, &s->call.bias)) return 0;
    if (!(s->buffers = buffers_of(buffers, plan->buffers))) return 0;
    if (!(s->gradient = buffers_of(buffers, plan->gradients))) return 0;
    return look_at_buffers(s->buffers, plan->places, &s->call, data);
}

/* Completes a call that `look_at_step` has begun, and makes it; 0 with an error. */
static int run_step(PyObject *x, Step *s, int updates) {
    const Plan *plan = s->plan;
    const Data *data = &s->data;
    Forward *call = &s->call;
    View y, rows;
    s->y = made_like(x);
    if (!look_at_result(s->y, &y) || !(is_like(&y, &data->view) || refuse())) return 0;
    s->rows = made_of_size(PyTuple_GetItem(s->buffers, 0), plan->coefficients, data->channels);
    if (!look_at_result(s->rows, &rows) || !(call->threads = threads_for(data))) return 0;
    if (updates && !note_change(s->buffers)) return 0;
    call->dtype = data->dtype, call->rows = data->rows;
    call->outer = data->outer, call->channels = data->channels, call->inner = data->inner;
    call->x = data->view.data, call->y = y.data;
    call->updates = updates, call->batch_samples = (double)data->view.shape[0];
    /* As `training_forward` in cpu.py: an exact gradient needs no sums where the state is taken as it is. */
    call->stages = APPLY;
    if (updates || !call->by_state || call->noise) call->stages |= SUMS;
    if (updates || call->by_state) call->stages |= UPDATE;
    for (int64_t i = 0; i < plan->coefficients; i++)
        FIELD(call, plan->forward_places[i]) = (char *)rows.data + i * data->channels * (data->bits / 8);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernel_forward(call);
    Py_END_ALLOW_THREADS
    if (failed) PyErr_NoMemory();
    return !failed;
}

static int is_ready(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected && view_of) return 1;
    PyErr_SetString(PyExc_TypeError, view_of ? "wrong number of arguments" : "not initialized");
    return 0;
}

PyDoc_STRVAR(forward_doc,
"forward(layer, x, updates)\n--\n\n"
"A training step of a layer: (weight, bias, (y, rows, kind, gradient)); or None, and nothing has changed.\n\n"
"`rows` are the coefficients, `kind` is what the layer was planned as, and `gradient` are the buffers that its backward\n"
"updates, in a tuple, which may be empty. Without `updates` the state is taken as it is.");

static PyObject *forward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (!is_ready(count, 3)) return NULL;
    PyObject *layer = args[0], *x = args[1], *result = NULL, *dict = PyObject_GenericGetDict(layer, NULL);
    Step s = {0};
    if (!dict) return NULL;
    if (!look_at_step(layer, dict, x, &s)) {
        if (!PyErr_Occurred()) Py_INCREF(result = Py_None);
    } else if (run_step(x, &s, args[2] == Py_True)) {
        PyObject *done = PyTuple_Pack(4, s.y, s.rows, s.kind, s.gradient);
        if (done) result = PyTuple_Pack(3, s.weight, s.bias, done);
        Py_XDECREF(done);
    }
    drop(&s);
    Py_DECREF(dict);
    return result;
}

PyDoc_STRVAR(backward_doc,
"backward(kind, gradient, dy, x, weight, rows, needs)\n--\n\n"
"The gradients of x, weight and bias where `needs` is true, a tuple; or None, and nothing has changed.\n\n"
"`kind`, `gradient` and `rows` are what `forward` has returned.");

static PyObject *backward(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (!is_ready(count, 7)) return NULL;
    PyObject *gradient = args[1], *dy = args[2], *x = args[3], *needs = args[6];
    const Plan *plan = plan_in(args[0]);
    Backward call = {0};
    Data data;
    View dy_view, rows;
    if (!plan || !PyTuple_Check(gradient) || !PyTuple_Check(needs) || PyTuple_Size(needs) < 3 ||
        PyTuple_Size(gradient) != PyTuple_Size(plan->gradients)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "expected what forward has returned");
        return NULL;
    }
    if (!look_at_data(x, &data) || !look(dy, &dy_view) || !is_like(&dy_view, &data.view) || !is_literal(dy) ||
        !look_at_parameter(args[4], data.channels, data.bits, &call.weight) || !look(args[5], &rows) ||
        rows.dimensions != 2 || rows.shape[0] != plan->coefficients || rows.shape[1] != data.channels ||
        !is_real(&rows, data.bits) || !is_dense(&rows, 0) || !is_literal(args[5]) ||
        !look_at_buffers(gradient, plan->gradient_places, &call, &data))
        Py_RETURN_NONE;

    PyObject *results[3] = {NULL, NULL, NULL}, *result = NULL;
    void *addresses[3] = {NULL, NULL, NULL};
    for (int i = 0; i < 3; i++) {
        View view;
        if (PyTuple_GetItem(needs, i) != Py_True) {
            Py_INCREF(results[i] = Py_None);
            continue;
        }
        results[i] = i == 0 ? made_like(x) : made_of_size(args[5], 0, data.channels);
        if (!look_at_result(results[i], &view) || !(i || is_like(&view, &data.view) || refuse())) goto done;
        addresses[i] = view.data;
    }
    if (!(call.threads = threads_for(&data))) goto done;
    call.stages = addresses[0] ? SUMS | APPLY : SUMS;
    if (PyTuple_Size(gradient) > 0) {
        if (!note_change(gradient)) goto done;
        call.stages |= UPDATE;
    }
    call.dtype = data.dtype, call.rows = data.rows;
    call.outer = data.outer, call.channels = data.channels, call.inner = data.inner;
    call.dy = dy_view.data, call.x = data.view.data, call.dx = addresses[0];
    call.batch_sum_dy_xhat = addresses[1], call.batch_sum_dy = addresses[2];
    for (int64_t i = 0; i < plan->coefficients; i++)
        FIELD(&call, plan->backward_places[i]) = (char *)rows.data + i * data.channels * (data.bits / 8);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernel_backward(&call);
    Py_END_ALLOW_THREADS
    if (failed)
        PyErr_NoMemory();
    else
        result = PyTuple_Pack(3, results[0], results[1], results[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(results[i]);
    return result;
}

PyDoc_STRVAR(initialize_doc,
"initialize(exchange, forward, backward, tensor, parameter, empty_like, increment_version, get_num_threads, plan_of)\n"
"--\n\n"
"Told once: the capsule of DLPack's functions, the addresses of those of the library, what is called of torch, and what\n"
"makes the plan of a layer. Returns whether this DLPack is known here.");

static PyObject *initialize(PyObject *module, PyObject *args) {
    PyObject *capsule, *told[6];
    unsigned long long forward_address, backward_address;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKKOOOOOO:initialize", &capsule, &forward_address, &backward_address, &told[0], &told[1],
                          &told[2], &told[3], &told[4], &told[5]))
        return NULL;
    const Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!exchange) return NULL;
    if (exchange->version.major != 1 || !exchange->view) Py_RETURN_FALSE;
    kernel_forward = (int (*)(const Forward *))(uintptr_t)forward_address;
    kernel_backward = (int (*)(const Backward *))(uintptr_t)backward_address;
    PyObject **const kept[6] = {&tensor_type, &parameter_type, &empty_like, &increment_version, &get_num_threads,
                                &plan_of};
    for (int i = 0; i < 6; i++) {
        PyObject *old = *kept[i];
        Py_INCREF(*kept[i] = told[i]);
        Py_XDECREF(old);
    }
    view_of = exchange->view;
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"initialize", initialize, METH_VARARGS, initialize_doc},
    {"plan", make_plan, METH_VARARGS, plan_doc},
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, forward_doc},
    {"backward", (PyCFunction)(void (*)(void))backward, METH_FASTCALL, backward_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_step", "Training steps in which nothing is out of the ordinary; see csrc/step.c.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__step(void);
PyMODINIT_FUNC PyInit__step(void) {
#define INTERN(name) \
    if (!(s_##name = PyUnicode_InternFromString(#name))) return NULL;
    STRINGS(INTERN)
    PyObject *module = PyModule_Create(&definition);
    /* What it was built from, as `runningbn_interface` of the library says it. */
    if (module && PyModule_AddStringConstant(module, "interface", INTERFACE) != 0) Py_CLEAR(module);
    return module;
}
