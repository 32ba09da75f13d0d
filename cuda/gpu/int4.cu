// int4 on the GPU: a warp for each block of 256. Value t of lane 16 a + l is coefficient
// 128 a + 16 t + l: a lane's eight nibbles are one word of the coded block, and the butterfly goes
// through shuffles at distance 1 to 8 and 128, within a lane at 16 to 64.
//
// The end of a piece is rotated in parts of 64, 16, 4 and 1: the same butterfly, in which a stage
// leaves out the coefficients whose part is not larger than its distance.
#include "../hpcsync_block_int4.h"
#include "gpu.h"

#define BLOCK 256u

namespace {

DEVICE uint64_t blocks_of(uint64_t n) { return (n + BLOCK - 1) / BLOCK; }

DEVICE uint32_t coefficient(int t) {
    return 128u * (lane_of() >> 4) + 16u * (uint32_t)t + (lane_of() & 15u);
}

// Size of the part that coefficient c of a block of `count` stands in.
DEVICE uint32_t part_of(uint32_t c, uint32_t count) {
    return count == BLOCK        ? 256u
           : c < (count & ~63u) ? 64u
           : c < (count & ~15u) ? 16u
           : c < (count & ~3u)  ? 4u
                                : 1u;
}

// A stage between lanes: all take part in the shuffle, those of large enough parts in the sum.
template <typename T>
DEVICE void across(T *v, uint32_t count, uint32_t distance, int lanes) {
    const bool upper = (lane_of() & (uint32_t)lanes) != 0;
    for (int t = 0; t < 8; ++t) {
        const T other = __shfl_xor_sync(ALL_LANES, v[t], lanes);
        if (distance < part_of(coefficient(t), count)) v[t] = upper ? other - v[t] : v[t] + other;
    }
}

template <typename T>
DEVICE void within(T *v, uint32_t count, uint32_t distance, int step) {
    for (int t = 0; t < 8; ++t)
        if (!(t & step) && distance < part_of(coefficient(t), count)) {
            const T a = v[t], b = v[t + step];
            v[t] = a + b;
            v[t + step] = a - b;
        }
}

template <typename T>
DEVICE void butterfly(T *v, uint32_t count) {
    for (int distance = 1; distance < 16; distance *= 2)
        across(v, count, (uint32_t)distance, distance);
    within(v, count, 16, 1);
    within(v, count, 32, 2);
    within(v, count, 64, 4);
    across(v, count, 128, 16);
}

DEVICE void load_block(const float *from, uint32_t count, float *v) {
    for (int t = 0; t < 8; ++t) v[t] = coefficient(t) < count ? from[coefficient(t)] : 0.0f;
}

// ---- nibbles -----------------------------------------------------------------------------------

// Coefficients' nibbles (values 0..15) of a block to its bytes.
DEVICE void pack_block(const uint32_t *nibbles, uint32_t count, uint8_t *packed) {
    if (count == BLOCK) {
        uint32_t word = 0;
        for (int t = 0; t < 8; ++t) word |= nibbles[t] << (4 * t);
        store_any<uint32_t>(packed + 4 * lane_of(), word);
        return;
    }
    for (int t = 0; t < 8; ++t) {
        const uint32_t c = coefficient(t);
        const uint32_t next = __shfl_down_sync(ALL_LANES, c < count ? nibbles[t] : 0u, 1);
        if (!(c & 1u) && c < count)
            packed[c / 2] = (uint8_t)(nibbles[t] | (c + 1 < count ? next << 4 : 0u));
    }
}

DEVICE void unpack_block(const uint8_t *packed, uint32_t count, int32_t *q) {
    if (count == BLOCK) {
        const uint32_t word = load_any<uint32_t>(packed + 4 * lane_of());
        for (int t = 0; t < 8; ++t) q[t] = (int32_t)((word >> (4 * t)) & 15u) - HPCSYNC_INT4_ZERO;
        return;
    }
    for (int t = 0; t < 8; ++t) {
        const uint32_t c = coefficient(t);
        q[t] = c < count ? (int32_t)((packed[c / 2] >> (4u * (c & 1u))) & 15u) - HPCSYNC_INT4_ZERO : 0;
    }
}

// ---- coding ------------------------------------------------------------------------------------

struct Job {
    int8_t *error;  // NULL for none
    uint8_t *exponents;
    float keep;
    bool stochastic;
    hpcsync_key key, store_key;
};

DEVICE Job job_of(int8_t *error, uint8_t *exponents, float keep, int stochastic, uint64_t seed) {
    Job made = {error,           exponents, keep, stochastic != 0, hpcsync_random_key(seed),
                hpcsync_int4_store_key(seed)};
    return made;
}

// Scale of coefficients h, of which the first `count` count.
DEVICE hpcsync_scale scale_of(const float *h, uint32_t count, bool stochastic) {
    float extreme = 0.0f;
    for (int t = 0; t < 8; ++t)
        if (coefficient(t) < count) extreme = hpcsync_int4_extreme(extreme, h[t]);
    for (int distance = 16; distance; distance >>= 1)
        extreme =
            hpcsync_int4_extreme(extreme, __shfl_xor_sync(ALL_LANES, extreme, distance));
    return hpcsync_int4_scale(extreme, stochastic);
}

// Puts what was lost into the store of block b; `held` is what it held.
DEVICE void keep_errors(float *lost, const float *held, float scale, const Job &job, uint64_t b,
                        uint32_t count) {
    const uint32_t first = (uint32_t)(b * BLOCK);
    uint32_t bound = hpcsync_abs_bits(scale);
    if (job.keep != 0.0f) {
        bound = 0;
        for (int t = 0; t < 8; ++t) {
            lost[t] = hpcsync_int4_average(held[t], lost[t], job.keep);
            const uint32_t size = hpcsync_abs_bits(lost[t]);
            if (coefficient(t) < count && size > bound) bound = size;
        }
        bound = largest_of_warp(bound);
    }
    const uint32_t exponent = hpcsync_int4_exponent(hpcsync_float(bound));
    const float per_unit = hpcsync_int4_per_unit(exponent);
    if (lane_of() == 0) job.exponents[b] = (uint8_t)exponent;
    for (int t = 0; t < 8; ++t) {
        const uint32_t c = coefficient(t);
        if (c < count)
            job.error[first + c] = hpcsync_int4_keep(
                lost[t], per_unit, hpcsync_int4_dither(job.store_key, first + c));
    }
}

// Codes the values h of block b of a piece of n; q becomes what was sent. Returns the scale.
DEVICE float encode_block(float *h, const Job &job, uint64_t b, uint64_t n, uint8_t *out,
                          int32_t *q) {
    const uint32_t count = count_of(n, b * BLOCK, BLOCK), first = (uint32_t)(b * BLOCK);
    float held[8];
    uint32_t nibbles[8];
    for (int t = 0; t < 8; ++t) h[t] = h[t] * hpcsync_int4_before(part_of(coefficient(t), count));
    butterfly(h, count);
    const float unit = job.error ? hpcsync_int4_unit(job.exponents[b]) : 0.0f;
    // Every lane has read the exponent before one writes it.
    __syncwarp();
    for (int t = 0; t < 8; ++t) {
        const uint32_t c = coefficient(t);
        held[t] = job.error && c < count ? (float)job.error[first + c] * unit : 0.0f;
        if (job.error) h[t] = h[t] + held[t];
    }
    const hpcsync_scale made = scale_of(h, count, job.stochastic);
    const bool finite = hpcsync_finite(made.scale);
    for (int t = 0; t < 8; ++t) {
        const uint32_t c = coefficient(t);
        q[t] = 0;
        if (finite && c < count)
            q[t] = job.stochastic ? hpcsync_int4_random(
                                        h[t], made.inverse,
                                        hpcsync_unit(hpcsync_random_at(job.key, first + c)))
                                  : hpcsync_int4_nearest(h[t], made.inverse);
        nibbles[t] = (uint32_t)(q[t] + HPCSYNC_INT4_ZERO);
        h[t] = h[t] - (float)q[t] * made.scale;
    }
    if (lane_of() == 0) store_any<float>(out + 4 * b, made.scale);
    pack_block(nibbles, count, out + 4 * blocks_of(n) + b * (BLOCK / 2));
    if (job.error && finite) keep_errors(h, held, made.scale, job, b, count);
    return made.scale;
}

// What whole coefficients q of a block decode to.
DEVICE void decode_block(int32_t *q, float scale, uint32_t count, float *values) {
    butterfly(q, count);
    for (int t = 0; t < 8; ++t)
        values[t] = (float)(q[t] * hpcsync_int4_after(part_of(coefficient(t), count))) * scale;
}

DEVICE void get_block(const uint8_t *in, uint64_t b, uint64_t n, float *values) {
    const uint32_t count = count_of(n, b * BLOCK, BLOCK);
    int32_t q[8];
    unpack_block(in + 4 * blocks_of(n) + b * (BLOCK / 2), count, q);
    decode_block(q, load_any<float>(in + 4 * b), count, values);
}

DEVICE void decode(const uint8_t *in, uint64_t n, bool add, float *out) {
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        float values[8];
        get_block(in, b, n, values);
        for (int t = 0; t < 8; ++t) {
            float *to = out + b * BLOCK + coefficient(t);
            if (coefficient(t) < count) *to = add ? *to + values[t] : values[t];
        }
    }
}

}  // namespace

