// Sparse pieces back to elements, and random-k's groups, on the GPU.
//
// Where an entry of a piece belongs depends on how many come before it: `count` counts those of
// each tile (of each large block, for two-byte indices), sparse_scan adds these up, `apply` places
// them.
#include "sparse.h"

namespace {

struct Coded {
    int kind;
    uint32_t entries;
    const uint8_t *body, *codes;
};

DEVICE Coded coded_of(const uint8_t *in, uint64_t n) {
    Coded made;
    made.kind = (int)load_any<uint32_t>(in);
    made.entries = load_any<uint32_t>(in + 4);
    made.body = in + HPCSYNC_SPARSE_HEADER;
    made.codes = made.body + hpcsync_sparse_index_bytes(made.kind, n, made.entries);
    return made;
}

// Round `round` (of 4) of a tile's bitmap: the lane's 32 bits.
DEVICE uint32_t load_bits(const Coded &coded, uint64_t n, uint64_t tile, uint32_t round) {
    const uint64_t bytes = (n + 7) / 8, at = tile * (TILE / 8) + 128 * round + 4 * lane_of();
    if (at + 4 <= bytes) return load_any<uint32_t>(coded.body + at);
    uint32_t bits = 0;
    for (uint64_t i = at; i < bytes && i < at + 4; ++i)
        bits |= (uint32_t)coded.body[i] << (8 * (i - at));
    return bits;
}

// Entries of the lane's small block of a tile; 0 for lanes without one.
DEVICE uint32_t load_count(const Coded &coded, uint64_t n, uint64_t tile) {
    const uint64_t block = tile * SMALL_BLOCKS + lane_of();
    const bool there = lane_of() < SMALL_BLOCKS && block * HPCSYNC_SPARSE_SMALL < n;
    return there ? coded.body[block] : 0u;
}

enum { SET, ADD, CLEAR };

struct Target {
    float *out;
    int mode;
};

DEVICE void place_entry(const Coded &coded, const Target &target, uint64_t place, uint64_t entry) {
    const float value = hpcsync_from_bf16(load_any<uint16_t>(coded.codes + 2 * entry));
    float *at = target.out + place;
    *at = target.mode == CLEAR ? 0.0f : target.mode == ADD ? *at + value : value;
}

// A warp places a tile's entries, the first of which is `entry`.
DEVICE void place_bytes(const Coded &coded, const Target &target, uint64_t n, uint64_t tile,
                        uint64_t entry) {
    const uint8_t *indices = coded.body + hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL);
    uint32_t total;
    const uint32_t count = load_count(coded, n, tile);
    const uint32_t end = scan_of_warp(count, &total) + count;
    for (uint32_t start = 0; start < total; start += 32) {
        const uint32_t i = start + lane_of();
        uint32_t block = 0;
        for (int b = 0; b < (int)SMALL_BLOCKS; ++b) block += __shfl_sync(ALL_LANES, end, b) <= i;
        if (i < total)
            place_entry(coded, target,
                        tile * TILE + block * HPCSYNC_SPARSE_SMALL + indices[entry + i], entry + i);
    }
}

DEVICE void place_bitmap(const Coded &coded, const Target &target, uint64_t n, uint64_t tile,
                         uint64_t entry) {
    for (uint32_t round = 0; round < TILE / 1024; ++round) {
        uint32_t total, bits = load_bits(coded, n, tile, round);
        uint64_t at = entry + scan_of_warp((uint32_t)__popc(bits), &total);
        for (; bits; bits &= bits - 1, ++at)
            place_entry(coded, target,
                        tile * TILE + 1024 * round + 32 * lane_of() + (uint32_t)__ffs((int)bits) - 1,
                        at);
        entry += total;
    }
}

// A thread places one entry, in the last of the `blocks` large blocks that begin at or before it.
DEVICE void place_word(const Coded &coded, const Target &target, const uint32_t *before,
                       uint64_t blocks, uint64_t entry) {
    uint64_t low = 0, high = blocks;
    while (high - low > 1) {
        const uint64_t middle = (low + high) / 2;
        if (before[middle] <= entry)
            low = middle;
        else
            high = middle;
    }
    const uint64_t index = load_any<uint16_t>(coded.body + 4 * blocks + 2 * entry);
    place_entry(coded, target, low * HPCSYNC_SPARSE_LARGE + index, entry);
}

}  // namespace

KERNEL entries_count(const uint8_t *in, uint64_t n, uint32_t *before) {
    const Coded coded = coded_of(in, n);
    const uint64_t large = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE);
    for (uint64_t tile = warp_of(); tile < tiles_of(n); tile += warps_in_all()) {
        uint32_t count = 0;
        if (coded.kind == HPCSYNC_SPARSE_BYTES) count = sum_of_warp(load_count(coded, n, tile));
        if (coded.kind == HPCSYNC_SPARSE_BITMAP) {
            for (uint32_t round = 0; round < TILE / 1024; ++round)
                count += (uint32_t)__popc(load_bits(coded, n, tile, round));
            count = sum_of_warp(count);
        }
        if (coded.kind == HPCSYNC_SPARSE_WORDS && tile < large)
            count = load_any<uint32_t>(coded.body + 4 * tile);
        if (lane_of() == 0) before[tile] = count;
    }
}

