// What the GPU's sparse kernels share: the sums with the stores, scans over a thread block, and
// the tiles that pieces are cut into.
#pragma once

#include "../hpcsync_block_sparse.h"
#include "gpu.h"

// Elements of a tile: a thread block's work, or a warp's. 16 blocks of one-byte indices; 16 tiles
// are a block of two-byte indices.
#define TILE 4096u
#define SMALL_BLOCKS (TILE / HPCSYNC_SPARSE_SMALL)
#define LARGE_TILES (HPCSYNC_SPARSE_LARGE / TILE)
#define BINS 2048u

DEVICE uint64_t tiles_of(uint64_t n) { return (n + TILE - 1) / TILE; }

// The sum over the thread block's threads before this one, and over all of them.
DEVICE uint32_t scan_of_block(uint32_t value, uint32_t *total) {
    __shared__ uint32_t sums[32];
    const uint32_t lane = lane_of(), warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    uint32_t sum = value, before = 0;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    *total = 0;
    for (uint32_t w = 0; w < warps; ++w) {
        if (w == warp) before = *total;
        *total += sums[w];
    }
    __syncthreads();
    return before + sum - value;
}

DEVICE uint32_t scan_of_warp(uint32_t value, uint32_t *total) {
    uint32_t sum = value;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane_of() >= distance) sum += below;
    }
    *total = __shfl_sync(ALL_LANES, sum, 31);
    return sum - value;
}

// The stores' sums, as cuda/cpu/sparse.h makes them.
struct Sums {
    const float *x;
    Divisor divisor;
    float momentum;
    float *velocity, *error;
};

DEVICE void keep_finite(float made, float *kept, bool *bad) {
    if (hpcsync_finite(made))
        *kept = made;
    else
        *bad = true;
}

// Adds a row into the stores; `made` is then what may be sent of it.
DEVICE void add_row(const Sums &sums, uint64_t start, uint32_t count, float *made, bool *bad) {
    Values<float> held;
    load_row(sums.x + start, count, made);
    for (int j = 0; j < ROW_VALUES; ++j) made[j] = divided(made[j], sums.divisor);
    if (sums.velocity) {
        load_row(sums.velocity + start, count, held.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            made[j] = sums.momentum * held.at[j] + made[j];
            keep_finite(made[j], &held.at[j], bad);
        }
        store_row(sums.velocity + start, count, held.at);
    }
    if (sums.error) {
        load_row(sums.error + start, count, held.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            keep_finite(held.at[j] + made[j], &held.at[j], bad);
            made[j] = held.at[j];
        }
        store_row(sums.error + start, count, held.at);
    } else {
        for (int j = 0; j < ROW_VALUES; ++j) *bad = *bad || !hpcsync_finite(made[j]);
    }
}

DEVICE void tell(bool bad, uint32_t *flag) {
    if (__any_sync(ALL_LANES, bad) && lane_of() == 0) atomicOr(flag, 1u);
}
