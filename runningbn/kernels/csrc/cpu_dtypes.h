/* All loops and updates for one instruction set: ISA, TARGET, LANES. Leaves `loops_<ISA>_all`, by dtype. */

/* LANES elements as doubles. The compiler's own conversion of vectors takes detours. */
#if LANES == 8
#define VECTOR_OF_FLOATS(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define VECTOR_OF_BFLOAT16S(p)                 \
    _mm512_cvtps_pd(_mm256_castsi256_ps(       \
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16)))
#define VECTOR_OF_FLOAT16S(p) _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define VECTOR_OF_DOUBLES(p) _mm512_loadu_pd(p)
#define FLOATS __m512
#define FLOATS_OF_FLOATS(p) _mm512_loadu_ps(p)
#define NO_FLOATS _mm512_setzero_ps()
#define FLOATS_OF_BFLOAT16S(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define FLOATS_OF_FLOAT16S(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define FLOAT16S_OF_FLOATS(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define LOW(v) _mm512_cvtps_pd(_mm512_castps512_ps256(v))
#define HIGH(v) _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))
#define FLOATS_OF(low, high) \
    _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1)
#elif LANES == 4
#define VECTOR_OF_FLOATS(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define VECTOR_OF_BFLOAT16S(p) \
    _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(p))), 16)))
#define VECTOR_OF_FLOAT16S(p) _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(p))))
#define VECTOR_OF_DOUBLES(p) _mm256_loadu_pd(p)
#define FLOATS __m256
#define FLOATS_OF_FLOATS(p) _mm256_loadu_ps(p)
#define NO_FLOATS _mm256_setzero_ps()
#define FLOATS_OF_BFLOAT16S(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define FLOATS_OF_FLOAT16S(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define FLOAT16S_OF_FLOATS(p, v) _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define LOW(v) _mm256_cvtps_pd(_mm256_castps256_ps128(v))
#define HIGH(v) _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))
#define FLOATS_OF(low, high) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1)
#else
#define VECTOR_OF_FLOATS(p) (pair){(p)[0], (p)[1]}
#define VECTOR_OF_BFLOAT16S(p) (pair){from_bfloat16((p)[0]), from_bfloat16((p)[1])}
#define VECTOR_OF_FLOAT16S(p) (pair){from_float16((p)[0]), from_float16((p)[1])}
#define VECTOR_OF_DOUBLES(p) (pair){(p)[0], (p)[1]}
#endif

#define REAL float
#define MAXIMUM 3.4028234663852886e38
#define TINY 1.1754943508222875e-38
#define EPSILON 1.1920928955078125e-07
#include "cpu_state.h"
#include "cpu_gradient.h"

#define DTYPE float
#define SINGLE_RUNS 0
#define SINGLE_ROWS (LANES > 2)
#define MAP_VECTORS 0
#define ELEMENT float
#define LOAD(p) (*(p))
#define STORE(p, value) (*(p) = (value))
#define LOAD_VECTOR(p) VECTOR_OF_FLOATS(p)
#define LOAD_FLOATS(p) FLOATS_OF_FLOATS(p)
#include "cpu_loops.h"

#define DTYPE bfloat16
#define SINGLE_RUNS (LANES > 2)
#define SINGLE_ROWS (LANES > 2)
#define MAP_VECTORS 0
#define ELEMENT uint16_t
#define LOAD(p) from_bfloat16(*(p))
#define STORE(p, value) (*(p) = to_bfloat16(value))
#define LOAD_VECTOR(p) VECTOR_OF_BFLOAT16S(p)
#define LOAD_FLOATS(p) FLOATS_OF_BFLOAT16S(p)
#include "cpu_loops.h"

#define DTYPE float16
#define SINGLE_RUNS (LANES > 2)
#define SINGLE_ROWS (LANES > 2)
#define MAP_VECTORS (LANES > 2)
#define ELEMENT uint16_t
#define LOAD(p) from_float16(*(p))
#define STORE(p, value) (*(p) = to_float16(value))
#define LOAD_VECTOR(p) VECTOR_OF_FLOAT16S(p)
#define LOAD_FLOATS(p) FLOATS_OF_FLOAT16S(p)
#define STORE_FLOATS(p, v) FLOAT16S_OF_FLOATS(p, v)
#include "cpu_loops.h"
#undef REAL
#undef MAXIMUM
#undef TINY
#undef EPSILON

#define REAL double
#define MAXIMUM 1.7976931348623157e308
#define TINY 2.2250738585072014e-308
#define EPSILON 2.220446049250313e-16
#include "cpu_state.h"
#include "cpu_gradient.h"

#define DTYPE double
#define SINGLE_RUNS 0
#define SINGLE_ROWS 0
#define MAP_VECTORS 0
#define ELEMENT double
#define LOAD(p) (*(p))
#define STORE(p, value) (*(p) = (value))
#define LOAD_VECTOR(p) VECTOR_OF_DOUBLES(p)
#include "cpu_loops.h"
#undef REAL
#undef MAXIMUM
#undef TINY
#undef EPSILON

static const Loops *const JOIN(loops, ISA, all)[] = {
    &JOIN(loops, ISA, float), &JOIN(loops, ISA, bfloat16), &JOIN(loops, ISA, float16), &JOIN(loops, ISA, double)};

#undef FLOATS
#undef NO_FLOATS
#undef FLOATS_OF_FLOATS
#undef FLOATS_OF_BFLOAT16S
#undef FLOATS_OF_FLOAT16S
#undef FLOAT16S_OF_FLOATS
#undef LOW
#undef HIGH
#undef FLOATS_OF
#undef VECTOR_OF_FLOATS
#undef VECTOR_OF_BFLOAT16S
#undef VECTOR_OF_FLOAT16S
#undef VECTOR_OF_DOUBLES
#undef ISA
#undef TARGET
#undef LANES
