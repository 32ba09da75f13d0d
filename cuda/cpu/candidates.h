// The search for the elements of largest magnitude.
//
//     sample -> a low threshold  -> one pass: accumulate, note what reaches it (the candidates)
//            -> the exact cut among the candidates
//
// The sample decides only how many candidates there are: should they be too few or too many, the
// cut is looked for among all elements. So what goes does not depend on the sample.
#pragma once

#include "sparse.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace HPCSYNC_ISA {

namespace {

constexpr size_t BLOCK = 1024;          // elements accumulated at once: 4 KiB, in the first cache
constexpr size_t LARGEST_SAMPLE = 8192;
constexpr size_t SPARE = 2;             // that may be noted behind the last candidate
constexpr size_t RUN = 8;               // neighbours sampled together: a cache miss costs the most

// How the candidates are found: `rank` is the place in the sample, from the largest on, of the
// element that serves as their threshold; 0: all that may go at all are candidates.
struct Plan {
    size_t sample, rank, capacity;
};

size_t square_root(size_t n) {
    size_t root = 0;
    while ((root + 1) * (root + 1) <= n) ++root;
    return root;
}

// The rank leaves four standard deviations to the expected place of the k-th of n.
Plan plan(size_t n, size_t k, float minimum) {
    Plan made = {n < 64 * LARGEST_SAMPLE ? n / (64 * RUN) * RUN : LARGEST_SAMPLE, 0, 0};
    if (minimum > 0.0f || k >= n) {
        made.capacity = (n < BLOCK ? n : n / 8) + BLOCK;
        return made;
    }
    size_t expected = made.sample * k / n + 1;
    made.rank = expected + 4 * (square_root(expected) + 1);
    if (made.sample < 64 || made.rank >= made.sample / 2) made.rank = 0;
    made.capacity = made.rank ? made.rank * n / made.sample * 3 / 2 + k / 8 : n;
    made.capacity = (made.capacity < n ? made.capacity : n) + BLOCK;
    return made;
}

// ---- the threshold of the candidates ------------------------------------------------------

struct Cut {
    uint32_t size;           // magnitudes above it go
    uint32_t wanted, equal;  // of those that equal it, so many of so many go
    size_t count;            // that go in all
};

// How many magnitudes are not below `size` (in bits).
size_t count_from(const float *values, size_t n, uint32_t size) {
    size_t total = 0;
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t stop = n - start < BLOCK ? n : start + BLOCK;
        int32_t found = 0;
        for (size_t i = start; i < stop; ++i)
            found += (int32_t)hpcsync_abs_bits(values[i]) >= (int32_t)size;
        total += (size_t)found;
    }
    return total;
}

uint32_t largest(const float *values, size_t n) {
    int32_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        int32_t size = (int32_t)hpcsync_abs_bits(values[i]);
        most = size > most ? size : most;
    }
    return (uint32_t)most;
}

// The exact cut for the k largest of those not below `lowest` (in bits): counts, which vectors do
// fast, halve the range until the count is right, or nothing but equal magnitudes is left.
Cut find_cut(const float *values, size_t n, size_t k, uint32_t lowest) {
    size_t total = count_from(values, n, lowest);
    if (total <= k) return {lowest, 1, 1, total};
    uint32_t low = lowest, high = largest(values, n) + 1;
    size_t from_low = total, from_high = 0;  // more than k, fewer than k
    uint32_t next = high - 1;                // first of all whether the largest are equal
    while (high - low > 1) {
        size_t count = count_from(values, n, next);
        if (count == k) return {next, 1, 1, k};
        (count > k ? low : high) = next;
        (count > k ? from_low : from_high) = count;
        next = low + (high - low) / 2;
    }
    return {low, (uint32_t)(k - from_high), (uint32_t)(from_low - from_high), k};
}

// A threshold that more than k of the sums will probably reach, and few more: by a sample of runs at
// random distances.
uint32_t sample_threshold(const Sums &sums, size_t n, const Plan &plan, uint64_t seed,
                          uint32_t lowest) {
    if (!plan.rank) return lowest;
    float sample[LARGEST_SAMPLE];
    size_t places[LARGEST_SAMPLE / RUN], runs = plan.sample / RUN, stride = n / runs;
    hpcsync_key key = hpcsync_random_key(seed);
    for (size_t j = 0; j < runs; ++j) {
        uint64_t random = hpcsync_random_at(key, (uint32_t)j + 1);
        places[j] = j * stride + (size_t)(random * (stride - RUN + 1) >> 32);
        sums.prefetch(places[j]);
    }
    for (size_t j = 0; j < plan.sample; ++j) sample[j] = sums.at(places[j / RUN] + j % RUN);
    return find_cut(sample, plan.sample, plan.rank, lowest).size;
}

// A bit for each of 64 elements whose magnitude is not below the threshold (in bits).
uint64_t reaching(const float *values, uint32_t threshold) {
    uint64_t set = 0;
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF), least = _mm512_set1_epi32((int)threshold);
    for (int j = 0; j < 4; ++j) {
        __m512i size = _mm512_and_si512(_mm512_loadu_si512(values + 16 * j), mask);
        set |= (uint64_t)_mm512_cmpge_epi32_mask(size, least) << 16 * j;
    }
#elif defined(__AVX2__)
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i under = _mm256_set1_epi32((int)threshold - 1);
    for (int j = 0; j < 8; ++j) {
        __m256i size = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)values + j), mask);
        __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(size, under));
        set |= (uint64_t)(uint32_t)_mm256_movemask_ps(high) << 8 * j;
    }
#elif defined(__SSE2__)
    const __m128i mask = _mm_set1_epi32(0x7FFFFFFF), under = _mm_set1_epi32((int)threshold - 1);
    for (int j = 0; j < 16; ++j) {
        __m128i size = _mm_and_si128(_mm_loadu_si128((const __m128i *)values + j), mask);
        __m128 high = _mm_castsi128_ps(_mm_cmpgt_epi32(size, under));
        set |= (uint64_t)(uint32_t)_mm_movemask_ps(high) << 4 * j;
    }
#else
    for (int j = 0; j < 64; ++j)
        set |= (uint64_t)(hpcsync_abs_bits(values[j]) >= threshold) << j;
#endif
    return set;
}

// Notes the elements of all[start, start + count) whose magnitudes are not below the threshold (in
// bits), and returns how many; there is room for `count` and SPARE more.
size_t collect(const float *all, size_t start, size_t count, uint32_t threshold, uint32_t *places,
               float *values) {
    size_t found = 0, i = 0;
    for (; i + 64 <= count; i += 64) {
        uint64_t set = reaching(all + start + i, threshold);
        size_t last = found + (size_t)__builtin_popcountll(set);
        // SPARE + 1 are noted whether there are so many or not: more are rare, and a loop that ends
        // after none, one or two would be mispredicted nearly each time.
        do {
            for (size_t j = 0; j <= SPARE; ++j, set &= set - 1) {
                size_t at = start + i + (size_t)__builtin_ctzll(set | 1ull << 63);
                places[found + j] = (uint32_t)at;
                values[found + j] = all[at];
            }
            found += SPARE + 1;
        } while (set);
        found = last;
    }
    for (; i < count; ++i) {
        if (hpcsync_abs_bits(all[start + i]) < threshold) continue;
        values[found] = all[start + i];
        places[found++] = (uint32_t)(start + i);
    }
    return found;
}

}  // namespace

}  // namespace HPCSYNC_ISA
