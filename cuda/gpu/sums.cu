// Sums of several ranks' buffers: every source is read once, every output written once. The first
// source's values, then the others' added in order; then divided.
#include "gpu.h"

namespace {

struct Plain {
    typedef float Code;
    DEVICE float widen(float code) { return code; }
    DEVICE float narrow(float value) { return value; }
};

struct Bf16 {
    typedef uint16_t Code;
    DEVICE float widen(uint16_t code) { return hpcsync_from_bf16(code); }
    DEVICE uint16_t narrow(float value) { return hpcsync_to_bf16(value); }
};

struct F16 {
    typedef uint16_t Code;
    DEVICE float widen(uint16_t code) { return hpcsync_from_f16(code); }
    DEVICE uint16_t narrow(float value) { return hpcsync_to_f16(value, false, 0); }
};

// A warp a row. An output may be one of the sources: each value is read before it is written.
template <class Form>
DEVICE void add_rows(const Pointers &outs, uint32_t n_outs, const Pointers &sources,
                     uint32_t n_sources, uint64_t n, float by) {
    typedef typename Form::Code Code;
    const Divisor divisor = divisor_of(by);
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        Values<Code> codes;
        float total[ROW_VALUES];
        load_row((const Code *)sources.at[0] + start, count, codes.at);
        for (int j = 0; j < ROW_VALUES; ++j) total[j] = Form::widen(codes.at[j]);
        for (uint32_t s = 1; s < n_sources; ++s) {
            load_row((const Code *)sources.at[s] + start, count, codes.at);
            for (int j = 0; j < ROW_VALUES; ++j) total[j] += Form::widen(codes.at[j]);
        }
        for (int j = 0; j < ROW_VALUES; ++j)
            codes.at[j] = Form::narrow(by == 1.0f ? total[j] : divided(total[j], divisor));
        for (uint32_t o = 0; o < n_outs; ++o)
            store_row((Code *)outs.at[o] + start, count, codes.at);
    }
}

}  // namespace

KERNEL add_f32(Pointers outs, uint32_t n_outs, Pointers sources, uint32_t n_sources, uint64_t n,
               float divisor) {
    add_rows<Plain>(outs, n_outs, sources, n_sources, n, divisor);
}

KERNEL add_bf16(Pointers outs, uint32_t n_outs, Pointers sources, uint32_t n_sources, uint64_t n,
                float divisor) {
    add_rows<Bf16>(outs, n_outs, sources, n_sources, n, divisor);
}

KERNEL add_f16(Pointers outs, uint32_t n_outs, Pointers sources, uint32_t n_sources, uint64_t n,
               float divisor) {
    add_rows<F16>(outs, n_outs, sources, n_sources, n, divisor);
}
