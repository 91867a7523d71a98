/* Tensors as step.c sees them: their memory, and whether the library takes it. Nothing here changes anything. */

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
static int (*view_of)(void *tensor, View *out); /* told by `initialize` */
enum { CPU = 1 };
enum { SIGNED = 0, REALS = 2, BFLOATS = 4 };

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
    Layout layout;
    int64_t dtype, elements;
    int bits; /* of the statistics */
} Data;

static int look_at_data(PyObject *x, Data *data) {
    const View *v = &data->view;
    if (!look(x, &data->view)) return 0;
    if (is_real(v, 32))
        data->dtype = FLOAT32, data->bits = 32;
    else if (is_real(v, 64))
        data->dtype = FLOAT64, data->bits = 64;
    else if (v->dtype.code == BFLOATS && v->dtype.bits == 16)
        data->dtype = BFLOAT16, data->bits = 32;
    else if (is_real(v, 16))
        data->dtype = FLOAT16, data->bits = 32;
    else
        return 0;
    const Layout *l = &data->layout;
    if (!look_at_layout(v->shape, v->strides, v->dimensions, &data->layout)) return 0;
    data->elements = l->outer * l->channels * l->inner;
    return is_literal(x);
}

/* Whether a gradient is laid out as x. */
static int is_like(const View *dy, const View *x) {
    if (dy->dimensions != x->dimensions || dy->dtype.code != x->dtype.code || dy->dtype.bits != x->dtype.bits) return 0;
    for (int i = 0; i < x->dimensions; i++)
        if (dy->shape[i] != x->shape[i]) return 0;
    return lies_as(dy->strides, x->shape, x->strides, x->dimensions);
}

/* The threads of torch, where there is work for more than one; 0 for an error. */
static int64_t threads_for(const Data *data) {
    if (data->elements < 2 * LARGE) return 1;
    PyObject *number = PyObject_CallNoArgs(get_num_threads);
    if (!number) return 0;
    const long threads = PyLong_AsLong(number);
    Py_DECREF(number);
    if (threads == -1 && PyErr_Occurred()) return 0;
    return threads > 1 ? threads : 1;
}
