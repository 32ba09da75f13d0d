// Top-k and threshold on the GPU. Coding a piece is a row of kernels on one stream, which hand on
// what they find in a State; nothing goes to the host in between.
//
//     begin     clear State, bins and the counts of blocks
//     add       sums with the stores; bins of the magnitudes' upper 11 bits
//     find      the bin with the k-th largest
//     collect   indices of all that are not below that bin, in order within a tile: candidates
//     refine, find, refine, find
//               10 and 10 bits more, of the candidates: the exact cut (radix search: Shanbhag,
//               Pirk and Madden, SIGMOD 2018, section 4.3)
//     equals, scan
//               how many candidates of each tile equal the cut, and of the tiles before it
//     choose, scan
//               those that go, by a tile's place among the equal ones
//     plan      the kind of the coded form, its header
//     write     indices, values, and what rounding lost
#include "sparse.h"

struct State {
    uint32_t bad;         // a NaN or Inf was met
    uint32_t found;       // the cut is known: all from `cut` on go
    uint32_t prefix;      // upper bits of the cut
    uint32_t wanted;      // of those that begin with the prefix, so many go
    uint32_t equal;       // that equal the cut
    uint32_t cut;         // magnitudes above it go
    uint32_t least;       // magnitudes from it on are candidates
    uint32_t candidates;  // so many
    uint32_t count;       // that go
    uint32_t full;        // a block of 256 elements has 256 of them
    uint32_t kind;        // of the coded form
    uint32_t unused[5];
};

// Parts of the scratch memory.
struct Room {
    State *state;
    uint32_t *bins;    // BINS
    uint32_t *small;   // entries of each block of 256 elements
    uint32_t *start;   // where each tile's candidates begin in `places`
    uint32_t *found;   // how many they are; after `choose`, how many go
    uint32_t *equals;  // how many equal the cut; after the scan, of the tiles before
    uint32_t *before;  // entries of the tiles before
    uint32_t *places;  // indices of candidates
};

namespace {

DEVICE uint64_t small_of(uint64_t n) { return tiles_of(n) * SMALL_BLOCKS; }

DEVICE Room room_of(uint32_t *scratch, uint64_t n) {
    const uint64_t tiles = tiles_of(n);
    Room room;
    room.state = (State *)scratch;
    room.bins = scratch + sizeof(State) / 4;
    room.small = room.bins + BINS;
    room.start = room.small + small_of(n);
    room.found = room.start + tiles;
    room.equals = room.found + tiles;
    room.before = room.equals + tiles;
    room.places = room.before + tiles;
    return room;
}

// Adds the block's own bins to those of all.
DEVICE void flush_bins(const uint32_t *mine, uint32_t *bins) {
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += blockDim.x)
        if (mine[bin]) atomicAdd(&bins[bin], mine[bin]);
}

DEVICE void clear_bins(uint32_t *mine) {
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += blockDim.x) mine[bin] = 0;
    __syncthreads();
}

}  // namespace

KERNEL sparse_begin(uint32_t *scratch, uint64_t n) {
    const uint64_t words = sizeof(State) / 4 + BINS + small_of(n);
    for (uint64_t i = thread_of(); i < words; i += threads_in_all()) scratch[i] = 0;
}

KERNEL sparse_add(const float *x, float divisor, float momentum, float *velocity, float *error,
                  uint64_t n, uint32_t lowest, uint32_t *scratch) {
    __shared__ uint32_t mine[BINS];
    const Room room = room_of(scratch, n);
    const Sums sums = {x, divisor_of(divisor), momentum, velocity, error};
    bool bad = false;
    clear_bins(mine);
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        Values<float> made;
        add_row(sums, start, count, made.at, &bad);
        for (int j = 0; j < ROW_VALUES; ++j) {
            const uint32_t size = hpcsync_abs_bits(made.at[j]);
            if (row_index(j) < count && size >= lowest) atomicAdd(&mine[size >> 20], 1u);
        }
    }
    tell(bad, &room.state->bad);
    flush_bins(mine, room.bins);
}

