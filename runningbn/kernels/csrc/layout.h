/* How an input lies in memory, as the kernels see it: `data_of` in cpu_calls.py. */

#ifndef RUNNINGBN_LAYOUT_H
#define RUNNINGBN_LAYOUT_H

#include <stdint.h>

/* The fields of a call: rows (outer, channels), or planes (outer, channels, inner). */
typedef struct {
    int64_t rows, outer, channels, inner;
} Layout;

/* Sets those of a Forward or a Backward. */
#define SET_LAYOUT(call, layout)                                           \
    ((call)->rows = (layout)->rows, (call)->outer = (layout)->outer,       \
     (call)->channels = (layout)->channels, (call)->inner = (layout)->inner)

/* Whether x.permute(0, *order, 1) or, without `channels_last`, x itself is contiguous. */
static inline int is_dense(const int64_t *shape, const int64_t *strides, int64_t dimensions, int channels_last) {
    int64_t expected = 1;
    if (channels_last) {
        if (shape[1] != 1 && strides[1] != 1) return 0;
        expected = shape[1];
    }
    for (int64_t i = dimensions - 1; i >= 0; i--) {
        if (channels_last && i == 1) continue;
        if (shape[i] != 1 && strides[i] != expected) return 0;
        expected *= shape[i];
    }
    return 1;
}

/* Of (N, C, *) with at least one element; 0 if it is neither rows nor planes. */
static inline int look_at_layout(const int64_t *shape, const int64_t *strides, int64_t dimensions, Layout *l) {
    if (dimensions < 2) return 0;
    l->outer = shape[0], l->channels = shape[1], l->inner = 1;
    for (int64_t i = 2; i < dimensions; i++) l->inner *= shape[i];
    if (l->outer * l->channels * l->inner == 0) return 0;
    if (is_dense(shape, strides, dimensions, 0)) {
        l->rows = l->channels > 1 && l->inner == 1;
        if (l->channels == 1) l->inner *= l->outer, l->outer = 1;
    } else if (dimensions > 2 && is_dense(shape, strides, dimensions, 1)) {
        l->rows = 1, l->outer *= l->inner, l->inner = 1;
    } else {
        return 0;
    }
    return 1;
}

/* Whether a tensor of the same shape lies as x does: `like_data` in cpu_calls.py has nothing to copy. */
static inline int lies_as(const int64_t *strides, const int64_t *shape, const int64_t *strides_of_x, int64_t dimensions) {
    if (is_dense(shape, strides_of_x, dimensions, 0)) return is_dense(shape, strides, dimensions, 0);
    for (int64_t i = 0; i < dimensions; i++)
        if (strides[i] != strides_of_x[i]) return 0;
    return 1;
}

#endif