KERNEL hadamard_f32(float *values, uint64_t blocks) {
    for (uint64_t b = warp_of(); b < blocks; b += warps_in_all()) {
        float v[8];
        load_block(values + b * BLOCK, BLOCK, v);
        for (int t = 0; t < 8; ++t) v[t] = v[t] * 0.0625f;
        butterfly(v, BLOCK);
        for (int t = 0; t < 8; ++t) values[b * BLOCK + coefficient(t)] = v[t];
    }
}

KERNEL int4_pack(const int8_t *q, uint64_t n, uint8_t *out) {
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        uint32_t nibbles[8];
        for (int t = 0; t < 8; ++t)
            nibbles[t] = coefficient(t) < count
                             ? (uint32_t)(q[b * BLOCK + coefficient(t)] + HPCSYNC_INT4_ZERO)
                             : 0u;
        pack_block(nibbles, count, out + b * (BLOCK / 2));
    }
}

KERNEL int4_unpack(const uint8_t *in, uint64_t n, int8_t *q) {
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        int32_t whole[8];
        unpack_block(in + b * (BLOCK / 2), count, whole);
        for (int t = 0; t < 8; ++t)
            if (coefficient(t) < count) q[b * BLOCK + coefficient(t)] = (int8_t)whole[t];
    }
}

