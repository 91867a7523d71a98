/* What kernels/cpu.py does in Python around the calls of cpu.c, for a step in which nothing is out of the ordinary:
   for a small input that takes longer than the step itself.

   `forward` and `backward` take tensors of the layer and of autograd, `batch_norm` those of a recalibration. They look
   at all of them before they change anything, and decline, by returning None, whatever the Python code would not hand to
   the library as it is. That code is the definition, and gives the errors. What both hand over is the same, and so the
   results are, bit for bit.

   The memory of a tensor is asked for by DLPack's C function for that, which torch has from 2.10 on; everything else,
   by calling torch as Python does. The calls of cpu.c go to the library that ctypes has loaded. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stddef.h>

#include "cpu.h"
#include "layout.h"

/* Told once, by `initialize`. */
static int (*kernel_forward)(const Forward *f);
static int (*kernel_backward)(const Backward *b);
static PyObject *tensor_type, *parameter_type, *empty_like, *increment_version, *get_num_threads, *plan_of;

/* Names, as Python has them. */
#define STRINGS(X)                                                                               \
    X(training) X(track_running_stats) X(num_features) X(eps) X(momentum) X(gradient) X(max_lag) \
    X(_parameters) X(_buffers) X(weight) X(bias) X(is_neg) X(new_empty)
#define AS_OBJECT(name) static PyObject *s_##name;
STRINGS(AS_OBJECT)

/* In this order: tensors as memory, what is the same in all steps of a layer, and what a step writes to. */
#include "step_tensors.h"

#include "step_plans.h"

#include "step_written.h"

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
    if (number != data->layout.channels || !eps || !PyFloat_CheckExact(eps) || !(PyFloat_AsDouble(eps) > 0)) return 0;
    PyObject *const keys[KEYS] = {(PyObject *)Py_TYPE(layer), momentum, own(dict, s_gradient), eps,
                                  own(dict, s_max_lag)};
    if (!(s->kind = kind_for(layer, keys)) || s->kind == Py_None) return 0;

    const Plan *plan = s->plan = plan_in(s->kind);
    s->call = plan->call;
    if (!s->call.by_state && data->elements == data->layout.channels) return 0;
    PyObject *parameters = own(dict, s__parameters), *buffers = own(dict, s__buffers);
    if (!parameters || !PyDict_Check(parameters) || !buffers || !PyDict_Check(buffers)) return 0;
    Py_XINCREF(s->weight = own(parameters, s_weight));
    Py_XINCREF(s->bias = own(parameters, s_bias));
    if (!s->weight || !look_at_parameter(s->weight, data->layout.channels, data->bits, &s->call.weight)) return 0;
    if (!s->bias || !look_at_parameter(s->bias, data->layout.channels, data->bits, &s->call.bias)) return 0;
    if (!(s->buffers = buffers_of(buffers, plan->buffers))) return 0;
    if (!(s->gradient = buffers_of(buffers, plan->gradients))) return 0;
    return look_at_buffers(s->buffers, plan->places, &s->call, data);
}

/* 0 with an error. */
static int call_forward(const Forward *call) {
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = kernel_forward(call);
    Py_END_ALLOW_THREADS
    if (failed) PyErr_NoMemory();
    return !failed;
}

/* Completes a call that `look_at_step` has begun, and makes it; 0 with an error. */
static int run_step(PyObject *x, Step *s, int updates) {
    const Plan *plan = s->plan;
    const Data *data = &s->data;
    Forward *call = &s->call;
    View rows;
    if (!(s->y = made_as(x, data, &call->y))) return 0;
    s->rows = made_of_size(PyTuple_GetItem(s->buffers, 0), plan->coefficients, data->layout.channels);
    if (!look_at_result(s->rows, &rows) || !(call->threads = threads_for(data))) return 0;
    if (updates && !note_change(s->buffers)) return 0;
    call->dtype = data->dtype;
    SET_LAYOUT(call, &data->layout);
    call->x = data->view.data;
    call->updates = updates, call->batch_samples = (double)data->view.shape[0];
    call->stages = stages_of_step(call) | APPLY;
    for (int64_t i = 0; i < plan->coefficients; i++)
        FIELD(call, plan->forward_places[i]) = (char *)rows.data + i * data->layout.channels * (data->bits / 8);
    return call_forward(call);
}

static int is_ready(Py_ssize_t given, Py_ssize_t expected) {
    if (given == expected && view_of) return 1;
    PyErr_SetString(PyExc_TypeError, view_of ? "wrong number of arguments" : "not initialized");
    return 0;
}

