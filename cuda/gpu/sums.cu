// Sums of several ranks' buffers: every source is read once, every output written once. The first
// source's values, then the others' added in order; then divided.
#include "gpu.h"

namespace {

// How elements are stored, and in what they are added.
struct Plain {
    typedef float Code;
    typedef float Total;
    DEVICE float widen(float code) { return code; }
    DEVICE float narrow(float value) { return value; }
};

struct Bf16 {
    typedef uint16_t Code;
    typedef float Total;
    DEVICE float widen(uint16_t code) { return hpcsync_from_bf16(code); }
    DEVICE uint16_t narrow(float value) { return hpcsync_to_bf16(value); }
};

struct F16 {
    typedef uint16_t Code;
    typedef float Total;
    DEVICE float widen(uint16_t code) { return hpcsync_from_f16(code); }
    DEVICE uint16_t narrow(float value) { return hpcsync_to_f16(value, false, 0); }
};

// float64, and integers, which wrap: unsigned types serve signed ones.
template <class T>
struct Same {
    typedef T Code;
    typedef T Total;
    DEVICE T widen(T code) { return code; }
    DEVICE T narrow(T value) { return value; }
};

struct Sum {
    template <class T>
    DEVICE T join(T total, T value) {
        return (T)(total + value);
    }
};

struct Largest {
    template <class T>
    DEVICE T join(T total, T value) {
        return value > total ? value : total;
    }
};

DEVICE float mean(float total, Divisor divisor) { return divided(total, divisor); }
DEVICE double mean(double total, Divisor divisor) { return total / (double)divisor.value; }
template <class T>
DEVICE T mean(T total, Divisor) {
    return total;  // integers have no divisor
}

// A warp a row. An output may be one of the sources: each value is read before it is written.
template <class Form, class Join>
DEVICE void add_rows(const Pointers &outs, uint32_t n_outs, const Pointers &sources,
                     uint32_t n_sources, uint64_t n, float by) {
    typedef typename Form::Code Code;
    const Divisor divisor = divisor_of(by);
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        Values<Code> codes;
        typename Form::Total total[ROW_VALUES];
        load_row((const Code *)sources.at[0] + start, count, codes.at);
        for (int j = 0; j < ROW_VALUES; ++j) total[j] = Form::widen(codes.at[j]);
        for (uint32_t s = 1; s < n_sources; ++s) {
            load_row((const Code *)sources.at[s] + start, count, codes.at);
            for (int j = 0; j < ROW_VALUES; ++j)
                total[j] = Join::join(total[j], Form::widen(codes.at[j]));
        }
        for (int j = 0; j < ROW_VALUES; ++j)
            codes.at[j] = Form::narrow(by == 1.0f ? total[j] : mean(total[j], divisor));
        for (uint32_t o = 0; o < n_outs; ++o)
            store_row((Code *)outs.at[o] + start, count, codes.at);
    }
}

}  // namespace

#define SUMS(name, Form, Join)                                                                   \
    KERNEL name(Pointers outs, uint32_t n_outs, Pointers sources, uint32_t n_sources, uint64_t n, \
                float divisor) {                                                                 \
        add_rows<Form, Join>(outs, n_outs, sources, n_sources, n, divisor);                      \
    }

SUMS(add_f32, Plain, Sum)
SUMS(add_bf16, Bf16, Sum)
SUMS(add_f16, F16, Sum)
SUMS(add_f64, Same<double>, Sum)
SUMS(add_u8, Same<uint8_t>, Sum)
SUMS(add_u16, Same<uint16_t>, Sum)
SUMS(add_u32, Same<uint32_t>, Sum)
SUMS(add_u64, Same<uint64_t>, Sum)
SUMS(add_max_i32, Same<int32_t>, Largest)
