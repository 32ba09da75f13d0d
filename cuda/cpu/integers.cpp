// Codecs of integers: int8 with a scale a block, and shared scales whose integers are added.
#include "blocked.h"
#include "kernel.h"

namespace {

struct Int8 {
    typedef int8_t Code;
    typedef int32_t Wide;
    static constexpr bool SCALED = true, ROWS = false;
    static constexpr float LEVELS = 127.0f;

    template <bool RANDOM>
    static inline __attribute__((always_inline)) Wide wide(float value, uint32_t bits) {
        return hpcsync_clamp(
            RANDOM ? hpcsync_round_random(value, hpcsync_unit(bits)) : hpcsync_round(value), 127);
    }

    static inline __attribute__((always_inline)) float value(Wide code) { return (float)code; }
};

// The integers of one block whose largest magnitude over all ranks has the bits `largest`, and
// their sum modulo 2^32.
template <class Code, bool RANDOM>
uint32_t shared_block(const float *x, float *error, size_t count, uint32_t largest, int32_t levels,
                      hpcsync_key key, uint32_t first, Code *out) {
    uint32_t sum = 0;
    const hpcsync_scale block = hpcsync_block_scale(largest, (float)levels);
    if (largest >= HPCSYNC_INF_BITS) {
        memset(out, 0, count * sizeof(Code));
        return 0;
    }
    for (size_t i = 0; i < count; ++i) {
        const float h = error ? x[i] + error[i] : x[i];
        const float y = h * block.inverse;
        const int32_t q = hpcsync_clamp(
            RANDOM ? hpcsync_round_random(
                         y, hpcsync_unit(hpcsync_random_at(key, first + (uint32_t)i)))
                   : hpcsync_round(y),
            levels);
        if (error) error[i] = h - (float)q * block.scale;
        sum += (uint32_t)q;
        out[i] = (Code)q;
    }
    return sum;
}

template <class Code, bool RANDOM>
uint32_t shared_all(const float *x, float *error, size_t n, const int32_t *largest, int32_t levels,
                    uint64_t seed, Code *out) {
    const hpcsync_key key = hpcsync_random_key(seed);
    uint32_t sum = 0;
    size_t start = 0;
    for (; start + BLOCK <= n; start += BLOCK, ++largest) {
        const uint32_t size = (uint32_t)*largest;
        Blocked<Int8>::fetch(x + start);
        if (error) Blocked<Int8>::fetch(error + start);
        if (error)
            sum += shared_block<Code, RANDOM>(x + start, error + start, BLOCK, size, levels, key,
                                              (uint32_t)start, out + start);
        else
            sum += shared_block<Code, RANDOM>(x + start, nullptr, BLOCK, size, levels, key,
                                              (uint32_t)start, out + start);
    }
    if (start < n)
        sum += shared_block<Code, RANDOM>(x + start, error ? error + start : nullptr, n - start,
                                          (uint32_t)*largest, levels, key, (uint32_t)start,
                                          out + start);
    return sum;
}

template <class Code>
uint32_t shared_encode(const float *x, float *error, size_t n, const int32_t *largest,
                       int32_t levels, int stochastic, uint64_t seed, Code *out) {
    return stochastic ? shared_all<Code, true>(x, error, n, largest, levels, seed, out)
                      : shared_all<Code, false>(x, error, n, largest, levels, seed, out);
}

template <class Code>
uint32_t shared_decode(const Code *in, size_t n, const int32_t *largest, int32_t levels,
                       float divisor, float *out) {
    const bool product = hpcsync_is_power_of_two(divisor);
    const float reciprocal = 1.0f / divisor;
    const bool streamed = n * sizeof(float) >= STREAM_BYTES;
    uint32_t sum = 0;
    float d[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK, ++largest) {
        const size_t count = n - start < BLOCK ? n - start : BLOCK;
        const float scale = hpcsync_block_scale((uint32_t)*largest, (float)levels).scale;
        const Code *from = in + start;
        float *to = streamed ? d : out + start;
        for (size_t i = 0; i < count; ++i) {
            sum += (uint32_t)(int32_t)from[i];
            const float value = (float)from[i] * scale;
            to[i] = product ? value * reciprocal : value / divisor;
        }
        if (streamed) stream_row(out + start, d, count);
    }
    stream_end();
    return sum;
}

}  // namespace

namespace HPCSYNC_ISA {

HPCSYNC_BLOCKED(int8, Int8)

void shared_maxima(const float *x, const float *error, size_t n, int32_t *maxima) {
    float h[BLOCK];
    for (size_t start = 0; start < n; start += BLOCK, ++maxima) {
        const size_t count = n - start < BLOCK ? n - start : BLOCK;
        const float *held = error ? error + start : nullptr;
        *maxima = (int32_t)Blocked<Int8>::gather(x + start, held, count, h);
    }
}

#define SHARED(BITS)                                                                             \
    uint32_t shared_encode_i##BITS(const float *x, float *error, size_t n, const int32_t *maxima, \
                                   int32_t levels, int stochastic, uint64_t seed,                \
                                   int##BITS##_t *out) {                                         \
        return shared_encode(x, error, n, maxima, levels, stochastic, seed, out);                \
    }                                                                                            \
    uint32_t shared_decode_i##BITS(const int##BITS##_t *in, size_t n, const int32_t *maxima,     \
                                   int32_t levels, float divisor, float *out) {                  \
        return shared_decode(in, n, maxima, levels, divisor, out);                               \
    }

SHARED(8)
SHARED(16)
SHARED(32)

}  // namespace HPCSYNC_ISA
