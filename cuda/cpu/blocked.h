// The passes that all codecs of one code an element share, over blocks that stay in the first
// cache: encode with error feedback, decode, decode-add, and the owner's combine.
//
// A Form says how one element is coded:
//   Code                       the stored integer
//   Wide                       the same while it is computed with, uint32_t or int32_t
//   SCALED, LEVELS             whether blocks have a scale, and the largest coded magnitude
//   wide<RANDOM>(value, bits)  of a value times the scale's inverse; bits are 32 random ones
//   value(wide)                what it decodes to, before the scale
//   ROWS, narrow, widen        whether there is a faster way, of the same bits, to round a row of
//                              values without scale to nearest and to decode it
// Coded layout: a float scale a block if SCALED, then the codes. Nothing is aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../hpcsync_block.h"
#include "vector.h"

namespace {

constexpr size_t BLOCK = 256;

// Elements that are asked for before they are read.
constexpr size_t AHEAD = 2 * BLOCK;

template <class Form>
struct Blocked {
    typedef typename Form::Code Code;
    typedef typename Form::Wide Wide;

    static size_t header(size_t n) {
        return Form::SCALED ? (n + BLOCK - 1) / BLOCK * sizeof(float) : 0;
    }

    static size_t bytes(size_t n) { return header(n) + n * sizeof(Code); }

    // Ask for a block that is read later: arithmetic on this one hides the wait.
    static void fetch(const float *block) {
        for (size_t i = 0; i < BLOCK; i += 16) __builtin_prefetch(block + AHEAD + i);
    }

    // h = x + error; the bits of the largest magnitude.
    static uint32_t gather(const float *x, const float *error, size_t count, float *h) {
        int32_t largest = 0;
        for (size_t i = 0; i < count; ++i) {
            h[i] = error ? x[i] + error[i] : x[i];
            if (Form::SCALED) {
                const int32_t size = (int32_t)hpcsync_abs_bits(h[i]);
                largest = size > largest ? size : largest;
            }
        }
        return (uint32_t)largest;
    }

    // Code h; d is what it decodes to, and error, if any, becomes what was lost.
    template <bool RANDOM>
    static void code(const float *h, size_t count, float scale, float inverse, hpcsync_key key,
                     uint32_t first, float *error, Code *codes, float *d) {
        if constexpr (Form::ROWS && !RANDOM) {
            Form::narrow(h, count, codes);
            Form::widen(codes, count, d);
        } else for (size_t i = 0; i < count; ++i) {
            const uint32_t bits = RANDOM ? hpcsync_random_at(key, first + (uint32_t)i) : 0;
            const Wide wide =
                Form::template wide<RANDOM>(Form::SCALED ? h[i] * inverse : h[i], bits);
            codes[i] = (Code)wide;
            d[i] = Form::SCALED ? Form::value(wide) * scale : Form::value(wide);
        }
        if (!error) return;
        for (size_t i = 0; i < count; ++i) {
            const float lost = h[i] - d[i];
            error[i] = Form::SCALED || hpcsync_finite(d[i]) ? lost : error[i];
        }
    }

    // One block whose values and largest magnitude are at hand.
    template <bool RANDOM>
    static void put(const float *h, uint32_t largest, size_t count, hpcsync_key key, size_t start,
                    float *error, uint8_t *scale_at, uint8_t *codes_at, float *d) {
        Code codes[BLOCK];
        hpcsync_scale block = {1.0f, 1.0f};
        if (Form::SCALED) {
            block = hpcsync_block_scale(largest, Form::LEVELS);
            memcpy(scale_at, &block.scale, sizeof(float));
        }
        if (Form::SCALED && largest >= HPCSYNC_INF_BITS) {
            memset(codes_at, 0, count * sizeof(Code));
            for (size_t i = 0; i < count; ++i) d[i] = block.scale;
            return;
        }
        if (count == BLOCK)
            code<RANDOM>(h, BLOCK, block.scale, block.inverse, key, (uint32_t)start, error,
                         codes, d);
        else
            code<RANDOM>(h, count, block.scale, block.inverse, key, (uint32_t)start, error,
                         codes, d);
        memcpy(codes_at, codes, count * sizeof(Code));
    }

    template <bool RANDOM>
    static void encode_all(const float *x, float *error, size_t n, uint64_t seed, uint8_t *out) {
        const hpcsync_key key = hpcsync_random_key(seed);
        uint8_t *scales = out, *codes = out + header(n);
        float h[BLOCK], d[BLOCK];
        for (size_t start = 0; start < n; start += BLOCK, scales += sizeof(float)) {
            const size_t count = n - start < BLOCK ? n - start : BLOCK;
            float *lost = error ? error + start : nullptr;
            fetch(x + start);
            if (error) fetch(lost);
            const uint32_t largest = gather(x + start, lost, count, h);
            put<RANDOM>(h, largest, count, key, start, lost, scales,
                        codes + start * sizeof(Code), d);
        }
    }

