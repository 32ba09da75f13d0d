// Codecs of integers: int8 with a scale a block, and shared scales whose integers are added.
#include "blocked.h"

namespace {

struct Int8 {
    typedef int8_t Code;
    static constexpr bool SCALED = true;
    static constexpr float LEVELS = 127.0f;
    DEVICE int8_t code(float value, bool at_random, uint32_t bits) {
        return (int8_t)hpcsync_clamp(
            at_random ? hpcsync_round_random(value, hpcsync_unit(bits)) : hpcsync_round(value), 127);
    }
    DEVICE float value(int8_t code) { return (float)code; }
};

// Adds the integers' sum modulo 2^32 to *checksum.
template <typename Code>
DEVICE void shared_encode(const float *x, float *error, uint64_t n, const int32_t *maxima,
                          int32_t levels, bool stochastic, uint64_t seed, Code *out,
                          uint32_t *checksum) {
    const hpcsync_key key = hpcsync_random_key(seed);
    uint32_t sum = 0;
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW), largest = (uint32_t)maxima[start / ROW];
        const hpcsync_scale block = hpcsync_block_scale(largest, (float)levels);
        const bool poison = largest >= HPCSYNC_INF_BITS;
        Values<float> h, lost;
        Values<Code> codes;
        load_row(x + start, count, h.at);
        if (error) load_row(error + start, count, lost.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            if (error) h.at[j] = h.at[j] + lost.at[j];
            const float y = h.at[j] * block.inverse;
            const uint32_t index = (uint32_t)start + row_index(j);
            int32_t q = stochastic
                            ? hpcsync_round_random(y, hpcsync_unit(hpcsync_random_at(key, index)))
                            : hpcsync_round(y);
            q = poison ? 0 : hpcsync_clamp(q, levels);
            if (!poison) lost.at[j] = h.at[j] - (float)q * block.scale;
            sum += (uint32_t)q;
            codes.at[j] = (Code)q;
        }
        store_row(out + start, count, codes.at);
        if (error) store_row(error + start, count, lost.at);
    }
    sum = sum_of_warp(sum);
    if (lane_of() == 0 && sum) atomicAdd(checksum, sum);
}

template <typename Code>
DEVICE void shared_decode(const Code *in, uint64_t n, const int32_t *maxima, int32_t levels,
                          float by, float *out, uint32_t *checksum) {
    const Divisor divisor = divisor_of(by);
    uint32_t sum = 0;
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        const float scale = hpcsync_block_scale((uint32_t)maxima[start / ROW], (float)levels).scale;
        Values<Code> codes;
        Values<float> d;
        load_row(in + start, count, codes.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            sum += (uint32_t)(int32_t)codes.at[j];
            d.at[j] = divided((float)codes.at[j] * scale, divisor);
        }
        store_row(out + start, count, d.at);
    }
    sum = sum_of_warp(sum);
    if (lane_of() == 0 && sum) atomicAdd(checksum, sum);
}

}  // namespace

HPCSYNC_BLOCKED(int8, Int8)

KERNEL shared_maxima(const float *x, const float *error, uint64_t n, int32_t *maxima) {
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        Values<float> h;
        load_row(x + start, count, h.at);
        if (error) Blocked<Int8>::add_error(error, start, count, h.at);
        uint32_t largest = 0;
        for (int j = 0; j < ROW_VALUES; ++j) {
            const uint32_t size = hpcsync_abs_bits(h.at[j]);
            largest = size > largest ? size : largest;
        }
        largest = largest_of_warp(largest);
        if (lane_of() == 0) maxima[start / ROW] = (int32_t)largest;
    }
}

#define SHARED(BITS)                                                                            \
    KERNEL shared_encode_i##BITS(const float *x, float *error, uint64_t n, const int32_t *maxima, \
                                 int32_t levels, int stochastic, uint64_t seed,                 \
                                 int##BITS##_t *out, uint32_t *checksum) {                      \
        shared_encode(x, error, n, maxima, levels, stochastic != 0, seed, out, checksum);       \
    }                                                                                           \
    KERNEL shared_decode_i##BITS(const int##BITS##_t *in, uint64_t n, const int32_t *maxima,    \
                                 int32_t levels, float divisor, float *out,                     \
                                 uint32_t *checksum) {                                          \
        shared_decode(in, n, maxima, levels, divisor, out, checksum);                           \
    }

SHARED(8)
SHARED(16)
SHARED(32)