KERNEL int4_encode(const float *x, int8_t *error, uint8_t *exponents, float keep, uint64_t n,
                   int stochastic, uint64_t seed, uint8_t *out) {
    const Job job = job_of(error, exponents, keep, stochastic, seed);
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        float h[8];
        int32_t q[8];
        load_block(x + b * BLOCK, count_of(n, b * BLOCK, BLOCK), h);
        encode_block(h, job, b, n, out, q);
    }
}

KERNEL int4_decode(const uint8_t *in, uint64_t n, float *out) { decode(in, n, false, out); }

KERNEL int4_decode_add(const uint8_t *in, uint64_t n, float *out) { decode(in, n, true, out); }

KERNEL int4_combine(float *own, uint32_t place, Pointers others, uint32_t n_others, uint64_t n,
                    float by, int8_t *error, uint8_t *exponents, float keep, int stochastic,
                    uint64_t seed, uint8_t *out) {
    const Job job = job_of(error, exponents, keep, stochastic, seed);
    const Divisor divisor = divisor_of(by);
    for (uint64_t b = warp_of(); b < blocks_of(n); b += warps_in_all()) {
        const uint32_t count = count_of(n, b * BLOCK, BLOCK);
        float *mine = own + b * BLOCK;
        float total[8], term[8];
        int32_t q[8];
        for (uint32_t rank = 0; rank <= n_others; ++rank) {
            if (rank == place)
                load_block(mine, count, term);
            else
                get_block((const uint8_t *)others.at[rank - (rank > place)], b, n, term);
            for (int t = 0; t < 8; ++t) total[t] = rank ? total[t] + term[t] : term[t];
        }
        for (int t = 0; t < 8; ++t)
            total[t] = coefficient(t) < count ? divided(total[t], divisor) : 0.0f;
        const float scale = encode_block(total, job, b, n, out, q);
        decode_block(q, scale, count, term);
        for (int t = 0; t < 8; ++t)
            if (coefficient(t) < count) mine[coefficient(t)] = term[t];
    }
}
