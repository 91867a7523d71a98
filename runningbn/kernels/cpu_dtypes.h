/* All loops and updates for one instruction set: ISA, TARGET, LANES. Leaves `loops_<ISA>_all`, by dtype. */

#define VECTOR_OF_FLOATS JOIN(floats, ISA, vector)
#define VECTOR_OF_DOUBLES JOIN(doubles, ISA, vector)
#define VECTOR_OF_HALVES JOIN(halves, ISA, vector)
#define VECTOR_OF_BITS JOIN(bits, ISA, vector)
typedef float VECTOR_OF_FLOATS __attribute__((vector_size(4 * LANES), aligned(4)));
typedef double VECTOR_OF_DOUBLES __attribute__((vector_size(8 * LANES), aligned(8)));
typedef uint16_t VECTOR_OF_HALVES __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t VECTOR_OF_BITS __attribute__((vector_size(4 * LANES), aligned(4)));

#define REAL float
#define MAXIMUM 3.4028234663852886e38
#define TINY 1.1754943508222875e-38
#define EPSILON 1.1920928955078125e-07
#include "cpu_state.h"

#define DTYPE float
#define ELEMENT float
#define LOAD(p) (*(p))
#define STORE(p, value) (*(p) = (value))
#define LOAD_VECTOR(p) __builtin_convertvector(*(const VECTOR_OF_FLOATS *)(p), VECTOR_OF_DOUBLES)
#include "cpu_loops.h"
#undef DTYPE
#undef ELEMENT
#undef LOAD
#undef STORE
#undef LOAD_VECTOR

#define DTYPE bfloat16
#define ELEMENT uint16_t
#define LOAD(p) from_bfloat16(*(p))
#define STORE(p, value) (*(p) = to_bfloat16(value))
#define LOAD_VECTOR(p)                                                                                      \
    __builtin_convertvector(                                                                                \
        (VECTOR_OF_FLOATS)(__builtin_convertvector(*(const VECTOR_OF_HALVES *)(p), VECTOR_OF_BITS) << 16), \
        VECTOR_OF_DOUBLES)
#include "cpu_loops.h"
#undef DTYPE
#undef ELEMENT
#undef LOAD
#undef STORE
#undef LOAD_VECTOR
#undef REAL
#undef MAXIMUM
#undef TINY
#undef EPSILON

#define REAL double
#define MAXIMUM 1.7976931348623157e308
#define TINY 2.2250738585072014e-308
#define EPSILON 2.220446049250313e-16
#include "cpu_state.h"

#define DTYPE double
#define ELEMENT double
#define LOAD(p) (*(p))
#define STORE(p, value) (*(p) = (value))
#define LOAD_VECTOR(p) (*(const VECTOR_OF_DOUBLES *)(p))
#include "cpu_loops.h"
#undef DTYPE
#undef ELEMENT
#undef LOAD
#undef STORE
#undef LOAD_VECTOR
#undef REAL
#undef MAXIMUM
#undef TINY
#undef EPSILON

static const Loops *const JOIN(loops, ISA, all)[] = {
    &JOIN(loops, ISA, float), &JOIN(loops, ISA, bfloat16), &JOIN(loops, ISA, double)};

#undef VECTOR_OF_FLOATS
#undef VECTOR_OF_DOUBLES
#undef VECTOR_OF_HALVES
#undef VECTOR_OF_BITS
#undef ISA
#undef TARGET
#undef LANES
