/* bfloat16 and float16 as floats and back, rounded to the nearest, ties to even; any NaN becomes torch's. Without
   branches and calls, so that compilers vectorise loops over them, and for any processor. */

#ifndef RUNNINGBN_CPU_SIXTEEN_BITS_H
#define RUNNINGBN_CPU_SIXTEEN_BITS_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float from_bfloat16(uint16_t value) { return float_of_bits((uint32_t)value << 16); }

static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of_float(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

/* The fields of a float16 are moved to their places in a float, whose exponent is then too small by 112. Those without
   an exponent are multiples of 2^-24. */
static inline float from_float16(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const float normal = float_of_bits(magnitude + (112u << 23)), huge = float_of_bits(magnitude + (224u << 23));
    const float subnormal = float_of_bits((113u << 23) + magnitude) - float_of_bits(113u << 23);
    const float value = magnitude < 1u << 23 ? subnormal : magnitude >= 31u << 23 ? huge : normal;
    return float_of_bits(bits_of_float(value) | (uint32_t)(half & 0x8000) << 16);
}

/* Adding 2^13 times the power of two of a float, or of the smallest normal float16 if that is more, rounds the float:
   the last bits of the sum are then those of the float16. */
static inline uint16_t to_float16(float value) {
    const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
    const uint32_t exponent = (magnitude & 0x7f800000) > 113u << 23 ? magnitude & 0x7f800000 : 113u << 23;
    const uint32_t sum = bits_of_float(float_of_bits(magnitude) + float_of_bits(exponent + (13u << 23)));
    const uint32_t rounded = ((exponent >> 23) - 113u) * 1024u + (sum - (exponent + (13u << 23)));
    const uint32_t finite = rounded < 0x7c00 ? rounded : 0x7c00;
    return (uint16_t)((value != value ? 0x7e00 : magnitude >= 143u << 23 ? 0x7c00 : finite) | (bits >> 16 & 0x8000));
}

#endif
