// Block maths of the codec int4, for host and device: see hpcsync_block.h for the rules.
//
// A block of 256 values x is rotated, r = H x / 256 (H: Hadamard in Sylvester's order, so that x =
// H r), what the error store holds is added, h = r + e, and h is coded as whole numbers q in -8..7
// times one scale. Decoding gives x = (H q) * scale, where H q is exact in integers: one rounding.
//
// The end of a piece, fewer than 256 values, is cut into parts of 64, 16, 4 and 1 values, each
// rotated by the H of its size; all have one scale. Sizes are powers of 4 so that every factor is
// a power of two: a coefficient weighs the same in all parts. No value is padded, so that values
// and coefficients can be told from each other, and the error store needs no more than 8 bits each.
//
// The butterfly adds pairs at distance 1, then 2, 4 up to 128: sums depend on that order.
//
// Rotation before coding: Suresh et al. 2017 (arXiv 1611.00429). Store: LoCo (arXiv 2407.04480).
#pragma once

#include "hpcsync_block.h"

#define HPCSYNC_INT4_BLOCK 256
#define HPCSYNC_INT4_ZERO 8  // nibbles hold q + 8

// ---- scale and quantiser ---------------------------------------------------------------------

// The scale keeps 12 significant bits: q * scale is then exact.
#define HPCSYNC_INT4_SCALE_MASK 0xFFFFF000u

// The coefficient of larger magnitude; of two opposite ones the positive. Which NaN or Inf comes
// out does not matter: in a block with one, every coefficient is one.
HPCSYNC_HD float hpcsync_int4_extreme(float a, float b) {
    uint32_t size_a = hpcsync_abs_bits(a), size_b = hpcsync_abs_bits(b);
    return size_a > size_b || (size_a == size_b && hpcsync_bits(a) == size_a) ? a : b;
}

// From a block's coefficient of largest magnitude (hpcsync_int4_extreme over the block).
//
// To nearest, it is coded as -8: the scale has its sign turned. An opposite one between 7.5 and 8
// scales is coded as 7, so that what is lost is at most one scale. That is 16 levels where -7..7
// has 15, and a mean square error less by 23% (0.0123 to 0.0159 of the variance, normal values).
// At random, values must lie within -7..7, for what is cut off would be a bias.
//
// The scale is NaN if the extreme is not finite (NaN or Inf in a block spreads to all its
// coefficients); 0 if it would be no normal number: the block is coded as zeros, and the store
// keeps all of it.
HPCSYNC_HD hpcsync_scale hpcsync_int4_scale(float extreme, bool stochastic) {
    hpcsync_scale made = {0.0f, 0.0f};
    if (!hpcsync_finite(extreme)) {
        made.scale = hpcsync_float(HPCSYNC_NAN_BITS);
        return made;
    }
    bool negative = extreme < 0.0f;
    float largest = hpcsync_float(hpcsync_abs_bits(extreme));
    uint32_t bits;
    if (stochastic) {
        uint32_t highest = hpcsync_bits(HPCSYNC_FLT_MAX / 7.0f) & HPCSYNC_INT4_SCALE_MASK;
        bits = (hpcsync_bits(largest / 7.0f) + ~HPCSYNC_INT4_SCALE_MASK) & HPCSYNC_INT4_SCALE_MASK;
        bits = bits < highest ? bits : highest;
    } else {
        bits = hpcsync_bits(largest * 0.125f) & HPCSYNC_INT4_SCALE_MASK;
    }
    if (bits < 0x00800000u) return made;
    made.scale = hpcsync_float(bits | (stochastic || negative ? 0u : 0x80000000u));
    made.inverse = 1.0f / made.scale;
    return made;
}

HPCSYNC_HD int32_t hpcsync_int4_nearest(float h, float inverse) {
    int32_t q = hpcsync_round(h * inverse);
    return q > 7 ? 7 : q;
}

// `unit`: of hpcsync_unit, for the coefficient's index in the piece.
HPCSYNC_HD int32_t hpcsync_int4_random(float h, float inverse, float unit) {
    int32_t q = hpcsync_round_random(h * inverse, unit);
    return q > 7 ? 7 : q;
}

// ---- the error store: 8 bits a coefficient and one exponent a block --------------------------
//
// A store value is an int8 times a power of two. It is rounded at random, always: to nearest, what
// the store loses would add up when gradients hardly change.

