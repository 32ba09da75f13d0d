// The Hadamard butterfly of 256 values in registers, and what int4 does to rows of them.
//
// A row is 16 consecutive values, PARTS registers. Value 16 r + l is lane l of row r: distances
// 16 to 128 are between registers, 1 to 8 within (for narrower registers, 8 and 4 between, too).
#pragma once

#include "../hpcsync_block_int4.h"
#include "vector.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Chars __attribute__((vector_size(VECTOR_BYTES)));

constexpr size_t PARTS = 16 / LANES;           // registers of a row
constexpr size_t REGISTERS = 256 / LANES;      // of a block
constexpr size_t GROUP = LANES == 16 ? 16 : 8;  // that a pass of the butterfly holds at once

#define INLINE inline __attribute__((always_inline))
// Compiled once, however often it is used.
#define APART __attribute__((noinline))

// What is done to a block: in narrow registers so long that a call is nothing to it, and that
// compiling it at every use would take longer than all else.
#if defined(__AVX2__)
#define BODY INLINE
#else
#define BODY APART
#endif

#define UNROLL _Pragma("GCC unroll 64")

// The value of the lane at distance STEP.
template <int STEP>
INLINE Vector partner(Vector v) {
#if defined(__AVX512F__)
    if (STEP == 1) return (Vector)_mm512_maskz_permute_ps(0xFFFF, (__m512)v, 0xB1);
    if (STEP == 2) return (Vector)_mm512_maskz_permute_ps(0xFFFF, (__m512)v, 0x4E);
    if (STEP == 4) return (Vector)_mm512_maskz_shuffle_f32x4(0xFFFF, (__m512)v, (__m512)v, 0xB1);
    return (Vector)_mm512_maskz_shuffle_f32x4(0xFFFF, (__m512)v, (__m512)v, 0x4E);
#elif defined(__AVX2__)
    if (STEP == 1) return (Vector)_mm256_permute_ps((__m256)v, 0xB1);
    if (STEP == 2) return (Vector)_mm256_permute_ps((__m256)v, 0x4E);
    return (Vector)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
#else
    return STEP == 1 ? (Vector){v[1], v[0], v[3], v[2]} : (Vector){v[2], v[3], v[0], v[1]};
#endif
}

// -0.0 in the lanes whose number has the bit STEP.
template <int STEP>
INLINE Words minus() {
    Words made = {};
    UNROLL for (size_t l = 0; l < LANES; ++l) made[l] = l & STEP ? 0x80000000u : 0u;
    return made;
}

// One stage within a register: (a, b) at distance STEP become (a + b, a - b).
template <int STEP>
INLINE Vector within(Vector v) {
    const Vector other = partner<STEP>(v);
#if defined(__AVX512F__)
    // The factors are 1 and -1: the product is exact, and rounded once as a sum.
    const Vector one = (Vector)_mm512_set1_ps(1.0f);
    return (Vector)_mm512_fmadd_ps((__m512)v, (__m512)((Words)one ^ minus<STEP>()), (__m512)other);
#else
    return other + (Vector)((Words)v ^ minus<STEP>());
#endif
}

// One stage between registers of v[0 .. COUNT), STRIDE registers apart.
template <size_t COUNT, size_t STRIDE, typename T>
INLINE void between(T *v) {
    UNROLL for (size_t i = 0; i < COUNT; ++i)
        if (!(i & STRIDE)) {
            const T a = v[i], b = v[i + STRIDE];
            v[i] = a + b;
            v[i + STRIDE] = a - b;
        }
}

template <size_t COUNT, typename T>
INLINE void all_between(T *v) {
    if constexpr (COUNT > 1) between<COUNT, 1>(v);
    if constexpr (COUNT > 2) between<COUNT, 2>(v);
    if constexpr (COUNT > 4) between<COUNT, 4>(v);
    if constexpr (COUNT > 8) between<COUNT, 8>(v);
}

// values[0 .. 256) times `before` through the butterfly: register i of the result in v[i].
INLINE void butterfly(const float *values, float before, Vector *v) {
    UNROLL for (size_t group = 0; group < REGISTERS; group += GROUP) {
        Vector held[GROUP];
        UNROLL for (size_t i = 0; i < GROUP; ++i) {
            Vector x = load(values + (group + i) * LANES) * before;
            x = within<2>(within<1>(x));
            if constexpr (LANES > 4) x = within<4>(x);
            if constexpr (LANES > 8) x = within<8>(x);
            held[i] = x;
        }
        all_between<GROUP>(held);
        UNROLL for (size_t i = 0; i < GROUP; ++i) v[group + i] = held[i];
    }
    if constexpr (REGISTERS > GROUP) {
        constexpr size_t GROUPS = REGISTERS / GROUP;
        UNROLL for (size_t i = 0; i < GROUP; ++i) {
            Vector held[GROUPS];
            UNROLL for (size_t g = 0; g < GROUPS; ++g) held[g] = v[g * GROUP + i];
            all_between<GROUPS>(held);
            UNROLL for (size_t g = 0; g < GROUPS; ++g) v[g * GROUP + i] = held[g];
        }
    }
}

