// Sums of several ranks' buffers: every source is read once, every output written once.
#include "../hpcsync_block.h"
#include "convert.h"
#include "kernel.h"
#include "vector.h"

namespace {

// Registers that hold sums at a time: enough loads in flight, and few enough for 16 registers.
constexpr size_t WIDTH = 4;
constexpr size_t STEP = WIDTH * LANES;

// Elements fetched ahead, half a page: the processor's own prefetching stops at a page's end, and
// several streams at once fall behind without it.
constexpr size_t AHEAD = 512;

struct Divisor {
    float value, reciprocal;
    bool product, none;

    explicit Divisor(float divisor)
        : value(divisor),
          reciprocal(1.0f / divisor),
          product(hpcsync_is_power_of_two(divisor)),
          none(divisor == 1.0f) {}

    template <class T>
    inline __attribute__((always_inline)) T of(T total) const {
        if (none) return total;
        return product ? total * reciprocal : total / value;
    }
};

void add_some(float *const *outs, size_t n_outs, const float *const *sources, size_t n_sources,
              size_t from, size_t to, const Divisor &divisor) {
    for (size_t i = from; i < to; ++i) {
        float total = sources[0][i];
        for (size_t s = 1; s < n_sources; ++s) total += sources[s][i];
        total = divisor.of(total);
        for (size_t o = 0; o < n_outs; ++o) outs[o][i] = total;
    }
}

// Of [from, to), a multiple of STEP elements. COUNT is the number of sources if it is known.
template <size_t COUNT>
void add_steps(float *const *outs, size_t n_outs, const bool *streamed, const float *const *sources,
               size_t n_sources, size_t from, size_t to, const Divisor &divisor) {
    const size_t count = COUNT ? COUNT : n_sources;
    for (size_t i = from; i < to; i += STEP) {
        Vector total[WIDTH];
        for (size_t s = 0; s < count; ++s)
            for (size_t k = 0; k < STEP; k += 16) __builtin_prefetch(sources[s] + i + k + AHEAD);
        for (size_t k = 0; k < WIDTH; ++k) total[k] = load(sources[0] + i + k * LANES);
        for (size_t s = 1; s < count; ++s)
            for (size_t k = 0; k < WIDTH; ++k) total[k] += load(sources[s] + i + k * LANES);
        for (size_t k = 0; k < WIDTH; ++k) total[k] = divisor.of(total[k]);
        for (size_t o = 0; o < n_outs; ++o) {
            float *out = outs[o] + i;
            if (streamed[o])
                for (size_t k = 0; k < WIDTH; ++k) stream(out + k * LANES, total[k]);
            else
                for (size_t k = 0; k < WIDTH; ++k) store(out + k * LANES, total[k]);
        }
    }
}

}  // namespace

namespace HPCSYNC_ISA {

void add_f32(float *const *outs, size_t n_outs, const float *const *sources, size_t n_sources,
             size_t n, float by) {
    const Divisor divisor(by);
    constexpr size_t MOST = 64;
    if (n_outs > MOST) {  // beyond any node's ranks: copy the rest from the first
        add_f32(outs, 1, sources, n_sources, n, by);
        for (size_t o = 1; o < n_outs; ++o) memcpy(outs[o], outs[0], n * sizeof(float));
        return;
    }
    bool streamed[MOST];
    size_t begin = 0;
    for (size_t o = 0; o < n_outs; ++o) {
        streamed[o] = n * sizeof(float) >= STREAM_BYTES;
        for (size_t s = 0; s < n_sources; ++s)
            if (outs[o] == sources[s]) streamed[o] = false;
    }
    for (size_t o = 0; o < n_outs; ++o)
        if (streamed[o]) {  // as far as the first one's boundary
            begin = (-(uintptr_t)outs[o] % VECTOR_BYTES) / sizeof(float);
            break;
        }
    for (size_t o = 0; o < n_outs; ++o)
        if ((uintptr_t)(outs[o] + begin) % VECTOR_BYTES) streamed[o] = false;
    if (begin > n) begin = n;
    const size_t end = begin + (n - begin) / STEP * STEP;
    add_some(outs, n_outs, sources, n_sources, 0, begin, divisor);
    switch (n_sources) {
        case 1: add_steps<1>(outs, n_outs, streamed, sources, 1, begin, end, divisor); break;
        case 2: add_steps<2>(outs, n_outs, streamed, sources, 2, begin, end, divisor); break;
        case 3: add_steps<3>(outs, n_outs, streamed, sources, 3, begin, end, divisor); break;
        case 4: add_steps<4>(outs, n_outs, streamed, sources, 4, begin, end, divisor); break;
        default: add_steps<0>(outs, n_outs, streamed, sources, n_sources, begin, end, divisor);
    }
    add_some(outs, n_outs, sources, n_sources, end, n, divisor);
    stream_end();
}

}  // namespace HPCSYNC_ISA

namespace {

// A part of all arrays that stays in the first cache.
constexpr size_t PART = 1024;

template <void (*WIDEN)(const uint16_t *, size_t, float *),
          void (*NARROW)(const float *, size_t, uint16_t *)>
void add_halves(uint16_t *const *outs, size_t n_outs, const uint16_t *const *sources,
                size_t n_sources, size_t n, float by) {
    const Divisor divisor(by);
    float total[PART], term[PART];
    uint16_t code[PART];
    for (size_t start = 0; start < n; start += PART) {
        const size_t count = n - start < PART ? n - start : PART;
        WIDEN(sources[0] + start, count, total);
        for (size_t s = 1; s < n_sources; ++s) {
            WIDEN(sources[s] + start, count, term);
            for (size_t i = 0; i < count; ++i) total[i] += term[i];
        }
        if (!divisor.none)
            for (size_t i = 0; i < count; ++i) total[i] = divisor.of(total[i]);
        NARROW(total, count, code);
        for (size_t o = 0; o < n_outs; ++o) memcpy(outs[o] + start, code, count * sizeof(uint16_t));
    }
}

}  // namespace

namespace HPCSYNC_ISA {

void add_bf16(uint16_t *const *outs, size_t n_outs, const uint16_t *const *sources,
              size_t n_sources, size_t n, float divisor) {
    add_halves<widen_bf16, narrow_bf16>(outs, n_outs, sources, n_sources, n, divisor);
}

void add_f16(uint16_t *const *outs, size_t n_outs, const uint16_t *const *sources,
             size_t n_sources, size_t n, float divisor) {
    add_halves<widen_f16, narrow_f16>(outs, n_outs, sources, n_sources, n, divisor);
}

}  // namespace HPCSYNC_ISA
