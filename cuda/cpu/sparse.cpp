// Top-k and threshold: the elements of largest magnitude as indices and values, and what is left of
// the others in the store.
#include "candidates.h"

namespace HPCSYNC_ISA {

namespace {

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

// Lists those that go, and perhaps one more behind them; the lists may be the elements' own.
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
        fits = fits && found + count + SPARE <= how.capacity;
        if (fits) found += collect(all, start, count, threshold, places + found, values + found);
    }
    if (bad) return write_header(out, HPCSYNC_SPARSE_POISON, 0);
    Elements elements = {places, values, found};
    Cut cut = find_cut(values, found, k, lowest);
    if (!fits || (cut.count < k && threshold > lowest)) {
        elements = {nullptr, all, n};
        cut = find_cut(all, n, k, lowest);
    }
    if (cut.count < how.capacity) {
        size_t kept = keep(elements, cut, seed, places, values);
        elements = {places, values, kept};
        cut = {lowest, 1, 1, kept};
    }
    size_t used = write(elements, cut, seed, all, n, error, out);
    if (velocity) sparse_clear(out, n, velocity);
    return used;
}

}  // namespace HPCSYNC_ISA
