// onebit: signs and the mean magnitude of blocks of 1024. The last block, where it is partial, is
// worked on in a copy padded with zeros, which count in no sum.
#include "../hpcsync_block_onebit.h"
#include "kernel.h"
#include "vector.h"

namespace HPCSYNC_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

constexpr size_t BLOCK = HPCSYNC_ONEBIT_BLOCK;
constexpr size_t PARTS = 16 / LANES;  // registers of 16 values

// Values from which decoding to aligned memory goes past the caches: 4 MiB.
constexpr size_t STREAMED = size_t(1) << 20;

INLINE Vector magnitude(Vector v) { return (Vector)((Words)v & 0x7FFFFFFFu); }

// The sum of |h| * factor over a block in the order of 16 lanes.
INLINE float block_sum(const float *h, float factor) {
    Vector sums[PARTS] = {};
    for (size_t i = 0; i < BLOCK; i += 16)
        UNROLL for (size_t p = 0; p < PARTS; ++p)
            sums[p] += magnitude(load(h + i + p * LANES)) * factor;
    float lanes[16];
    UNROLL for (size_t p = 0; p < PARTS; ++p) store(lanes + p * LANES, sums[p]);
    return hpcsync_onebit_total(lanes);
}

// Sign bits of 16 values.
INLINE uint16_t signs(const float *h) {
#if defined(__AVX512F__)
    return (uint16_t)_mm512_movepi32_mask((__m512i)load(h));
#elif defined(__AVX2__)
    return (uint16_t)((unsigned)_mm256_movemask_ps((__m256)load(h)) |
                      (unsigned)_mm256_movemask_ps((__m256)load(h + 8)) << 8);
#else
    uint32_t bits = 0;
    UNROLL for (uint32_t i = 0; i < 16; ++i) bits |= (hpcsync_bits(h[i]) >> 31) << i;
    return (uint16_t)bits;
#endif
}

// Part p of 16 values of a scale with the signs of 16 bits.
INLINE Vector values(uint16_t bits, size_t p, Vector scale) {
#if defined(__AVX512F__)
    (void)p;
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    return (Vector)_mm512_mask_xor_epi32((__m512i)scale, bits, (__m512i)scale, sign);
#else
    Words select;
    UNROLL for (size_t l = 0; l < LANES; ++l) select[l] = 1u << l;
    const Words here = (Words{} + (uint32_t)(bits >> (p * LANES))) & select;
    return (Vector)((Words)scale ^ ((Words)(here == select) & 0x80000000u));
#endif
}

// Codes a block: x + error, both of BLOCK values, of which `count` are of the piece. Returns the
// scale; error becomes what was lost.
template <bool FEEDBACK>
INLINE float encode_block(const float *x, float *error, uint32_t count, uint8_t *out) {
    float h[BLOCK] __attribute__((aligned(64)));
    Vector sums[PARTS] = {};
    for (size_t i = 0; i < BLOCK; i += 16)
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            const size_t at = i + p * LANES;
            Vector v = load(x + at);
            if constexpr (FEEDBACK) v = v + load(error + at);
            store(h + at, v);
            sums[p] += magnitude(v);
        }
    float lanes[16];
    UNROLL for (size_t p = 0; p < PARTS; ++p) store(lanes + p * LANES, sums[p]);
    const float total = hpcsync_onebit_total(lanes);
    const float shrunk = hpcsync_finite(total) ? 0.0f : block_sum(h, HPCSYNC_ONEBIT_SHRINK);
    const float scale = hpcsync_onebit_scale(total, shrunk, count);
    if (!hpcsync_finite(scale)) {
        std::memset(out, 0, BLOCK / 8);
        return scale;
    }
    const Vector plus = Vector{} + scale;
    for (size_t i = 0; i < BLOCK; i += 16) {
        const uint16_t bits = signs(h + i);
        std::memcpy(out + i / 8, &bits, 2);
        if constexpr (FEEDBACK)
            UNROLL for (size_t p = 0; p < PARTS; ++p) {
                const size_t at = i + p * LANES;
                store(error + at, load(h + at) - values(bits, p, plus));
            }
    }
    return scale;
}

INLINE float load_scale(const uint8_t *from) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
}

enum class Out { SET, ADDED, STREAMED };

template <Out OUT>
INLINE void decode_block(const uint8_t *packed, float scale, float *out) {
    const Vector plus = Vector{} + scale;
    for (size_t i = 0; i < BLOCK; i += 16) {
        uint16_t bits;
        std::memcpy(&bits, packed + i / 8, 2);
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            float *to = out + i + p * LANES;
            const Vector value = values(bits, p, plus);
            if constexpr (OUT == Out::STREAMED) stream(to, value);
            else store(to, OUT == Out::ADDED ? load(to) + value : value);
        }
    }
}

size_t blocks_of(size_t n) { return (n + BLOCK - 1) / BLOCK; }

// The partial block at the end.
void decode_end(const uint8_t *packed, float scale, size_t n, bool add, float *out) {
    for (size_t i = 0; i < n; ++i) {
        const float value = hpcsync_onebit_value(scale, (packed[i / 8] >> (i % 8)) & 1u);
        out[i] = add ? out[i] + value : value;
    }
}