// Finds the bin with the k-th largest from above; one thread block. Stage 0 has 11 bits of the
// magnitudes in its bins, stages 1 and 2 the 10 next of those that begin with the prefix.
KERNEL sparse_find(uint64_t n, uint32_t k, uint32_t lowest, int stage, uint32_t *scratch) {
    __shared__ uint32_t chosen[3];
    const Room room = room_of(scratch, n);
    State *state = room.state;
    const uint32_t each = BINS / blockDim.x, wanted = stage ? state->wanted : k;
    const uint32_t top = BINS - 1 - threadIdx.x * each;
    uint32_t sum = 0, total;
    for (uint32_t i = 0; i < each; ++i) sum += room.bins[top - i];
    uint32_t above = scan_of_block(sum, &total);
    if (above < wanted && above + sum >= wanted)
        for (uint32_t i = 0; i < each; ++i) {
            const uint32_t here = room.bins[top - i];
            if (above + here >= wanted) {
                chosen[0] = top - i, chosen[1] = above, chosen[2] = here;
                break;
            }
            above += here;
        }
    __syncthreads();
    for (uint32_t i = 0; i < each; ++i) room.bins[top - i] = 0;
    if (threadIdx.x || state->found) return;
    if (stage == 0 && total <= k) {
        state->found = state->wanted = state->equal = 1;
        state->cut = state->least = lowest;
        return;
    }
    state->prefix = stage ? state->prefix << 10 | chosen[0] : chosen[0];
    state->wanted = wanted - chosen[1];
    state->equal = chosen[2];
    state->cut = state->prefix;
    if (stage == 0) state->least = chosen[0] << 20 > lowest ? chosen[0] << 20 : lowest;
}

KERNEL sparse_collect(const float *values, uint64_t n, uint32_t *scratch) {
    __shared__ uint32_t begin;
    const Room room = room_of(scratch, n);
    const uint32_t least = room.state->least, each = TILE / blockDim.x;
    for (uint64_t tile = blockIdx.x; tile < tiles_of(n); tile += gridDim.x) {
        const uint64_t first = tile * TILE + threadIdx.x * each;
        uint32_t mine = 0, total;
        for (uint32_t i = 0; i < each && first + i < n; ++i)
            mine |= (uint32_t)(hpcsync_abs_bits(values[first + i]) >= least) << i;
        uint32_t at = scan_of_block((uint32_t)__popc(mine), &total);
        if (threadIdx.x == 0) {
            begin = total ? atomicAdd(&room.state->candidates, total) : 0u;
            room.start[tile] = begin;
            room.found[tile] = total;
        }
        __syncthreads();
        for (uint32_t i = 0; i < each; ++i)
            if (mine >> i & 1u) room.places[begin + at++] = (uint32_t)(first + i);
        __syncthreads();
    }
}

KERNEL sparse_refine(const float *values, uint64_t n, int stage, uint32_t *scratch) {
    __shared__ uint32_t mine[BINS];
    const Room room = room_of(scratch, n);
    const State *state = room.state;
    if (state->found) return;
    const int shift = stage == 1 ? 20 : 10;
    clear_bins(mine);
    for (uint64_t i = thread_of(); i < state->candidates; i += threads_in_all()) {
        const uint32_t size = hpcsync_abs_bits(values[room.places[i]]);
        if (size >> shift == state->prefix) atomicAdd(&mine[size >> (shift - 10) & 1023u], 1u);
    }
    flush_bins(mine, room.bins);
}

KERNEL sparse_equals(const float *values, uint64_t n, uint32_t *scratch) {
    const Room room = room_of(scratch, n);
    const uint32_t cut = room.state->cut;
    for (uint64_t tile = warp_of(); tile < tiles_of(n); tile += warps_in_all()) {
        const uint32_t *places = room.places + room.start[tile];
        uint32_t equals = 0;
        for (uint32_t i = lane_of(); i < room.found[tile]; i += 32)
            equals += hpcsync_abs_bits(values[places[i]]) == cut;
        equals = sum_of_warp(equals);
        if (lane_of() == 0) room.equals[tile] = equals;
    }
}

