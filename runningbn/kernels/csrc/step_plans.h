/* What step.c knows of layers before it looks at their tensors: plans, made by `_plan_of` in cpu_step.py and kept for
   the layers that come next. */

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