// Biased exponent (as in a float) of the unit of a block whose errors are at most `bound` (and a
// thousandth): they are at most 126.1 units. At least 1, so that units are normal numbers.
HPCSYNC_HD uint32_t hpcsync_int4_exponent(float bound) {
    uint32_t above = (hpcsync_abs_bits(bound) + 0x00040000u) >> 23;
    return above > 7u ? above - 6u : 1u;
}

// The unit of an exponent byte; 0 for a fresh store's 0.
HPCSYNC_HD float hpcsync_int4_unit(uint32_t exponent) { return hpcsync_float(exponent << 23); }

HPCSYNC_HD float hpcsync_int4_per_unit(uint32_t exponent) {
    return hpcsync_float((254u - exponent) << 23);
}

// The store's own sequence of random numbers for a codec's seed.
HPCSYNC_HD hpcsync_key hpcsync_int4_store_key(uint64_t seed) {
    return hpcsync_random_key(seed ^ 0x5851F42D4C957F2Dull);
}

// 128 + u of coefficient c, u of 16 bits uniform in [0, 1): 16 coefficients of a block, 16 apart,
// share a random word, to which the golden ratio's part is added once more for each. Any one is
// uniform, and the 16 are spread evenly, for a sixteenth of the work.
HPCSYNC_HD float hpcsync_int4_dither(hpcsync_key key, uint32_t c) {
    uint32_t random = hpcsync_random_at(key, ((c >> 8) << 4) | (c & 15u));
    return hpcsync_float(0x43000000u | ((random + 0x9E37u * ((c >> 4) & 15u)) & 0xFFFFu));
}

// An error as the store keeps it: the integer below error / unit + u.
HPCSYNC_HD int8_t hpcsync_int4_keep(float error, float per_unit, float dither) {
    return (int8_t)((int32_t)(error * per_unit + dither) - 128);
}

// LoCo's moving average: keep * old + (1 - keep) * lost, three rounded operations.
HPCSYNC_HD float hpcsync_int4_average(float old, float lost, float keep) {
    return keep == 0.0f ? lost : keep * old + (1.0f - keep) * lost;
}

// ---- where things stand ----------------------------------------------------------------------

// A whole block's 128 bytes are 32 words (little endian) of 8 nibbles: nibble t of word 16 a + l is
// coefficient 16 (8 a + t) + l. A rotation in registers of 16 lanes thus packs without a shuffle.
HPCSYNC_HD uint32_t hpcsync_int4_byte(uint32_t c) {
    return 64u * (c >> 7) + 4u * (c & 15u) + ((c >> 5) & 3u);
}

HPCSYNC_HD uint32_t hpcsync_int4_nibble(uint32_t c) { return 4u * ((c >> 4) & 1u); }

// Values in the next part of a piece with `left` values to go: 256, 64, 16, 4 or 1.
HPCSYNC_HD uint32_t hpcsync_int4_part(uint32_t left) {
    uint32_t size = 256;
    while (size > left) size >>= 2;
    return size;
}

// What a part's values are multiplied by before its butterfly, 1 / (16 sqrt(size)), and what its
// coefficients' H q is multiplied by besides the scale, 16 / sqrt(size).
HPCSYNC_HD float hpcsync_int4_before(uint32_t size) {
    return size == 256u ? 0.00390625f : size == 64u ? 0.0078125f : size == 16u ? 0.015625f
         : size == 4u ? 0.03125f : 0.0625f;
}

HPCSYNC_HD int32_t hpcsync_int4_after(uint32_t size) {
    return size == 256u ? 1 : size == 64u ? 2 : size == 16u ? 4 : size == 4u ? 8 : 16;
}

// ---- whole blocks and ends of pieces, one value after the other --------------------------------

template <typename T>
HPCSYNC_HD void hpcsync_butterfly(T *values, uint32_t size) {
    for (uint32_t stride = 1; stride < size; stride *= 2)
        for (uint32_t i = 0; i < size; ++i)
            if (!(i & stride)) {
                T a = values[i], b = values[i + stride];
                values[i] = a + b;
                values[i + stride] = a - b;
            }
}

// n <= 256 values to coefficients, in place.
HPCSYNC_HD void hpcsync_int4_rotate(float *values, uint32_t n) {
    for (uint32_t start = 0; start < n;) {
        uint32_t size = hpcsync_int4_part(n - start);
        for (uint32_t i = 0; i < size; ++i) values[start + i] *= hpcsync_int4_before(size);
        hpcsync_butterfly(values + start, size);
        start += size;
    }
}