template <bool FEEDBACK>
float encode_end(const float *x, float *error, size_t n, uint8_t *out) {
    float padded[BLOCK] = {}, lost[BLOCK] = {};
    uint8_t packed[BLOCK / 8];
    std::memcpy(padded, x, 4 * n);
    if (FEEDBACK) std::memcpy(lost, error, 4 * n);
    const float scale = encode_block<FEEDBACK>(padded, lost, (uint32_t)n, packed);
    if (FEEDBACK) std::memcpy(error, lost, 4 * n);
    std::memcpy(out, packed, (n + 7) / 8);
    return scale;
}

template <Out OUT>
void decode_piece(const uint8_t *in, size_t n, float *out) {
    const size_t whole = n / BLOCK;
    const uint8_t *packed = in + 4 * blocks_of(n);
    for (size_t b = 0; b < whole; ++b)
        decode_block<OUT>(packed + b * (BLOCK / 8), load_scale(in + 4 * b), out + b * BLOCK);
    if (OUT == Out::STREAMED) stream_end();
    if (n % BLOCK)
        decode_end(packed + whole * (BLOCK / 8), load_scale(in + 4 * whole), n % BLOCK,
                   OUT == Out::ADDED, out + whole * BLOCK);
}

// Codes the `n` values of block b, at x, of a piece whose payload begins at `packed`.
template <bool FEEDBACK>
INLINE void encode_at(const float *x, float *error, size_t b, size_t n, uint8_t *scales,
                      uint8_t *packed) {
    float *errors = FEEDBACK ? error + b * BLOCK : nullptr;
    uint8_t *to = packed + b * (BLOCK / 8);
    const float scale = n == BLOCK ? encode_block<FEEDBACK>(x, errors, BLOCK, to)
                                   : encode_end<FEEDBACK>(x, errors, n, to);
    std::memcpy(scales + 4 * b, &scale, 4);
}

template <bool FEEDBACK>
void encode_piece(const float *x, float *error, size_t n, uint8_t *out) {
    uint8_t *packed = out + 4 * blocks_of(n);
    for (size_t b = 0; b < n / BLOCK; ++b)
        encode_at<FEEDBACK>(x + b * BLOCK, error, b, BLOCK, out, packed);
    if (n % BLOCK) encode_at<FEEDBACK>(x + n - n % BLOCK, error, n / BLOCK, n % BLOCK, out, packed);
}

// The sum over ranks of the n values of block b, divided, in `total`.
INLINE void sum_block(const float *own, size_t place, const uint8_t *const *others,
                      size_t n_others, size_t piece, size_t b, size_t n, float divisor,
                      float *total) {
    for (size_t rank = 0; rank <= n_others; ++rank) {
        if (rank == place) {
            for (size_t i = 0; i < n; ++i) total[i] = rank ? total[i] + own[i] : own[i];
            continue;
        }
        const uint8_t *in = others[rank - (rank > place)];
        const uint8_t *packed = in + 4 * blocks_of(piece) + b * (BLOCK / 8);
        const float scale = load_scale(in + 4 * b);
        if (n < BLOCK) decode_end(packed, scale, n, rank != 0, total);
        else if (rank) decode_block<Out::ADDED>(packed, scale, total);
        else decode_block<Out::SET>(packed, scale, total);
    }
    if (hpcsync_is_power_of_two(divisor)) {
        const float inverse = 1.0f / divisor;
        for (size_t i = 0; i < n; ++i) total[i] *= inverse;
    } else {
        for (size_t i = 0; i < n; ++i) total[i] /= divisor;
    }
}

template <bool FEEDBACK>
void combine_piece(float *own, size_t place, const uint8_t *const *others, size_t n_others,
                   size_t n, float divisor, float *error, uint8_t *out) {
    uint8_t *packed = out + 4 * blocks_of(n);
    float total[BLOCK] __attribute__((aligned(64)));
    for (size_t b = 0; b < blocks_of(n); ++b) {
        const size_t count = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
        float *to = own + b * BLOCK;
        sum_block(to, place, others, n_others, n, b, count, divisor, total);
        encode_at<FEEDBACK>(total, error, b, count, out, packed);
        const float scale = load_scale(out + 4 * b);
        if (count == BLOCK) decode_block<Out::SET>(packed + b * (BLOCK / 8), scale, to);
        else decode_end(packed + b * (BLOCK / 8), scale, count, false, to);
    }
}

}  // namespace

size_t onebit_bytes(size_t n) { return 4 * blocks_of(n) + (n + 7) / 8; }

void onebit_encode(const float *x, float *error, size_t n, uint8_t *out) {
    (error ? encode_piece<true> : encode_piece<false>)(x, error, n, out);
}

void onebit_decode(const uint8_t *in, size_t n, float *out) {
    const bool aligned = (uintptr_t)out % VECTOR_BYTES == 0;
    (aligned && n >= STREAMED ? decode_piece<Out::STREAMED> : decode_piece<Out::SET>)(in, n, out);
}

void onebit_decode_add(const uint8_t *in, size_t n, float *out) {
    decode_piece<Out::ADDED>(in, n, out);
}

void onebit_combine(float *own, size_t place, const uint8_t *const *others, size_t n_others,
                    size_t n, float divisor, float *error, uint8_t *out) {
    (error ? combine_piece<true> : combine_piece<false>)(own, place, others, n_others, n, divisor,
                                                         error, out);
}

}  // namespace HPCSYNC_ISA
