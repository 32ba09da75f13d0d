// Codecs of floats of fewer bits: bf16, fp16, and fp8 (e4m3fn) with a scale a block.
#include "blocked.h"

namespace {

struct Bf16 {
    typedef uint16_t Code;
    static constexpr bool SCALED = false;
    static constexpr float LEVELS = 0.0f;
    DEVICE uint16_t code(float value, bool at_random, uint32_t bits) {
        return at_random ? hpcsync_to_bf16_random(value, bits) : hpcsync_to_bf16(value);
    }
    DEVICE float value(uint16_t code) { return hpcsync_from_bf16(code); }
};

struct F16 {
    typedef uint16_t Code;
    static constexpr bool SCALED = false;
    static constexpr float LEVELS = 0.0f;
    DEVICE uint16_t code(float value, bool at_random, uint32_t bits) {
        return hpcsync_to_f16(value, at_random, bits);
    }
    DEVICE float value(uint16_t code) { return hpcsync_from_f16(code); }
};

struct E4m3 {
    typedef uint8_t Code;
    static constexpr bool SCALED = true;
    static constexpr float LEVELS = 448.0f;
    DEVICE uint8_t code(float value, bool at_random, uint32_t bits) {
        return hpcsync_to_e4m3(value, at_random, bits);
    }
    DEVICE float value(uint8_t code) { return hpcsync_from_e4m3(code); }
};

}  // namespace

HPCSYNC_BLOCKED(bf16, Bf16)
HPCSYNC_BLOCKED(fp16, F16)
HPCSYNC_BLOCKED(fp8, E4m3)