// n <= 256 whole coefficients to values without the scale, in place; |q| <= 127.
HPCSYNC_HD void hpcsync_int4_unrotate(int32_t *q, uint32_t n) {
    for (uint32_t start = 0; start < n;) {
        uint32_t size = hpcsync_int4_part(n - start);
        hpcsync_butterfly(q + start, size);
        for (uint32_t i = 0; i < size; ++i) q[start + i] *= hpcsync_int4_after(size);
        start += size;
    }
}

// Nibbles of an end of n < 256 coefficients stand in their order, lower half first.
HPCSYNC_HD void hpcsync_int4_pack_end(const int32_t *q, uint32_t n, uint8_t *out) {
    for (uint32_t i = 0; i < n; i += 2) {
        uint32_t high = i + 1 < n ? (uint32_t)(q[i + 1] + HPCSYNC_INT4_ZERO) : 0u;
        out[i / 2] = (uint8_t)((uint32_t)(q[i] + HPCSYNC_INT4_ZERO) | (high << 4));
    }
}

HPCSYNC_HD void hpcsync_int4_unpack_end(const uint8_t *in, uint32_t n, int32_t *q) {
    for (uint32_t i = 0; i < n; ++i)
        q[i] = (int32_t)((in[i / 2] >> (4u * (i & 1u))) & 15u) - HPCSYNC_INT4_ZERO;
}

// Codes the end of a piece: n < 256 values of x from coefficient `first` of the piece on.
//
// error, exponent: of this block's store; NULL for none. Returns the scale that is sent.
HPCSYNC_HD float hpcsync_int4_encode_end(const float *x, int8_t *error, uint8_t *exponent,
                                         float keep, uint32_t n, bool stochastic, hpcsync_key key,
                                         hpcsync_key store_key, uint32_t first, uint8_t *out) {
    float h[HPCSYNC_INT4_BLOCK];
    int32_t q[HPCSYNC_INT4_BLOCK];
    for (uint32_t i = 0; i < n; ++i) h[i] = x[i];
    hpcsync_int4_rotate(h, n);
    float unit = error ? hpcsync_int4_unit(*exponent) : 0.0f;
    float extreme = 0.0f;
    bool finite = true;
    for (uint32_t i = 0; i < n; ++i) {
        if (error) h[i] = h[i] + (float)error[i] * unit;
        finite = finite && hpcsync_finite(h[i]);
        extreme = hpcsync_int4_extreme(h[i], extreme);
    }
    if (!finite) extreme = hpcsync_float(HPCSYNC_INF_BITS);
    hpcsync_scale s = hpcsync_int4_scale(extreme, stochastic);
    float bound = keep == 0.0f ? s.scale : 0.0f;
    for (uint32_t i = 0; i < n; ++i) {
        q[i] = 0;
        if (!finite) continue;
        q[i] = stochastic ? hpcsync_int4_random(h[i], s.inverse,
                                                hpcsync_unit(hpcsync_random_at(key, first + i)))
                          : hpcsync_int4_nearest(h[i], s.inverse);
        if (!error) continue;
        float lost = h[i] - (float)q[i] * s.scale;
        h[i] = hpcsync_int4_average((float)error[i] * unit, lost, keep);
        if (keep != 0.0f && hpcsync_abs_bits(h[i]) > hpcsync_bits(bound))
            bound = hpcsync_float(hpcsync_abs_bits(h[i]));
    }
    hpcsync_int4_pack_end(q, n, out);
    if (error && finite) {
        uint32_t made = hpcsync_int4_exponent(bound);
        *exponent = (uint8_t)made;
        for (uint32_t i = 0; i < n; ++i)
            error[i] = hpcsync_int4_keep(h[i], hpcsync_int4_per_unit(made),
                                         hpcsync_int4_dither(store_key, first + i));
    }
    return s.scale;
}

// Decodes the end of a piece: n < 256 values.
HPCSYNC_HD void hpcsync_int4_decode_end(const uint8_t *in, float scale, uint32_t n, bool add,
                                        float *out) {
    int32_t q[HPCSYNC_INT4_BLOCK];
    hpcsync_int4_unpack_end(in, n, q);
    hpcsync_int4_unrotate(q, n);
    for (uint32_t i = 0; i < n; ++i) {
        float value = (float)q[i] * scale;
        out[i] = add ? out[i] + value : value;
    }
}
