// Sparse pieces back to elements, and random-k's groups.
#include "sparse.h"

namespace HPCSYNC_ISA {

namespace {

float value_at(const uint8_t *values, size_t entry) {
    uint16_t code;
    memcpy(&code, values + 2 * entry, 2);
    return hpcsync_from_bf16(code);
}

// Calls use(place, value) for each entry of a coded piece; false if the piece is poison.
template <class Use>
bool each_entry(const uint8_t *in, size_t n, Use use) {
    uint32_t kind, entries;
    memcpy(&kind, in, 4);
    memcpy(&entries, in + 4, 4);
    if (kind == HPCSYNC_SPARSE_POISON) return false;
    const uint8_t *body = in + HPCSYNC_SPARSE_HEADER;
    const uint8_t *values = body + hpcsync_sparse_index_bytes((int)kind, n, entries);
    size_t entry = 0;
    if (kind == HPCSYNC_SPARSE_BYTES) {
        size_t blocks = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_SMALL);
        const uint8_t *indices = body + blocks;
        for (size_t block = 0; block < blocks; ++block)
            for (size_t last = entry + body[block]; entry < last; ++entry)
                use(block * HPCSYNC_SPARSE_SMALL + indices[entry], value_at(values, entry));
    } else if (kind == HPCSYNC_SPARSE_WORDS) {
        size_t blocks = hpcsync_sparse_blocks(n, HPCSYNC_SPARSE_LARGE);
        const uint8_t *indices = body + 4 * blocks;
        for (size_t block = 0; block < blocks; ++block) {
            uint32_t count;
            memcpy(&count, body + 4 * block, 4);
            for (size_t last = entry + count; entry < last; ++entry) {
                uint16_t index;
                memcpy(&index, indices + 2 * entry, 2);
                use(block * HPCSYNC_SPARSE_LARGE + index, value_at(values, entry));
            }
        }
    } else if (kind == HPCSYNC_SPARSE_BITMAP) {
        for (size_t byte = 0; byte < (n + 7) / 8; ++byte)
            for (uint32_t set = body[byte]; set; set &= set - 1)
                use(byte * 8 + (size_t)__builtin_ctz(set), value_at(values, entry++));
    } else {
        for (size_t i = 0; i < n; ++i) use(i, value_at(values, i));
    }
    return true;
}

void poison(size_t n, float *out) {
    for (size_t i = 0; i < n; ++i) out[i] = hpcsync_float(HPCSYNC_NAN_BITS);
}

// Calls use(slot, first element, elements) for each group that goes.
template <class Use>
void each_group(size_t n, size_t wanted, uint64_t seed, Use use) {
    hpcsync_key key = hpcsync_random_key(seed);
    uint32_t groups = (uint32_t)hpcsync_sparse_blocks(n, HPCSYNC_GROUP);
    for (uint32_t j = 0; j < wanted; ++j) {
        size_t start = (size_t)hpcsync_group_at(key, j, groups, (uint32_t)wanted) * HPCSYNC_GROUP;
        use((size_t)j * HPCSYNC_GROUP, start, n - start < HPCSYNC_GROUP ? n - start : HPCSYNC_GROUP);
    }
}

}  // namespace

void sparse_decode(const uint8_t *in, size_t n, float *out) {
    if (n == 0) return;
    memset(out, 0, n * sizeof(float));
    if (!each_entry(in, n, [=](size_t place, float value) { out[place] = value; })) poison(n, out);
}

void sparse_decode_add(const uint8_t *in, size_t n, float *out) {
    if (n == 0) return;
    if (!each_entry(in, n, [=](size_t place, float value) { out[place] += value; })) poison(n, out);
}

void sparse_clear(const uint8_t *in, size_t n, float *field) {
    if (n) each_entry(in, n, [=](size_t place, float) { field[place] = 0.0f; });
}

int sparse_accumulate(const float *x, float divisor, float momentum, float *velocity, float *error,
                      size_t n) {
    Sums sums = {x, divisor, momentum, velocity, error};
    uint32_t bad = 0;
    for (size_t start = 0; start < n; start += 1024)
        bad |= sums.add(start, n - start < 1024 ? n - start : 1024);
    return bad != 0;
}

int sparse_momentum(float *x, float momentum, float *velocity, size_t n) {
    Sums sums = {x, 1.0f, momentum, nullptr, nullptr};
    return sums.speed(x, n, velocity, x) != 0;
}

void groups_take(float *x, size_t n, size_t groups, uint64_t seed, int clear, float *out) {
    each_group(n, groups, seed, [=](size_t slot, size_t start, size_t count) {
        memset(out + slot, 0, HPCSYNC_GROUP * sizeof(float));
        memcpy(out + slot, x + start, count * sizeof(float));
        if (clear) memset(x + start, 0, count * sizeof(float));
    });
}

void groups_put(const float *in, size_t n, size_t groups, uint64_t seed, float divisor, float scale,
                float *out) {
    bool product = hpcsync_is_power_of_two(divisor);
    float inverse = 1.0f / divisor;
    if (n) memset(out, 0, n * sizeof(float));
    each_group(n, groups, seed, [=](size_t slot, size_t start, size_t count) {
        for (size_t i = 0; i < count; ++i) {
            float value = in[slot + i];
            out[start + i] = (product ? value * inverse : value / divisor) * scale;
        }
    });
}

}  // namespace HPCSYNC_ISA
