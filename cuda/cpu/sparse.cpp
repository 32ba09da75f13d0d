// Top-k and threshold: the elements of largest magnitude, and what is left of the others.
//
//     sample -> a low threshold  -> one pass: accumulate, note what reaches it (the candidates)
//            -> the exact cut among the candidates -> indices and values
//
// The sample decides only how many candidates there are: should they be too few or too many, the
// cut is looked for among all elements. So what goes does not depend on the sample.
#include "sparse.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace HPCSYNC_ISA {

namespace {

constexpr size_t BLOCK = 1024;          // elements accumulated at once: 4 KiB, in the first cache
constexpr size_t LARGEST_SAMPLE = 8192;
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

// ---- entries ------------------------------------------------------------------------------

// Elements in order: those listed, or (without places) all.
struct Elements {
    const uint32_t *places;
    const float *values;
    size_t count;
};

// Calls use(place, value) for each that goes.
template <class Use>
void each(const Elements &elements, const Cut &cut, uint64_t seed, Use use) {
    hpcsync_ties ties = hpcsync_ties_begin(seed, cut.wanted, cut.equal);
    for (size_t j = 0; j < elements.count; ++j) {
        uint32_t size = hpcsync_abs_bits(elements.values[j]);
        if (size < cut.size) continue;
        if (size == cut.size && !hpcsync_ties_next(&ties)) continue;
        use(elements.places ? elements.places[j] : (uint32_t)j, elements.values[j]);
    }
}

// Lists those that go; the lists may be the elements' own.
size_t keep(const Elements &elements, const Cut &cut, uint64_t seed, uint32_t *places,
            float *values) {
    hpcsync_ties ties = hpcsync_ties_begin(seed, cut.wanted, cut.equal);
    size_t kept = 0;
    for (size_t j = 0; j < elements.count; ++j) {
        uint32_t size = hpcsync_abs_bits(elements.values[j]);
        bool goes = size > cut.size;
        if (size == cut.size) goes = hpcsync_ties_next(&ties);
        places[kept] = elements.places ? elements.places[j] : (uint32_t)j;
        values[kept] = elements.values[j];
        kept += goes;  // no jump that half of the candidates would mispredict
    }
    return kept;
}

// Whether some block of 256 elements has 256 entries; the entries of each block go to `counts`.
bool count_blocks(const Elements &elements, const Cut &cut, uint64_t seed, size_t n,
                  uint8_t *counts) {
    bool full = false;
    memset(counts, 0, hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL));
    each(elements, cut, seed, [&](uint32_t place, float) {
        full |= ++counts[place / HPCSYNC_SPARSE_SMALL] == 0;
    });
    return full;
}

struct Writer {
    uint8_t *indices, *values;
    float *error;

    void value(uint32_t place, float exact) {
        uint16_t code = hpcsync_sparse_value(exact);
        memcpy(values, &code, 2);
        values += 2;
        if (error) error[place] = exact - hpcsync_from_bf16(code);
    }
};

size_t write_header(uint8_t *out, uint32_t kind, uint32_t entries) {
    memcpy(out, &kind, 4);
    memcpy(out + 4, &entries, 4);
    return HPCSYNC_SPARSE_HEADER;
}

size_t write(const Elements &elements, const Cut &cut, uint64_t seed, const float *all, size_t n,
             float *error, uint8_t *out) {
    uint8_t *body = out + HPCSYNC_SPARSE_HEADER;
    int kind = hpcsync_sparse_kind(n, cut.count, false);
    if (kind == HPCSYNC_SPARSE_BYTES && count_blocks(elements, cut, seed, n, body))
        kind = hpcsync_sparse_kind(n, cut.count, true);
    size_t entries = kind == HPCSYNC_SPARSE_DENSE ? n : cut.count;
    uint64_t index_bytes = hpcsync_sparse_index_bytes(kind, n, entries);
    Writer writer = {body, body + index_bytes, error};
    write_header(out, (uint32_t)kind, (uint32_t)entries);
    if (kind == HPCSYNC_SPARSE_BYTES) {
        writer.indices += hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL);
        each(elements, cut, seed, [&](uint32_t place, float value) {
            *writer.indices++ = (uint8_t)place;
            writer.value(place, value);
        });
    } else if (kind == HPCSYNC_SPARSE_WORDS) {
        uint64_t blocks = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE);
        memset(body, 0, 4 * blocks);
        writer.indices += 4 * blocks;
        each(elements, cut, seed, [&](uint32_t place, float value) {
            uint8_t *at = body + 4 * (place / HPCSYNC_SPARSE_LARGE);
            uint32_t count;
            memcpy(&count, at, 4);
            memcpy(at, &++count, 4);
            uint16_t index = (uint16_t)place;
            memcpy(writer.indices, &index, 2);
            writer.indices += 2;
            writer.value(place, value);
        });
    } else if (kind == HPCSYNC_SPARSE_BITMAP) {
        memset(body, 0, index_bytes);
        each(elements, cut, seed, [&](uint32_t place, float value) {
            body[place >> 3] |= (uint8_t)(1u << (place & 7));
            writer.value(place, value);
        });
    } else {
        for (size_t i = 0; i < n; ++i) writer.value((uint32_t)i, all[i]);
    }
    return HPCSYNC_SPARSE_HEADER + index_bytes + 2 * entries;
}