// Each of `count` numbers becomes the sum of those before it; *total that of all. One thread block.
KERNEL sparse_scan(uint32_t *numbers, uint64_t count, uint32_t *total) {
    uint32_t before = 0;
    for (uint64_t start = 0; start < count; start += blockDim.x) {
        const uint64_t i = start + threadIdx.x;
        uint32_t sum;
        const uint32_t at = scan_of_block(i < count ? numbers[i] : 0u, &sum);
        if (i < count) numbers[i] = before + at;
        before += sum;
    }
    if (threadIdx.x == 0) *total = before;
}

KERNEL sparse_choose(const float *values, uint64_t n, uint64_t seed, uint32_t *scratch) {
    const Room room = room_of(scratch, n);
    State *state = room.state;
    const uint32_t cut = state->cut, wanted = state->wanted, equal = state->equal;
    for (uint64_t tile = blockIdx.x; tile < tiles_of(n); tile += gridDim.x) {
        uint32_t *places = room.places + room.start[tile];
        const uint32_t found = room.found[tile];
        uint32_t equals = room.equals[tile], gone = 0;
        for (uint32_t start = 0; start < found; start += blockDim.x) {
            const uint32_t i = start + threadIdx.x, place = i < found ? places[i] : 0u;
            const uint32_t size = i < found ? hpcsync_abs_bits(values[place]) : 0u;
            uint32_t sum, goes = size > cut;
            const uint32_t rank = equals + scan_of_block(i < found && size == cut, &sum);
            equals += sum;
            // Where all go, from the cut on, none is left out of those that equal it.
            if (i < found && size == cut)
                goes = state->found || hpcsync_ties_at(seed, rank, wanted, equal);
            const uint32_t at = gone + scan_of_block(goes, &sum);
            gone += sum;
            if (!goes) continue;
            // No place is overwritten that is still to be read: all of this round were.
            places[at] = place;
            if (atomicAdd(&room.small[place / HPCSYNC_SPARSE_SMALL], 1u) == 255u)
                atomicOr(&state->full, 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) room.found[tile] = room.before[tile] = gone;
    }
}

// One thread block. *used: bytes of the coded piece.
KERNEL sparse_plan(uint64_t n, uint32_t *scratch, uint8_t *out, uint64_t *used) {
    State *state = room_of(scratch, n).state;
    if (threadIdx.x) return;
    int kind = hpcsync_sparse_kind(n, state->count, false);
    if (kind == HPCSYNC_SPARSE_BYTES && state->full)
        kind = hpcsync_sparse_kind(n, state->count, true);
    uint64_t entries = kind == HPCSYNC_SPARSE_DENSE ? n : state->count;
    uint64_t bytes = hpcsync_sparse_index_bytes(kind, n, entries) + 2 * entries;
    if (state->bad) kind = HPCSYNC_SPARSE_POISON, entries = 0, bytes = 0;
    state->kind = (uint32_t)kind;
    store_any<uint32_t>(out, (uint32_t)kind);
    store_any<uint32_t>(out + 4, (uint32_t)entries);
    *used = HPCSYNC_SPARSE_HEADER + bytes;
}

namespace {

struct Writer {
    const float *values;
    float *velocity, *error;
    uint8_t *codes;
};

DEVICE void write_value(const Writer &writer, uint64_t place, uint64_t entry) {
    const float exact = writer.values[place];
    const uint16_t code = hpcsync_sparse_value(exact);
    store_any<uint16_t>(writer.codes + 2 * entry, code);
    if (writer.error) writer.error[place] = exact - hpcsync_from_bf16(code);
    if (writer.velocity) writer.velocity[place] = 0.0f;
}

// The tile's bits; one thread block.
DEVICE void write_bitmap(const uint32_t *places, uint32_t count, uint64_t tile, uint64_t n,
                         uint8_t *body) {
    __shared__ uint32_t bits[TILE / 32];
    for (uint32_t i = threadIdx.x; i < TILE / 32; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x)
        atomicOr(&bits[places[i] % TILE / 32], 1u << (places[i] % 32));
    __syncthreads();
    for (uint32_t byte = threadIdx.x; byte < TILE / 8; byte += blockDim.x)
        if (tile * (TILE / 8) + byte < (n + 7) / 8)
            body[tile * (TILE / 8) + byte] = (uint8_t)(bits[byte / 4] >> (byte % 4 * 8));
    __syncthreads();
}

}  // namespace

KERNEL sparse_write(const float *values, float *velocity, float *error, uint64_t n,
                    uint32_t *scratch, uint8_t *out) {
    const Room room = room_of(scratch, n);
    const int kind = (int)room.state->kind;
    if (kind == HPCSYNC_SPARSE_POISON) return;
    const uint64_t tiles = tiles_of(n), entries = room.state->count;
    const uint64_t small = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL);
    const uint64_t large = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE);
    uint8_t *body = out + HPCSYNC_SPARSE_HEADER;
    const Writer writer = {values, velocity, error,
                           body + hpcsync_sparse_index_bytes(kind, n, entries)};
    if (kind == HPCSYNC_SPARSE_DENSE) {
        for (uint64_t i = thread_of(); i < n; i += threads_in_all()) write_value(writer, i, i);
        return;
    }
    for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t *places = room.places + room.start[tile];
        const uint64_t before = room.before[tile];
        if (kind == HPCSYNC_SPARSE_BITMAP) write_bitmap(places, room.found[tile], tile, n, body);
        for (uint32_t i = threadIdx.x; i < room.found[tile]; i += blockDim.x) {
            const uint32_t place = places[i];
            if (kind == HPCSYNC_SPARSE_BYTES)
                body[small + before + i] = (uint8_t)place;
            else if (kind == HPCSYNC_SPARSE_WORDS)
                store_any<uint16_t>(body + 4 * large + 2 * (before + i), (uint16_t)place);
            write_value(writer, place, before + i);
        }
        const uint64_t block = tile * SMALL_BLOCKS + threadIdx.x;
        if (kind == HPCSYNC_SPARSE_BYTES && threadIdx.x < SMALL_BLOCKS && block < small)
            body[block] = (uint8_t)room.small[block];
        if (kind == HPCSYNC_SPARSE_WORDS && threadIdx.x == 0 && tile % LARGE_TILES == 0) {
            const uint64_t next = tile + LARGE_TILES;
            const uint64_t after = next < tiles ? room.before[next] : entries;
            store_any<uint32_t>(body + 4 * (tile / LARGE_TILES), (uint32_t)(after - before));
        }
    }
}

KERNEL sparse_accumulate(const float *x, float divisor, float momentum, float *velocity,
                         float *error, uint64_t n, uint32_t *flag) {
    const Sums sums = {x, divisor_of(divisor), momentum, velocity, error};
    bool bad = false;
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        Values<float> made;
        add_row(sums, start, count_of(n, start, ROW), made.at, &bad);
    }
    tell(bad, flag);
}

KERNEL sparse_momentum(float *x, float momentum, float *velocity, uint64_t n, uint32_t *flag) {
    bool bad = false;
    for (uint64_t start = warp_of() * ROW; start < n; start += warps_in_all() * ROW) {
        const uint32_t count = count_of(n, start, ROW);
        Values<float> made, held;
        load_row(x + start, count, made.at);
        load_row(velocity + start, count, held.at);
        for (int j = 0; j < ROW_VALUES; ++j) {
            made.at[j] = momentum * held.at[j] + made.at[j];
            keep_finite(made.at[j], &held.at[j], &bad);
        }
        store_row(x + start, count, made.at);
        store_row(velocity + start, count, held.at);
    }
    tell(bad, flag);
}
