// Block maths of the codecs, once for all: CPU kernels (g++), GPU kernels (nvcc, NVRTC) and the
// tests' host build of these. NumPy forms with the same bits stand beside the codecs.
//
// Compilers must keep every operation as written: no fused multiply-add (g++ -ffp-contract=off,
// nvcc and NVRTC --fmad=false), no flushing of denormals, IEEE division and no reordering.
#pragma once

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstddef>
#include <cstdint>
#include <cstring>
#endif

// Before every function of these headers. They are static: an inline function that the linker
// could share would carry one file's instruction set into another's.
#ifdef __CUDACC__
#define HPCSYNC_HD static __host__ __device__ __forceinline__
#else
#define HPCSYNC_HD static inline __attribute__((always_inline))
#endif

// ---- bits ------------------------------------------------------------------------------------

HPCSYNC_HD uint32_t hpcsync_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
#endif
}

HPCSYNC_HD float hpcsync_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
#endif
}

#define HPCSYNC_INF_BITS 0x7F800000u
#define HPCSYNC_NAN_BITS 0x7FC00000u
#define HPCSYNC_FLT_MAX 3.402823466e+38f

// |value| as bits. They are ordered as the values are, then Inf, then NaN: the largest of a block
// shows at once whether the block holds one of these.
HPCSYNC_HD uint32_t hpcsync_abs_bits(float value) { return hpcsync_bits(value) & 0x7FFFFFFFu; }

HPCSYNC_HD bool hpcsync_finite(float value) { return hpcsync_abs_bits(value) < HPCSYNC_INF_BITS; }

// ---- random numbers --------------------------------------------------------------------------

// Two words for a seed, by the finaliser of splitmix64 (Steele, Lea and Flood, 2014). Loops
// compute them once.
struct hpcsync_key {
    uint32_t first, second;
};

HPCSYNC_HD hpcsync_key hpcsync_random_key(uint64_t seed) {
    uint64_t z = seed + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    hpcsync_key key = {(uint32_t)z, (uint32_t)(z >> 32)};
    return key;
}

// 32 random bits for an index: two multiply-xorshift rounds with the constants of Ettinger's
// "triple32/lowbias32" search (hash-prospector), the key's words before each.
HPCSYNC_HD uint32_t hpcsync_random_at(hpcsync_key key, uint32_t index) {
    uint32_t x = index ^ key.first;
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x += key.second;
    x ^= x >> 15;
    x *= 0x735A2D97u;
    x ^= x >> 15;
    return x;
}

HPCSYNC_HD uint32_t hpcsync_random(uint64_t seed, uint32_t index) {
    return hpcsync_random_at(hpcsync_random_key(seed), index);
}

