// Rows of bfloat16 and float16 to float32 and back, to nearest even; the bits of hpcsync_block.h.
#pragma once

#include "../hpcsync_block.h"
#include "vector.h"

namespace {

inline void widen_bf16(const uint16_t *from, size_t n, float *to) {
    for (size_t i = 0; i < n; ++i) to[i] = hpcsync_from_bf16(from[i]);
}

inline void narrow_bf16(const float *from, size_t n, uint16_t *to) {
    for (size_t i = 0; i < n; ++i) to[i] = hpcsync_to_bf16(from[i]);
}

#if defined(__AVX512F__)
// g++ 12 warns of the forms without a mask.
constexpr __mmask16 ALL = 0xFFFF;
#endif

inline void widen_f16(const uint16_t *from, size_t n, float *to) {
    size_t i = 0;
#if defined(__AVX512F__)
    for (; i < n / 16 * 16; i += 16)
        _mm512_storeu_ps(
            to + i, _mm512_maskz_cvtph_ps(ALL, _mm256_loadu_si256((const __m256i *)(from + i))));
#elif defined(__F16C__)
    for (; i < n / 8 * 8; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; ++i) to[i] = hpcsync_from_f16(from[i]);
}

// The processor's conversion keeps a NaN's payload: it is given the quiet NaN of its sign before.
inline void narrow_f16(const float *from, size_t n, uint16_t *to) {
    size_t i = 0;
#if defined(__AVX512F__)
    const __m512i sign = _mm512_set1_epi32(int(0x80000000u)), quiet = _mm512_set1_epi32(0x7FC00000);
    for (; i < n / 16 * 16; i += 16) {
        __m512 x = _mm512_loadu_ps(from + i);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i signs = _mm512_and_si512(_mm512_castps_si512(x), sign);
        x = _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(_mm512_or_si512(signs, quiet)));
        _mm256_storeu_si256((__m256i *)(to + i),
                            _mm512_maskz_cvtps_ph(ALL, x, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__F16C__)
    const __m256 sign = _mm256_set1_ps(-0.0f),
                 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    for (; i < n / 8 * 8; i += 8) {
        __m256 x = _mm256_loadu_ps(from + i);
        const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        x = _mm256_blendv_ps(x, _mm256_or_ps(_mm256_and_ps(x, sign), quiet), nan);
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) to[i] = hpcsync_to_f16(from[i], false, 0);
}

}  // namespace