PyDoc_STRVAR(forward_doc,
"forward(layer, x, updates)\n--\n\n"
"A training step of a layer: (weight, bias, (y, rows, kind, gradient)); or None, and nothing has changed.\n\n"
"`rows` are the coefficients, `kind` is what the layer was planned as, and `gradient` are the buffers that a backward\n"
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

PyDoc_STRVAR(batch_norm_doc,
"batch_norm(x, weight, bias, eps)\n--\n\n"
"A batch normalised by its own statistics: (y, mean, biased variance), as `batch_norm` in cpu.py; or None.");

static PyObject *batch_norm(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (!is_ready(count, 4)) return NULL;
    PyObject *x = args[0], *made[3] = {NULL, NULL, NULL}, *result = NULL;
    Data data;
    Forward call = {0};
    /* The vectors are made in the dtype of x. */
    if (!look_at_data(x, &data) || data.view.dtype.bits != data.bits || !PyFloat_CheckExact(args[3]) ||
        !look_at_parameter(args[1], data.layout.channels, data.bits, &call.weight) ||
        !look_at_parameter(args[2], data.layout.channels, data.bits, &call.bias))
        Py_RETURN_NONE;
    if (!(made[0] = made_as(x, &data, &call.y)) || !(made[1] = made_vector(x, &data, &call.mean)) ||
        !(made[2] = made_vector(x, &data, &call.var)))
        goto done;
    if (!(call.threads = threads_for(&data))) goto done;
    call.dtype = data.dtype;
    SET_LAYOUT(&call, &data.layout);
    call.stages = SUMS | APPLY, call.x = data.view.data, call.eps = PyFloat_AsDouble(args[3]);
    if (call_forward(&call)) result = PyTuple_Pack(3, made[0], made[1], made[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(made[i]);
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
        !look_at_parameter(args[4], data.layout.channels, data.bits, &call.weight) || !look(args[5], &rows) ||
        rows.dimensions != 2 || rows.shape[0] != plan->coefficients || rows.shape[1] != data.layout.channels ||
        !is_real(&rows, data.bits) || !is_dense(rows.shape, rows.strides, 2, 0) || !is_literal(args[5]) ||
        !look_at_buffers(gradient, plan->gradient_places, &call, &data))
        Py_RETURN_NONE;

    PyObject *results[3] = {NULL, NULL, NULL}, *result = NULL;
    void *addresses[3] = {NULL, NULL, NULL};
    for (int i = 0; i < 3; i++) {
        if (PyTuple_GetItem(needs, i) != Py_True)
            Py_INCREF(results[i] = Py_None);
        else if (!(results[i] = i == 0 ? made_as(x, &data, &addresses[i]) : made_vector(args[5], &data, &addresses[i])))
            goto done;
    }
    if (!(call.threads = threads_for(&data))) goto done;
    call.stages = addresses[0] ? SUMS | APPLY : SUMS;
    if (PyTuple_Size(gradient) > 0) {
        if (!note_change(gradient)) goto done;
        call.stages |= UPDATE;
    }
    call.dtype = data.dtype;
    SET_LAYOUT(&call, &data.layout);
    call.dy = dy_view.data, call.x = data.view.data, call.dx = addresses[0];
    call.batch_sum_dy_xhat = addresses[1], call.batch_sum_dy = addresses[2];
    for (int64_t i = 0; i < plan->coefficients; i++)
        FIELD(&call, plan->backward_places[i]) = (char *)rows.data + i * data.layout.channels * (data.bits / 8);
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
"Told once: the capsule of DLPack's functions, the addresses of those of the library, what is called of torch, and\n"
"what makes the plan of a layer. Returns whether this DLPack is known here.");

static PyObject *initialize(PyObject *module, PyObject *args) {
    PyObject *capsule, *told[6];
    unsigned long long forward_address, backward_address;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKKOOOOOO:initialize", &capsule, &forward_address, &backward_address, &told[0],
                          &told[1], &told[2], &told[3], &told[4], &told[5]))
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
    {"batch_norm", (PyCFunction)(void (*)(void))batch_norm, METH_FASTCALL, batch_norm_doc},
    {"backward", (PyCFunction)(void (*)(void))backward, METH_FASTCALL, backward_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_step", "Steps in which nothing is out of the ordinary; see csrc/step.c.", -1, methods,
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