// ---- whole numbers ---------------------------------------------------------------------------

INLINE Ints load_words(const uint8_t *from) {
    Ints value;
    __builtin_memcpy(&value, from, VECTOR_BYTES);
    return value;
}

INLINE void store_words(uint8_t *to, Ints value) { __builtin_memcpy(to, &value, VECTOR_BYTES); }

// LANES int8 as float.
INLINE Vector load_chars(const int8_t *from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_cvtepi32_ps(
        0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return (Vector){(float)from[0], (float)from[1], (float)from[2], (float)from[3]};
#endif
}

// The lowest bytes of four registers of whole numbers 0..255, 4 * LANES bytes, less 128.
INLINE void store_chars(int8_t *to, const Ints *v) {
#if defined(__AVX512F__)
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
    __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    __m512i bytes = _mm512_maskz_permutexvar_epi32(0xFFFF, order, _mm512_packus_epi16(low, high));
    _mm512_storeu_si512(to, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
#elif defined(__AVX2__)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
    __m256i high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)to, _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
#else
    for (size_t r = 0; r < 4; ++r)
        for (size_t l = 0; l < LANES; ++l) to[r * LANES + l] = (int8_t)(v[r][l] - 128);
#endif
}

INLINE Ints truncated(Vector v) { return __builtin_convertvector(v, Ints); }

INLINE Vector as_floats(Ints v) { return __builtin_convertvector(v, Vector); }

// One stage of pairs of int16 (a dword) STEP lanes apart.
template <int STEP>
INLINE Shorts within(Shorts v) {
    const Shorts other = (Shorts)partner<STEP>((Vector)v);
    const Shorts turned = (Shorts)((Ints)minus<STEP>() >> 31);  // -1 where the bit is set
    return other + ((v ^ turned) - turned);
}

// A whole block's 128 bytes to H q, without the scale: register i in v[i].
//
// Bits 4 and 7 of a coefficient's number are between registers of bytes, 5 between the bytes of
// shorts, 6 between the shorts of words, and the lanes' between: sums of bytes stay below 61, of
// shorts below 3841.
INLINE void integer_butterfly(const uint8_t *packed, Ints *v) {
    Chars bytes[2][2][PARTS];  // [bit 7][bit 4][part]
    UNROLL for (size_t half = 0; half < 2; ++half)
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            const Ints words = load_words(packed + 64 * half + VECTOR_BYTES * p);
            const Ints mask = Ints{} + 0x0F0F0F0F;
            const Chars low = (Chars)(words & mask), high = (Chars)((words >> 4) & mask);
            bytes[half][0][p] = low + high;
            bytes[half][1][p] = low - high;
        }
    UNROLL for (size_t bit4 = 0; bit4 < 2; ++bit4) {
        Shorts shorts[2][2][PARTS];  // [bit 7][bit 5][part]
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            const Chars a = bytes[0][bit4][p], b = bytes[1][bit4][p];
            const Shorts sums[2] = {(Shorts)(a + b), (Shorts)(a - b)};
            UNROLL for (size_t bit7 = 0; bit7 < 2; ++bit7) {
                const Shorts low = (sums[bit7] << 8) >> 8, high = sums[bit7] >> 8;
                shorts[bit7][0][p] = low + high;
                shorts[bit7][1][p] = low - high;
            }
        }
        UNROLL for (size_t bit7 = 0; bit7 < 2; ++bit7)
            UNROLL for (size_t bit5 = 0; bit5 < 2; ++bit5) {
                Shorts *row = shorts[bit7][bit5];
                UNROLL for (size_t p = 0; p < PARTS; ++p) {
                    Shorts x = within<2>(within<1>(row[p]));
                    if constexpr (LANES > 4) x = within<4>(x);
                    if constexpr (LANES > 8) x = within<8>(x);
                    row[p] = x;
                }
                all_between<PARTS>(row);
                UNROLL for (size_t p = 0; p < PARTS; ++p) {
                    const Ints low = ((Ints)row[p] << 16) >> 16, high = (Ints)row[p] >> 16;
                    const size_t r = 8 * bit7 + 2 * bit5 + bit4;
                    v[r * PARTS + p] = low + high;
                    v[(r + 4) * PARTS + p] = low - high;
                }
            }
    }
    v[0][0] -= 256 * HPCSYNC_INT4_ZERO;  // of all nibbles
}

}  // namespace
