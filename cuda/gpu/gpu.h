// What the GPU kernels share: blocks of 256 values a warp, loads of any alignment, pointer tables.
//
// Compiled by NVRTC when a process first uses them (hpcsync/device/cuda_kernels.py), always with
// --fmad=false; by nvcc in tests, and by g++ with tests/shim, which runs them on the host. Thread
// blocks are whole warps. All memory is the device's; coded bytes may stand anywhere.
#pragma once

#include "../hpcsync_block.h"

#define KERNEL extern "C" __global__ void __launch_bounds__(256)
#define DEVICE static __device__ __forceinline__
#define ALL_LANES 0xFFFFFFFFu

// Arrays of several ranks, passed by value.
#define HPCSYNC_GPU_POINTERS 64

struct Pointers {
    const void *at[HPCSYNC_GPU_POINTERS];
};

DEVICE uint32_t lane_of() { return threadIdx.x & 31u; }
DEVICE uint64_t thread_of() { return (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE uint64_t threads_in_all() { return (uint64_t)gridDim.x * blockDim.x; }
DEVICE uint64_t warp_of() { return thread_of() >> 5; }
DEVICE uint64_t warps_in_all() { return threads_in_all() >> 5; }

DEVICE bool aligned(const void *at, uint32_t bytes) { return ((size_t)at & (bytes - 1u)) == 0; }

// ---- single values anywhere ------------------------------------------------------------------

template <typename T>
DEVICE T load_any(const uint8_t *from) {
    T value;
    if (aligned(from, sizeof(T)))
        value = *(const T *)from;
    else
        for (uint32_t i = 0; i < sizeof(T); ++i) ((uint8_t *)&value)[i] = from[i];
    return value;
}

template <typename T>
DEVICE void store_any(uint8_t *to, T value) {
    if (aligned(to, sizeof(T)))
        *(T *)to = value;
    else
        for (uint32_t i = 0; i < sizeof(T); ++i) to[i] = ((const uint8_t *)&value)[i];
}

// ---- sums --------------------------------------------------------------------------------------

struct Divisor {
    float value, reciprocal;
    bool product;
};

DEVICE Divisor divisor_of(float value) {
    Divisor made = {value, 1.0f / value, hpcsync_is_power_of_two(value)};
    return made;
}

DEVICE float divided(float value, Divisor divisor) {
    return divisor.product ? value * divisor.reciprocal : value / divisor.value;
}

DEVICE uint32_t largest_of_warp(uint32_t value) {
    for (int distance = 16; distance; distance >>= 1) {
        uint32_t other = __shfl_xor_sync(ALL_LANES, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

DEVICE uint32_t sum_of_warp(uint32_t value) {
    for (int distance = 16; distance; distance >>= 1)
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

// ---- rows: 256 values, eight a lane ------------------------------------------------------------
//
// Value j of a lane is element row_index(j): four neighbours, and four 128 further on, so that a
// lane loads 16 bytes at once and a warp 512 in a row.

#define ROW 256u
#define ROW_VALUES 8

DEVICE uint32_t row_index(int j) {
    return ((uint32_t)j >> 2) * 128u + lane_of() * 4u + ((uint32_t)j & 3u);
}

template <int BYTES>
struct Quad;
template <>
struct Quad<4> {
    typedef uint32_t Type;
};
template <>
struct Quad<8> {
    typedef uint2 Type;
};
template <>
struct Quad<16> {
    typedef uint4 Type;
};
template <>
struct Quad<32> {
    struct Type {
        uint4 low, high;
    };
};

// The lane's values of a row; zeros from `count` on.
template <typename T>
DEVICE void load_row(const void *from, uint32_t count, T *values) {
    typedef typename Quad<4 * sizeof(T)>::Type Four;
    const T *at = (const T *)from;
    if (count == ROW && aligned(from, sizeof(Four))) {
        Four low = *(const Four *)(at + row_index(0)), high = *(const Four *)(at + row_index(4));
        *(Four *)values = low;
        *(Four *)(values + 4) = high;
        return;
    }
    for (int j = 0; j < ROW_VALUES; ++j)
        values[j] = row_index(j) < count
                        ? load_any<T>((const uint8_t *)from + row_index(j) * sizeof(T))
                        : (T)0;
}

template <typename T>
DEVICE void store_row(void *to, uint32_t count, const T *values) {
    typedef typename Quad<4 * sizeof(T)>::Type Four;
    T *at = (T *)to;
    if (count == ROW && aligned(to, sizeof(Four))) {
        *(Four *)(at + row_index(0)) = *(const Four *)values;
        *(Four *)(at + row_index(4)) = *(const Four *)(values + 4);
        return;
    }
    for (int j = 0; j < ROW_VALUES; ++j)
        if (row_index(j) < count) store_any<T>((uint8_t *)to + row_index(j) * sizeof(T), values[j]);
}

// A lane's values, so aligned that load_row and store_row may take four at once.
template <typename T>
struct alignas(4 * sizeof(T)) Values {
    T at[ROW_VALUES];
};

DEVICE uint32_t count_of(uint64_t n, uint64_t start, uint32_t block) {
    return n - start < block ? (uint32_t)(n - start) : block;
}
