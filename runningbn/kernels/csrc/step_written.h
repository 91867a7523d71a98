/* What a step writes to: the buffers of a layer, which are looked at before anything is changed, and its results, which
   are made here. */

/* The entry of a dict, borrowed; NULL, without an error, where there is none. */
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
    return is_vector(&view, data->layout.channels, data->bits) ? view.data : NULL;
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

/* A result if the library can write to it, with its address; if not, it is let go, NULL, with an error. */
static PyObject *writable(PyObject *result, const Data *like, void **address) {
    View view;
    if (!look_at_result(result, &view) || !(!like || is_like(&view, &like->view) || refuse())) {
        Py_XDECREF(result);
        return NULL;
    }
    *address = view.data;
    return result;
}

/* A result that lies as x, whose data these are. */
static PyObject *made_as(PyObject *x, const Data *data, void **address) {
    return writable(made_like(x), data, address);
}

/* A result over the channels, in the dtype of another tensor. */
static PyObject *made_vector(PyObject *like, const Data *data, void **address) {
    return writable(made_of_size(like, 0, data->layout.channels), NULL, address);
}