// The upper 24 of 32 random bits as a float in [0, 1).
HPCSYNC_HD float hpcsync_unit(uint32_t random) {
    return (float)(int32_t)(random >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

// ---- rounding to integers --------------------------------------------------------------------

// The nearest integer, ties to even, for |y| < 2^22: the sum's last bit is worth one. A NaN gives
// some integer.
HPCSYNC_HD int32_t hpcsync_round(float y) {
    return (int32_t)(hpcsync_bits(y + 12582912.0f) - 0x4B400000u);
}

// The integer below, for |y| < 2^22.
HPCSYNC_HD int32_t hpcsync_floor(float y) {
    int32_t nearest = hpcsync_round(y);
    return nearest - ((float)nearest > y);
}

// Up or down at random, so that the mean is y: unit is one of hpcsync_unit.
HPCSYNC_HD int32_t hpcsync_round_random(float y, float unit) { return hpcsync_floor(y + unit); }

HPCSYNC_HD int32_t hpcsync_clamp(int32_t value, int32_t limit) {
    value = value > limit ? limit : value;
    return value < -limit ? -limit : value;
}

// ---- scale of a block ------------------------------------------------------------------------

struct hpcsync_scale {
    float scale;    // what integers are multiplied by when decoded; NaN if the block holds a NaN or
                    // Inf; 0 if the block is coded as zeros
    float inverse;  // what values are multiplied by when coded; 0 where scale is 0 or NaN
};

// Of a block whose largest magnitude has these bits (hpcsync_abs_bits), coded as numbers up to
// `levels`. Blocks of zeros, and those so small that the inverse is not finite, are coded as zeros
// (the error store keeps what they held). The scale is bounded so that levels * scale is finite.
HPCSYNC_HD hpcsync_scale hpcsync_block_scale(uint32_t largest_bits, float levels) {
    hpcsync_scale made = {0.0f, 0.0f};
    if (largest_bits >= HPCSYNC_INF_BITS) {
        made.scale = hpcsync_float(HPCSYNC_NAN_BITS);
        return made;
    }
    float largest = hpcsync_float(largest_bits);
    if (largest == 0.0f) return made;
    float inverse = levels / largest;
    if (!(inverse <= HPCSYNC_FLT_MAX)) return made;
    float scale = largest / levels;
    float most = hpcsync_float(hpcsync_bits(HPCSYNC_FLT_MAX / levels) - 1u);
    made.scale = scale < most ? scale : most;
    made.inverse = inverse;
    return made;
}

// ---- bfloat16 --------------------------------------------------------------------------------

HPCSYNC_HD float hpcsync_from_bf16(uint16_t code) { return hpcsync_float((uint32_t)code << 16); }

// Rounded by an addend to the lower half: 0x7FFF and the last kept bit to nearest even, 16 random
// bits at random. NaN becomes the quiet NaN of its sign.
HPCSYNC_HD uint16_t hpcsync_bf16_plus(float value, uint32_t addend) {
    uint32_t bits = hpcsync_bits(value), sign = bits & 0x80000000u, size = bits & 0x7FFFFFFFu;
    uint32_t rounded = size >= HPCSYNC_INF_BITS ? size : size + addend;
    rounded = size > HPCSYNC_INF_BITS ? HPCSYNC_NAN_BITS : rounded;
    return (uint16_t)((sign | rounded) >> 16);
}

HPCSYNC_HD uint16_t hpcsync_to_bf16(float value) {
    return hpcsync_bf16_plus(value, 0x7FFFu + ((hpcsync_bits(value) >> 16) & 1u));
}

HPCSYNC_HD uint16_t hpcsync_to_bf16_random(float value, uint32_t random) {
    return hpcsync_bf16_plus(value, random >> 16);
}

// ---- floats of few bits ----------------------------------------------------------------------

// The rounded code of a finite magnitude, given by its bits, in a format whose floats have the
// upper 31 - `drop` bits of a float's magnitude and whose least normal exponent is `least`. Normal
// numbers are rounded by an addend to the bits that are dropped, and carry into the exponent;
// denormal ones are counted in units of the last place. The code may be beyond the format's last.
HPCSYNC_HD uint32_t hpcsync_narrow(uint32_t size, int drop, int least, bool at_random,
                                   uint32_t random) {
    const uint32_t half = (1u << (drop - 1)) - 1u + ((size >> drop) & 1u);
    const uint32_t addend = at_random ? random >> (32 - drop) : half;
    const uint32_t normal =
        ((size + addend) >> drop) - ((uint32_t)(126 + least) << (23 - drop));
    const bool tiny = size < (uint32_t)(127 + least) << 23;
    // Larger ones are not counted: they would not fit.
    const float ulps = hpcsync_float(tiny ? size : 0u) *
                       hpcsync_float((uint32_t)(127 + 23 - drop - least) << 23);
    const int32_t count =
        at_random ? hpcsync_round_random(ulps, hpcsync_unit(random)) : hpcsync_round(ulps);
    return tiny ? (uint32_t)count : normal;
}

// float16 (IEEE binary16); too large becomes Inf, NaN the quiet NaN of its sign. `random` is used
// if `at_random` only; else to nearest even.
HPCSYNC_HD uint16_t hpcsync_to_f16(float value, bool at_random, uint32_t random) {
    const uint32_t size = hpcsync_abs_bits(value), sign = (hpcsync_bits(value) >> 16) & 0x8000u;
    uint32_t code = hpcsync_narrow(size, 13, -14, at_random, random);
    code = size >= 0x47800000u ? 0x7C00u : code;  // 65536 and more, and Inf
    code = size > HPCSYNC_INF_BITS ? 0x7E00u : code;
    return (uint16_t)(sign | code);
}

HPCSYNC_HD float hpcsync_from_f16(uint16_t code) {
    const uint32_t size = code & 0x7FFFu, sign = (uint32_t)(code & 0x8000u) << 16;
    const float normal = hpcsync_float((size << 13) + (112u << 23));
    const float tiny = hpcsync_float((size << 13) + (113u << 23)) - 6.103515625e-5f;  // 2^-14
    uint32_t bits = hpcsync_bits(size < 0x0400u ? tiny : normal);
    bits = size >= 0x7C00u ? (size << 13) + (224u << 23) : bits;
    return hpcsync_float(sign | bits);
}

// e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433): no Inf, largest 448. These two are for
// values within a scaled block: finite, at most a rounding above 448 (which become 448), and codes
// without NaN (0x7F).
HPCSYNC_HD uint8_t hpcsync_to_e4m3(float value, bool at_random, uint32_t random) {
    const uint32_t size = hpcsync_abs_bits(value), sign = (hpcsync_bits(value) >> 24) & 0x80u;
    const uint32_t code = hpcsync_narrow(size, 20, -6, at_random, random);
    return (uint8_t)(sign | (code > 0x7Eu ? 0x7Eu : code));
}

HPCSYNC_HD float hpcsync_from_e4m3(uint8_t code) {
    const uint32_t size = code & 0x7Fu, sign = (uint32_t)(code & 0x80u) << 24;
    const float normal = hpcsync_float((size << 20) + (120u << 23));
    const float tiny = hpcsync_float((size << 20) + (121u << 23)) - 0.015625f;  // 2^-6
    return hpcsync_float(sign | hpcsync_bits(size < 8u ? tiny : normal));
}

// ---- the divisor of a sum --------------------------------------------------------------------

// Whether dividing by it is the same as multiplying by its reciprocal: a power of two.
HPCSYNC_HD bool hpcsync_is_power_of_two(float divisor) {
    uint32_t bits = hpcsync_bits(divisor);
    return (bits & 0x007FFFFFu) == 0 && bits >= 0x00800000u && bits < 0x7F000000u;
}
