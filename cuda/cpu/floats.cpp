// Codecs of floats of fewer bits: bf16, fp16, and fp8 (e4m3fn) with a scale a block.
#include "blocked.h"
#include "convert.h"
#include "kernel.h"

namespace {

struct Bf16 {
    typedef uint16_t Code;
    typedef uint32_t Wide;
    static constexpr bool SCALED = false, ROWS = false;
    static constexpr float LEVELS = 0.0f;

    template <bool RANDOM>
    static inline __attribute__((always_inline)) Wide wide(float value, uint32_t bits) {
        return RANDOM ? hpcsync_to_bf16_random(value, bits) : hpcsync_to_bf16(value);
    }

    static inline __attribute__((always_inline)) float value(Wide code) {
        return hpcsync_from_bf16((uint16_t)code);
    }
};

struct F16 : Bf16 {
    template <bool RANDOM>
    static inline __attribute__((always_inline)) Wide wide(float value, uint32_t bits) {
        return hpcsync_to_f16(value, RANDOM, bits);
    }

    static inline __attribute__((always_inline)) float value(Wide code) {
        return hpcsync_from_f16((uint16_t)code);
    }

    static constexpr bool ROWS = true;
    static void narrow(const float *from, size_t n, uint16_t *to) { narrow_f16(from, n, to); }
    static void widen(const uint16_t *from, size_t n, float *to) { widen_f16(from, n, to); }
};

struct E4m3 {
    typedef uint8_t Code;
    typedef uint32_t Wide;
    static constexpr bool SCALED = true, ROWS = false;
    static constexpr float LEVELS = 448.0f;

    template <bool RANDOM>
    static inline __attribute__((always_inline)) Wide wide(float value, uint32_t bits) {
        return hpcsync_to_e4m3(value, RANDOM, bits);
    }

    static inline __attribute__((always_inline)) float value(Wide code) {
        return hpcsync_from_e4m3((uint8_t)code);
    }
};

}  // namespace

namespace HPCSYNC_ISA {

HPCSYNC_BLOCKED(bf16, Bf16)
HPCSYNC_BLOCKED(fp16, F16)
HPCSYNC_BLOCKED(fp8, E4m3)

}  // namespace HPCSYNC_ISA
