// onebit on the GPU: a warp for each block of 1024. In round k lane l has element 32 k + l, so that
// a vote gives the sign bits of 32 elements in their order.
#include "../hpcsync_block_onebit.h"
#include "gpu.h"

#define BLOCK HPCSYNC_ONEBIT_BLOCK
#define ROUNDS 32

namespace {

DEVICE uint64_t blocks_of(uint64_t n) { return (n + BLOCK - 1) / BLOCK; }

DEVICE void load_block(const float *from, uint32_t count, float *h) {
    for (int k = 0; k < ROUNDS; ++k) {
        const uint32_t i = 32u * k + lane_of();
        h[k] = i < count ? from[i] : 0.0f;
    }
}

// The sum of |h| * factor. Lane p below 16 makes the p-th partial sum, in the order of elements:
// its own of every round, then that of the lane 16 above.
DEVICE float block_sum(const float *h, float factor) {
    float sum = 0.0f;
    for (int k = 0; k < ROUNDS; ++k) {
        const float magnitude = hpcsync_float(hpcsync_abs_bits(h[k])) * factor;
        const float above = __shfl_down_sync(ALL_LANES, magnitude, 16);
        sum = (sum + magnitude) + above;
    }
    for (int step = 8; step; step >>= 1) sum = sum + __shfl_down_sync(ALL_LANES, sum, step);
    return __shfl_sync(ALL_LANES, sum, 0);
}

// Codes block b, whose values are h, of a piece of n; error becomes what was lost. Returns the
// lane's word of sign bits, and the scale.
DEVICE uint32_t encode_block(const float *h, float *error, uint64_t b, uint64_t n, uint8_t *out,
                             float *scale_made) {
    const uint32_t count = count_of(n, b * BLOCK, BLOCK), lane = lane_of();
    const float total = block_sum(h, 1.0f);
    const float shrunk = hpcsync_finite(total) ? 0.0f : block_sum(h, HPCSYNC_ONEBIT_SHRINK);
    const float scale = hpcsync_onebit_scale(total, shrunk, count);
    const bool finite = hpcsync_finite(scale);
    uint32_t word = 0;
    for (int k = 0; k < ROUNDS; ++k) {
        const uint32_t bit = finite ? hpcsync_bits(h[k]) >> 31 : 0u, i = 32u * k + lane;
        const uint32_t bits = __ballot_sync(ALL_LANES, bit != 0 && i < count);
        if (lane == (uint32_t)k) word = bits;
        if (error && finite && i < count)
            error[b * BLOCK + i] = h[k] - hpcsync_onebit_value(scale, bit);
    }
    if (lane == 0) store_any<float>(out + 4 * b, scale);
    uint8_t *packed = out + 4 * blocks_of(n) + b * (BLOCK / 8) + 4 * lane;
    if (32u * lane + 32u <= count)
        store_any<uint32_t>(packed, word);
    else
        for (uint32_t i = 32u * lane; i < count; i += 8)
            packed[(i >> 3) - 4 * lane] = (uint8_t)(word >> (i & 31u));
    *scale_made = scale;
    return word;
}

// The lane's word of sign bits of block b.
DEVICE uint32_t load_word(const uint8_t *in, uint64_t b, uint64_t n) {
    const uint32_t count = count_of(n, b * BLOCK, BLOCK), lane = lane_of();
    const uint8_t *packed = in + 4 * blocks_of(n) + b * (BLOCK / 8) + 4 * lane;
    if (32u * lane + 32u <= count) return load_any<uint32_t>(packed);
    uint32_t word = 0;
    for (uint32_t i = 32u * lane; i < count; i += 8)
        word |= (uint32_t)packed[(i >> 3) - 4 * lane] << (i & 31u);
    return word;
}

// What round k of a block decodes to in this lane.
DEVICE float value_of(uint32_t word, int k, float scale) {
    return hpcsync_onebit_value(scale, (__shfl_sync(ALL_LANES, word, k) >> lane_of()) & 1u);
}

DEVICE void decode(const uint8_t *in, uint64_t n, bool add, float *out) {
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK), word = load_word(in, b, n);
        const float scale = load_any<float>(in + 4 * b);
        for (int k = 0; k < ROUNDS; ++k) {
            const uint32_t i = 32u * k + lane_of();
            const float value = value_of(word, k, scale);
            float *to = out + b * BLOCK + i;
            if (i < count) *to = add ? *to + value : value;
        }
    }
}

}  // namespace

KERNEL onebit_encode(const float *x, float *error, uint64_t n, uint8_t *out) {
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        float h[ROUNDS], scale;
        load_block(x + b * BLOCK, count, h);
        if (error)
            for (int k = 0; k < ROUNDS; ++k) {
                const uint32_t i = 32u * k + lane_of();
                if (i < count) h[k] = h[k] + error[b * BLOCK + i];
            }
        encode_block(h, error, b, n, out, &scale);
    }
}

KERNEL onebit_decode(const uint8_t *in, uint64_t n, float *out) { decode(in, n, false, out); }

KERNEL onebit_decode_add(const uint8_t *in, uint64_t n, float *out) { decode(in, n, true, out); }

KERNEL onebit_combine(float *own, uint32_t place, Pointers others, uint32_t n_others, uint64_t n,
                      float by, float *error, uint8_t *out) {
    const Divisor divisor = divisor_of(by);
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        float *mine = own + b * BLOCK;
        float h[ROUNDS], scale;
        for (uint32_t rank = 0; rank <= n_others; ++rank) {
            const uint8_t *in = (const uint8_t *)others.at[rank < place ? rank : rank ? rank - 1 : 0];
            const bool coded = rank != place;
            const uint32_t word = coded ? load_word(in, b, n) : 0u;
            scale = coded ? load_any<float>(in + 4 * b) : 0.0f;
            for (int k = 0; k < ROUNDS; ++k) {
                const uint32_t i = 32u * k + lane_of();
                const float term = coded ? value_of(word, k, scale) : i < count ? mine[i] : 0.0f;
                h[k] = rank ? h[k] + term : term;
            }
        }
        for (int k = 0; k < ROUNDS; ++k) {
            const uint32_t i = 32u * k + lane_of();
            h[k] = divided(h[k], divisor);
            if (error && i < count) h[k] = h[k] + error[b * BLOCK + i];
            if (i >= count) h[k] = 0.0f;
        }
        const uint32_t word = encode_block(h, error, b, n, out, &scale);
        for (int k = 0; k < ROUNDS; ++k) {
            const uint32_t i = 32u * k + lane_of();
            const float value = value_of(word, k, scale);
            if (i < count) mine[i] = value;
        }
    }
}