    static void encode(const float *x, float *error, size_t n, int stochastic, uint64_t seed,
                       uint8_t *out) {
        if (stochastic)
            encode_all<true>(x, error, n, seed, out);
        else
            encode_all<false>(x, error, n, seed, out);
    }

    // One block to out, or added to it.
    template <bool ADD>
    static void get(const uint8_t *in, size_t n, size_t start, size_t count, float *out) {
        float scale = 1.0f;
        if (Form::SCALED) memcpy(&scale, in + start / BLOCK * sizeof(float), sizeof(float));
        const uint8_t *from = in + header(n) + start * sizeof(Code);
        if constexpr (Form::ROWS) {
            Code codes[BLOCK];
            float d[BLOCK];
            memcpy(codes, from, count * sizeof(Code));
            Form::widen(codes, count, ADD ? d : out);
            if (ADD)
                for (size_t i = 0; i < count; ++i) out[i] += d[i];
            return;
        }
        for (size_t i = 0; i < count; ++i) {
            Code code;
            memcpy(&code, from + i * sizeof(Code), sizeof(Code));
            const float value = Form::value((Wide)code);
            const float d = Form::SCALED ? value * scale : value;
            out[i] = ADD ? out[i] + d : d;
        }
    }

    template <bool ADD>
    static void decode(const uint8_t *in, size_t n, float *out) {
        size_t start = 0;
        if (!ADD && n * sizeof(float) >= STREAM_BYTES) {
            float d[BLOCK];
            for (; start + BLOCK <= n; start += BLOCK) {
                get<false>(in, n, start, BLOCK, d);
                stream_row(out + start, d, BLOCK);
            }
            stream_end();
        }
        for (; start + BLOCK <= n; start += BLOCK) get<ADD>(in, n, start, BLOCK, out + start);
        if (start < n) get<ADD>(in, n, start, n - start, out + start);
    }

    template <bool RANDOM>
    static void combine_all(float *own, size_t place, const uint8_t *const *others,
                            size_t n_others, size_t n, float divisor, float *error, uint64_t seed,
                            uint8_t *out) {
        const hpcsync_key key = hpcsync_random_key(seed);
        const bool product = hpcsync_is_power_of_two(divisor);
        const float reciprocal = 1.0f / divisor;
        uint8_t *scales = out, *codes = out + header(n);
        float total[BLOCK], h[BLOCK];
        for (size_t start = 0; start < n; start += BLOCK, scales += sizeof(float)) {
            const size_t count = n - start < BLOCK ? n - start : BLOCK;
            float *mine = own + start, *lost = error ? error + start : nullptr;
            if (place == 0) memcpy(total, mine, count * sizeof(float));
            for (size_t other = 0; other < n_others; ++other) {
                if (other == 0 && place > 0)
                    get<false>(others[0], n, start, count, total);
                else
                    get<true>(others[other], n, start, count, total);
                if (other + 1 == place)
                    for (size_t i = 0; i < count; ++i) total[i] += mine[i];
            }
            if (product)
                for (size_t i = 0; i < count; ++i) total[i] *= reciprocal;
            else
                for (size_t i = 0; i < count; ++i) total[i] /= divisor;
            const uint32_t largest = gather(total, lost, count, h);
            put<RANDOM>(h, largest, count, key, start, lost, scales,
                        codes + start * sizeof(Code), mine);
        }
    }

    static void combine(float *own, size_t place, const uint8_t *const *others, size_t n_others,
                        size_t n, float divisor, float *error, int stochastic, uint64_t seed,
                        uint8_t *out) {
        if (stochastic)
            combine_all<true>(own, place, others, n_others, n, divisor, error, seed, out);
        else
            combine_all<false>(own, place, others, n_others, n, divisor, error, seed, out);
    }
};

}  // namespace

// The five functions of a codec by its Form.
#define HPCSYNC_BLOCKED(NAME, FORM)                                                              \
    size_t NAME##_bytes(size_t n) { return Blocked<FORM>::bytes(n); }                            \
    void NAME##_encode(const float *x, float *error, size_t n, int stochastic, uint64_t seed,    \
                       uint8_t *out) {                                                           \
        Blocked<FORM>::encode(x, error, n, stochastic, seed, out);                               \
    }                                                                                            \
    void NAME##_decode(const uint8_t *in, size_t n, float *out) {                                \
        Blocked<FORM>::decode<false>(in, n, out);                                                \
    }                                                                                            \
    void NAME##_decode_add(const uint8_t *in, size_t n, float *out) {                            \
        Blocked<FORM>::decode<true>(in, n, out);                                                 \
    }                                                                                            \
    void NAME##_combine(float *own, size_t place, const uint8_t *const *others, size_t n_others, \
                        size_t n, float divisor, float *error, int stochastic, uint64_t seed,    \
                        uint8_t *out) {                                                          \
        Blocked<FORM>::combine(own, place, others, n_others, n, divisor, error, stochastic,      \
                               seed, out);                                                       \
    }
