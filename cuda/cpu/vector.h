// The widest registers of the instruction set, as GCC's vector types: the same source for all.
#pragma once

#include <cstddef>
#include <cstdint>

// All of them take longer to parse than most of the files here.
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(HPCSYNC_X86)
#include <xmmintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr size_t VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr size_t VECTOR_BYTES = 32;
#else
constexpr size_t VECTOR_BYTES = 16;
#endif

constexpr size_t LANES = VECTOR_BYTES / 4;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

inline __attribute__((always_inline)) Vector load(const float *from) {
    Vector value;
    __builtin_memcpy(&value, from, VECTOR_BYTES);
    return value;
}

inline __attribute__((always_inline)) void store(float *to, Vector value) {
    __builtin_memcpy(to, &value, VECTOR_BYTES);
}

// Past the caches; `to` is aligned to VECTOR_BYTES.
inline __attribute__((always_inline)) void stream(float *to, Vector value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE2__)
    _mm_stream_ps(to, (__m128)value);
#else
    store(to, value);
#endif
}

// Outputs of so many bytes leave the cache before they are read again. Written past it they spare
// reading their old lines: a quarter of the time of a sum of two, a third of that of decoding.
constexpr size_t STREAM_BYTES = size_t(4) << 20;

inline void stream_row(float *to, const float *from, size_t n) {
    size_t i = 0;
    for (; i < n && (uintptr_t)(to + i) % VECTOR_BYTES; ++i) to[i] = from[i];
    for (; i + LANES <= n; i += LANES) stream(to + i, load(from + i));
    for (; i < n; ++i) to[i] = from[i];
}

// Before other threads may see what was streamed.
inline __attribute__((always_inline)) void stream_end() {
#ifdef HPCSYNC_X86
    _mm_sfence();
#endif
}

}  // namespace
