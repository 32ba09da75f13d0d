// What the sparse codecs' kernels share: sums with the error store.
#pragma once

#include "kernel.h"

#include "../hpcsync_block_sparse.h"

namespace HPCSYNC_ISA {

namespace {

// x / divisor + error, with momentum: velocity = momentum * velocity + x / divisor, and velocity +
// error. Where the result is not finite, velocity and error stay as they were.
struct Sums {
    const float *x;
    float divisor, momentum;
    float *velocity, *error;

    float divided(float value) const {
        return hpcsync_is_power_of_two(divisor) ? value * (1.0f / divisor) : value / divisor;
    }

    float at(size_t i) const {
        float value = divided(x[i]);
        if (velocity) value = momentum * velocity[i] + value;
        return error ? error[i] + value : value;
    }

    void prefetch(size_t i) const {
        __builtin_prefetch(x + i);
        if (velocity) __builtin_prefetch(velocity + i);
        if (error) __builtin_prefetch(error + i);
    }

    // Adds `count` elements, at most 1024, into the stores; bit 31 says whether one is not finite.
    uint32_t add(size_t start, size_t count) const {
        float room[1024];
        const float *values = x + start;
        if (divisor != 1.0f) {
            divide(values, count, room);
            values = room;
        }
        if (velocity) {
            speed(values, count, velocity + start, room);
            values = room;
        }
        return error ? sum(values, count, error + start) : check(values, count);
    }

    void divide(const float *values, size_t count, float *__restrict out) const {
        float inverse = 1.0f / divisor;
        if (hpcsync_is_power_of_two(divisor))
            for (size_t i = 0; i < count; ++i) out[i] = values[i] * inverse;
        else
            for (size_t i = 0; i < count; ++i) out[i] = values[i] / divisor;
    }

    // `out` may be `values`.
    uint32_t speed(const float *values, size_t count, float *__restrict kept, float *out) const {
        uint32_t bad = 0;
#pragma GCC ivdep
        for (size_t i = 0; i < count; ++i) {
            float made = momentum * kept[i] + values[i];
            uint32_t size = hpcsync_abs_bits(made);
            bad |= size + 0x00800000u;
            kept[i] = size < HPCSYNC_INF_BITS ? made : kept[i];
            out[i] = made;
        }
        return bad & 0x80000000u;
    }

    static uint32_t sum(const float *__restrict values, size_t count, float *__restrict kept) {
        uint32_t bad = 0;
        for (size_t i = 0; i < count; ++i) {
            float made = kept[i] + values[i];
            uint32_t size = hpcsync_abs_bits(made);
            bad |= size + 0x00800000u;
            kept[i] = size < HPCSYNC_INF_BITS ? made : kept[i];
        }
        return bad & 0x80000000u;
    }

    static uint32_t check(const float *values, size_t count) {
        uint32_t bad = 0;
        for (size_t i = 0; i < count; ++i) bad |= hpcsync_abs_bits(values[i]) + 0x00800000u;
        return bad & 0x80000000u;
    }
};

}  // namespace

}  // namespace HPCSYNC_ISA