// ---- candidates ---------------------------------------------------------------------------

// A threshold that more than k of the sums will probably reach, and few more: by a sample of runs at
// random distances.
uint32_t sample_threshold(const Sums &sums, size_t n, const Plan &plan, uint64_t seed,
                          uint32_t lowest) {
    if (!plan.rank) return lowest;
    float sample[LARGEST_SAMPLE];
    hpcsync_key key = hpcsync_random_key(seed);
    size_t stride = n / (plan.sample / RUN);
    for (size_t j = 0; j < plan.sample / RUN; ++j) {
        uint64_t jitter = (uint64_t)hpcsync_random_at(key, (uint32_t)j + 1) * (stride - RUN + 1) >> 32;
        for (size_t i = 0; i < RUN; ++i) sample[RUN * j + i] = sums.at(j * stride + jitter + i);
    }
    return find_cut(sample, plan.sample, plan.rank, lowest).size;
}

// Notes the elements of all[start, start + count) whose magnitudes are not below the threshold (in
// bits), and returns how many; there is room for `count`.
size_t collect(const float *all, size_t start, size_t count, uint32_t threshold,
               uint32_t *places, float *values) {
    size_t found = 0, i = 0;
    const float *from = all + start;
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF), least = _mm512_set1_epi32((int)threshold);
    for (; i + 64 <= count; i += 64) {
        uint64_t set = 0;
        for (size_t j = 0; j < 4; ++j) {
            __m512i size = _mm512_and_si512(_mm512_loadu_si512(from + i + 16 * j), mask);
            set |= (uint64_t)_mm512_cmpge_epi32_mask(size, least) << 16 * j;
        }
        for (; set; set &= set - 1) {
            size_t at = i + (size_t)__builtin_ctzll(set);
            values[found] = from[at];
            places[found++] = (uint32_t)(start + at);
        }
    }
#elif defined(__AVX2__)
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    const __m256i under = _mm256_set1_epi32((int)threshold - 1);
    for (; i + 8 <= count; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i high = _mm256_cmpgt_epi32(_mm256_and_si256(bits, mask), under);
        uint32_t set = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(high));
        for (; set; set &= set - 1) {
            size_t at = i + (size_t)__builtin_ctz(set);
            values[found] = from[at];
            places[found++] = (uint32_t)(start + at);
        }
    }
#else
    for (; i + 16 <= count; i += 16) {
        uint32_t any = 0;
        for (size_t j = 0; j < 16; ++j)
            any |= (uint32_t)((int32_t)hpcsync_abs_bits(from[i + j]) >= (int32_t)threshold);
        if (!any) continue;
        for (size_t j = i; j < i + 16; ++j) {
            values[found] = from[j];
            places[found] = (uint32_t)(start + j);
            found += hpcsync_abs_bits(from[j]) >= threshold;
        }
    }
#endif
    for (; i < count; ++i) {
        if (hpcsync_abs_bits(from[i]) < threshold) continue;
        values[found] = from[i];
        places[found++] = (uint32_t)(start + i);
    }
    return found;
}

}  // namespace

uint64_t sparse_bytes(size_t n, size_t most) {
    if (n == 0) return 0;
    most = most < n ? most : n;
    int kind = hpcsync_sparse_kind(n, most, true);
    uint64_t entries = kind == HPCSYNC_SPARSE_DENSE ? n : most;
    return HPCSYNC_SPARSE_HEADER + hpcsync_sparse_index_bytes(kind, n, entries) + 2 * entries;
}

size_t sparse_scratch(size_t n, size_t k, float minimum) { return 2 * plan(n, k, minimum).capacity; }

size_t sparse_encode(const float *x, float divisor, float momentum, float *velocity, float *error,
                     size_t n, size_t k, float minimum, uint64_t seed, uint32_t *scratch,
                     uint8_t *out) {
    if (n == 0) return 0;
    Plan how = plan(n, k, minimum);
    Sums sums = {x, divisor, momentum, velocity, error};
    uint32_t lowest = hpcsync_bits(minimum) > 1 ? hpcsync_bits(minimum) : 1;
    uint32_t threshold = sample_threshold(sums, n, how, seed, lowest);
    const float *all = error ? error : x;
    uint32_t *places = scratch;
    float *values = (float *)(scratch + how.capacity);
    size_t found = 0;
    bool fits = true;
    uint32_t bad = 0;
    for (size_t start = 0; start < n; start += BLOCK) {
        size_t count = n - start < BLOCK ? n - start : BLOCK;
        bad |= sums.add(start, count);
        fits = fits && found + count <= how.capacity;
        if (fits) found += collect(all, start, count, threshold, places + found, values + found);
    }
    if (bad) return write_header(out, HPCSYNC_SPARSE_POISON, 0);
    Elements elements = {places, values, found};
    Cut cut = find_cut(values, found, k, lowest);
    if (!fits || (cut.count < k && threshold > lowest)) {
        elements = {nullptr, all, n};
        cut = find_cut(all, n, k, lowest);
    }
    if (cut.count <= how.capacity) {
        size_t kept = keep(elements, cut, seed, places, values);
        elements = {places, values, kept};
        cut = {lowest, 1, 1, kept};
    }
    size_t used = write(elements, cut, seed, all, n, error, out);
    if (velocity) sparse_clear(out, n, velocity);
    return used;
}

}  // namespace HPCSYNC_ISA
