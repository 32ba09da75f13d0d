// Codecs of one code an element on the GPU, a warp for each block of 256: encode with error
// feedback, decode, decode-add, and the owner's combine. See cuda/cpu/blocked.h for what a Form
// says and for the coded layout.
#pragma once

#include "gpu.h"

template <class Form>
struct Blocked {
    typedef typename Form::Code Code;

    DEVICE uint64_t header(uint64_t n) { return Form::SCALED ? (n + ROW - 1) / ROW * 4 : 0; }

    // Codes the values h of a row; d is what they decode to.
    DEVICE void put(const float *h, uint64_t n, uint64_t start, uint32_t count, float *error,
                    bool stochastic, hpcsync_key key, uint8_t *out, float *d) {
        hpcsync_scale block = {1.0f, 1.0f};
        uint32_t largest = 0;
        if (Form::SCALED) {
            for (int j = 0; j < ROW_VALUES; ++j) {
                const uint32_t size = hpcsync_abs_bits(h[j]);
                largest = size > largest ? size : largest;
            }
            largest = largest_of_warp(largest);
            block = hpcsync_block_scale(largest, Form::LEVELS);
            if (lane_of() == 0) store_any<float>(out + start / ROW * 4, block.scale);
        }
        const bool poison = Form::SCALED && largest >= HPCSYNC_INF_BITS;
        Values<Code> codes;
        Values<float> lost;
        if (error) load_row(error + start, count, lost.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            const uint32_t index = (uint32_t)start + row_index(j);
            const uint32_t bits = stochastic ? hpcsync_random_at(key, index) : 0u;
            const float y = Form::SCALED ? h[j] * block.inverse : h[j];
            codes.at[j] = poison ? (Code)0 : Form::code(y, stochastic, bits);
            const float value = Form::value(codes.at[j]);
            d[j] = poison ? block.scale : Form::SCALED ? value * block.scale : value;
            const bool kept = Form::SCALED ? poison : !hpcsync_finite(d[j]);
            if (!kept) lost.at[j] = h[j] - d[j];
        }
        store_row(out + header(n) + start * sizeof(Code), count, codes.at);
        if (error) store_row(error + start, count, lost.at);
    }

    // What a row of coded values decodes to.
    DEVICE void get(const uint8_t *in, uint64_t n, uint64_t start, uint32_t count, float *d) {
        Values<Code> codes;
        const float scale = Form::SCALED ? load_any<float>(in + start / ROW * 4) : 1.0f;
        load_row(in + header(n) + start * sizeof(Code), count, codes.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            const float value = Form::value(codes.at[j]);
            d[j] = Form::SCALED ? value * scale : value;
        }
    }

    DEVICE void add_error(const float *error, uint64_t start, uint32_t count, float *h) {
        Values<float> held;
        load_row(error + start, count, held.at);
        for (int j = 0; j < ROW_VALUES; ++j) h[j] = h[j] + held.at[j];
    }

    DEVICE void encode(const float *x, float *error, uint64_t n, bool stochastic, uint64_t seed,
                       uint8_t *out) {
        const hpcsync_key key = hpcsync_random_key(seed);
        for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
            const uint32_t count = count_of(n, start, ROW);
            Values<float> h, d;
            load_row(x + start, count, h.at);
            if (error) add_error(error, start, count, h.at);
            put(h.at, n, start, count, error, stochastic, key, out, d.at);
        }
    }

    DEVICE void decode(const uint8_t *in, uint64_t n, bool add, float *out) {
        for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
            const uint32_t count = count_of(n, start, ROW);
            Values<float> d, held;
            get(in, n, start, count, d.at);
            if (add) {
                load_row(out + start, count, held.at);
                for (int j = 0; j < ROW_VALUES; ++j) d.at[j] = held.at[j] + d.at[j];
            }
            store_row(out + start, count, d.at);
        }
    }

    DEVICE void combine(float *own, uint32_t place, const Pointers &others, uint32_t n_others,
                        uint64_t n, float by, float *error, bool stochastic, uint64_t seed,
                        uint8_t *out) {
        const hpcsync_key key = hpcsync_random_key(seed);
        const Divisor divisor = divisor_of(by);
        for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
            const uint32_t count = count_of(n, start, ROW);
            Values<float> total, term;
            for (uint32_t rank = 0; rank <= n_others; ++rank) {
                if (rank == place)
                    load_row(own + start, count, term.at);
                else
                    get((const uint8_t *)others.at[rank - (rank > place)], n, start, count, term.at);
                for (int j = 0; j < ROW_VALUES; ++j)
                    total.at[j] = rank ? total.at[j] + term.at[j] : term.at[j];
            }
            for (int j = 0; j < ROW_VALUES; ++j) total.at[j] = divided(total.at[j], divisor);
            if (error) add_error(error, start, count, total.at);
            put(total.at, n, start, count, error, stochastic, key, out, term.at);
            store_row(own + start, count, term.at);
        }
    }
};

// The four kernels of a codec by its Form.
#define HPCSYNC_BLOCKED(NAME, FORM)                                                               \
    KERNEL NAME##_encode(const float *x, float *error, uint64_t n, int stochastic, uint64_t seed, \
                         uint8_t *out) {                                                          \
        Blocked<FORM>::encode(x, error, n, stochastic != 0, seed, out);                           \
    }                                                                                             \
    KERNEL NAME##_decode(const uint8_t *in, uint64_t n, float *out) {                             \
        Blocked<FORM>::decode(in, n, false, out);                                                 \
    }                                                                                             \
    KERNEL NAME##_decode_add(const uint8_t *in, uint64_t n, float *out) {                         \
        Blocked<FORM>::decode(in, n, true, out);                                                  \
    }                                                                                             \
    KERNEL NAME##_combine(float *own, uint32_t place, Pointers others, uint32_t n_others,         \
                          uint64_t n, float divisor, float *error, int stochastic, uint64_t seed, \
                          uint8_t *out) {                                                         \
        Blocked<FORM>::combine(own, place, others, n_others, n, divisor, error, stochastic != 0,  \
                               seed, out);                                                        \
    }