KERNEL entries_zero(float *out, uint64_t n) {
    for (uint64_t i = thread_of(); i < n; i += threads_in_all()) out[i] = 0.0f;
}

// mode: 0 sets elements of `out`, 1 adds to them, 2 zeroes them.
KERNEL entries_apply(const uint8_t *in, uint64_t n, const uint32_t *before, int mode, float *out) {
    const Coded coded = coded_of(in, n);
    const Target target = {out, mode};
    const uint64_t large = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE);
    if (coded.kind == HPCSYNC_SPARSE_POISON) {
        for (uint64_t i = thread_of(); i < n && mode != CLEAR; i += threads_in_all())
            out[i] = hpcsync_float(HPCSYNC_NAN_BITS);
    } else if (coded.kind == HPCSYNC_SPARSE_WORDS) {
        for (uint64_t i = thread_of(); i < coded.entries; i += threads_in_all())
            place_word(coded, target, before, large, i);
    } else if (coded.kind == HPCSYNC_SPARSE_DENSE) {
        for (uint64_t i = thread_of(); i < n; i += threads_in_all())
            place_entry(coded, target, i, i);
    } else {
        for (uint64_t tile = warp_of(); tile < tiles_of(n); tile += warps_in_all()) {
            if (coded.kind == HPCSYNC_SPARSE_BYTES)
                place_bytes(coded, target, n, tile, before[tile]);
            else
                place_bitmap(coded, target, n, tile, before[tile]);
        }
    }
}

// ---- random-k ----------------------------------------------------------------------------------

KERNEL groups_take(float *x, uint64_t n, uint32_t groups, uint64_t seed, int clear, float *out) {
    const hpcsync_key key = hpcsync_random_key(seed);
    const uint32_t all = (uint32_t)hpcsync_sparse_blocks(n, HPCSYNC_GROUP);
    for (uint64_t i = thread_of(); i < (uint64_t)groups * HPCSYNC_GROUP; i += threads_in_all()) {
        const uint64_t group = hpcsync_group_at(key, (uint32_t)(i / HPCSYNC_GROUP), all, groups);
        const uint64_t place = group * HPCSYNC_GROUP + i % HPCSYNC_GROUP;
        out[i] = place < n ? x[place] : 0.0f;
        if (clear && place < n) x[place] = 0.0f;
    }
}

// Other elements of `out` must be zero already.
KERNEL groups_put(const float *in, uint64_t n, uint32_t groups, uint64_t seed, float by,
                  float scale, float *out) {
    const hpcsync_key key = hpcsync_random_key(seed);
    const Divisor divisor = divisor_of(by);
    const uint32_t all = (uint32_t)hpcsync_sparse_blocks(n, HPCSYNC_GROUP);
    for (uint64_t i = thread_of(); i < (uint64_t)groups * HPCSYNC_GROUP; i += threads_in_all()) {
        const uint64_t group = hpcsync_group_at(key, (uint32_t)(i / HPCSYNC_GROUP), all, groups);
        const uint64_t place = group * HPCSYNC_GROUP + i % HPCSYNC_GROUP;
        if (place < n) out[place] = divided(in[i], divisor) * scale;
    }
}

// After groups_take: zeroes in x what it took, and writes 0 to *told; or, if *bad, leaves x as it
// is, and writes NaN. x may be NULL.
KERNEL groups_settle(float *x, uint64_t n, uint32_t groups, uint64_t seed, const uint32_t *bad,
                     float *told) {
    const hpcsync_key key = hpcsync_random_key(seed);
    const uint32_t all = (uint32_t)hpcsync_sparse_blocks(n, HPCSYNC_GROUP);
    if (thread_of() == 0) *told = *bad ? hpcsync_float(HPCSYNC_NAN_BITS) : 0.0f;
    if (*bad || !x) return;
    for (uint64_t i = thread_of(); i < (uint64_t)groups * HPCSYNC_GROUP; i += threads_in_all()) {
        const uint64_t group = hpcsync_group_at(key, (uint32_t)(i / HPCSYNC_GROUP), all, groups);
        const uint64_t place = group * HPCSYNC_GROUP + i % HPCSYNC_GROUP;
        if (place < n) x[place] = 0.0f;
    }
}

// All of `out` becomes NaN if *told is not finite.
KERNEL groups_spoil(const float *told, uint64_t n, float *out) {
    if (hpcsync_finite(*told)) return;
    for (uint64_t i = thread_of(); i < n; i += threads_in_all())
        out[i] = hpcsync_float(HPCSYNC_NAN_BITS);
}
