// Maths of the sparse codecs (top-k, threshold, random-k), of one element each; see
// hpcsync_kernels.h for the coded layout.
#pragma once

#include "hpcsync_block.h"

// ---- coded pieces ----------------------------------------------------------------------------

#define HPCSYNC_SPARSE_HEADER 8u
#define HPCSYNC_SPARSE_SMALL 256u    // elements of a block with one-byte indices
#define HPCSYNC_SPARSE_LARGE 65536u  // elements of a block with two-byte indices

enum {
    HPCSYNC_SPARSE_POISON,  // nothing follows: every element is NaN
    HPCSYNC_SPARSE_BYTES,   // a count (1 byte) a small block, an index (1 byte) an entry
    HPCSYNC_SPARSE_WORDS,   // a count (4 bytes) a large block, an index (2 bytes) an entry
    HPCSYNC_SPARSE_BITMAP,  // a bit an element, the lowest of a byte first
    HPCSYNC_SPARSE_DENSE,   // every element is an entry
};

HPCSYNC_HD uint64_t hpcsync_sparse_blocks(uint64_t n, uint32_t block) {
    return (n + block - 1) / block;
}

// Bytes of what stands between the header and the values.
HPCSYNC_HD uint64_t hpcsync_sparse_index_bytes(int kind, uint64_t n, uint64_t entries) {
    if (kind == HPCSYNC_SPARSE_BYTES)
        return hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL) + entries;
    if (kind == HPCSYNC_SPARSE_WORDS)
        return 4 * hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE) + 2 * entries;
    if (kind == HPCSYNC_SPARSE_BITMAP) return (n + 7) / 8;
    return 0;
}

// The shortest kind; the first of equals. `full`: some small block has 256 entries, which its
// count cannot say.
HPCSYNC_HD int hpcsync_sparse_kind(uint64_t n, uint64_t entries, bool full) {
    int best = full ? HPCSYNC_SPARSE_WORDS : HPCSYNC_SPARSE_BYTES;
    uint64_t least = hpcsync_sparse_index_bytes(best, n, entries);
    for (int kind = best + 1; kind <= HPCSYNC_SPARSE_BITMAP; ++kind) {
        uint64_t bytes = hpcsync_sparse_index_bytes(kind, n, entries);
        if (bytes < least) {
            least = bytes;
            best = kind;
        }
    }
    return least + 2 * entries < 2 * n ? best : HPCSYNC_SPARSE_DENSE;
}

// ---- values ----------------------------------------------------------------------------------

// bfloat16, to nearest even; finite values stay finite.
HPCSYNC_HD uint16_t hpcsync_sparse_value(float value) {
    uint32_t bits = hpcsync_bits(value), size = bits & 0x7FFFFFFFu;
    size += 0x7FFFu + ((size >> 16) & 1u);
    size = size < HPCSYNC_INF_BITS ? size : 0x7F7FFFFFu;
    return (uint16_t)(((bits & 0x80000000u) | size) >> 16);
}

// ---- which elements go -----------------------------------------------------------------------

// The k largest magnitudes are those above a cut, and some of those that equal it. Of `equal`
// ones, `wanted` go, evenly spread, from a place on that the seed decides: the j-th goes if
// ((j + start) wanted) mod equal < wanted.
struct hpcsync_ties {
    uint32_t state, wanted, equal;
};

HPCSYNC_HD hpcsync_ties hpcsync_ties_begin(uint64_t seed, uint32_t wanted, uint32_t equal) {
    uint64_t start = ((uint64_t)hpcsync_random(seed, 0) * equal) >> 32;
    hpcsync_ties ties = {equal ? (uint32_t)(start * wanted % equal) : 0u, wanted, equal};
    return ties;
}

// Whether the next one goes.
HPCSYNC_HD bool hpcsync_ties_next(hpcsync_ties *ties) {
    bool goes = ties->state < ties->wanted;
    uint32_t left = ties->equal - ties->wanted;
    ties->state = ties->state < left ? ties->state + ties->wanted : ties->state - left;
    return goes;
}

// Whether the j-th one goes, for code that does not see them in order.
HPCSYNC_HD bool hpcsync_ties_at(uint64_t seed, uint64_t j, uint32_t wanted, uint32_t equal) {
    uint64_t start = ((uint64_t)hpcsync_random(seed, 0) * equal) >> 32;
    return (j + start) % equal * wanted % equal < wanted;
}

// ---- random-k --------------------------------------------------------------------------------

#define HPCSYNC_GROUP 16u  // elements that go together: a cache line

// The j-th of `wanted` different groups of `groups`, all equally likely: one of each of `wanted`
// runs of nearly equal length, at random; the runs' beginning is random, too. Indices 0..wanted-1
// of the generator choose within the runs, index `wanted` the beginning.
HPCSYNC_HD uint32_t hpcsync_group_at(hpcsync_key key, uint32_t j, uint32_t groups, uint32_t wanted) {
    uint32_t low = (uint32_t)((uint64_t)j * groups / wanted);
    uint32_t high = (uint32_t)((uint64_t)(j + 1) * groups / wanted);
    uint64_t within = ((uint64_t)hpcsync_random_at(key, j) * (high - low)) >> 32;
    uint64_t begin = ((uint64_t)hpcsync_random_at(key, wanted) * groups) >> 32;
    return (uint32_t)((low + within + begin) % groups);
}
