// int4: whole blocks in registers; the end of a piece by hpcsync_block_int4.h, value by value.
#include "kernel.h"
#include "rotation.h"

namespace HPCSYNC_ISA {
namespace {

constexpr size_t BLOCK = HPCSYNC_INT4_BLOCK;

// Blocks that are asked for before they are needed: processors' own prefetching stops while a block
// is worked on.
constexpr size_t AHEAD = 6;

// Values from which decoding to aligned memory goes past the caches: 4 MiB.
constexpr size_t STREAMED = size_t(1) << 20;

INLINE Vector splat(float value) { return Vector{} + value; }

INLINE Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

INLINE Vector lesser(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// hpcsync_int4_extreme over the registers that are put in.
struct Extreme {
#if defined(__AVX512F__)
    // The instruction for it: larger magnitude, the sign with it, plus where magnitudes are equal.
    Vector most;
    INLINE explicit Extreme(Vector first) : most(first) {}
    INLINE void put(const Extreme &other) {
        most = (Vector)_mm512_maskz_range_ps(0xFFFF, (__m512)most, (__m512)other.most, 0x7);
    }
#else
    Vector most, least;
    INLINE explicit Extreme(Vector first) : most(first), least(first) {}
    INLINE void put(const Extreme &other) {
        most = larger(most, other.most);
        least = lesser(least, other.least);
    }
#endif
    template <int STEP>
    INLINE void fold() {
        Extreme other = *this;
        other.most = partner<STEP>(most);
#if !defined(__AVX512F__)
        other.least = partner<STEP>(least);
#endif
        put(other);
    }
    INLINE float found() {
        if constexpr (LANES > 8) fold<8>();
        if constexpr (LANES > 4) fold<4>();
        fold<2>();
        fold<1>();
#if defined(__AVX512F__)
        return most[0];
#else
        return hpcsync_int4_extreme(most[0], least[0]);
#endif
    }
};

INLINE Words random_words(hpcsync_key key, uint32_t first) {
    Words x;
    UNROLL for (size_t l = 0; l < LANES; ++l) x[l] = l;
    x = (x + first) ^ key.first;
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x += key.second;
    x ^= x >> 15;
    x *= 0x735A2D97u;
    x ^= x >> 15;
    return x;
}

// hpcsync_int4_dither of a block's row 0, from the block's first coefficient on.
INLINE void first_dithers(hpcsync_key key, uint32_t first, Words *out) {
    UNROLL for (size_t p = 0; p < PARTS; ++p)
        out[p] = (random_words(key, (first >> 4) + LANES * p) & 0xFFFFu) | 0x43000000u;
}

// That of the next row: the lower 16 bits alone are added.
INLINE Words next_dither(Words dither) {
    const Words more = Words{} + 0x9E37u;
    return (Words)((Shorts)dither + (Shorts)more);
}

// a * b + c where a * b is exact.
INLINE Vector exact_product_plus(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// A sum of a small number and this is rounded to a whole one.
constexpr float MAGIC = 12582912.0f;

// Coefficients to whole numbers.
template <bool STOCHASTIC>
INLINE Vector quantised(Vector h, Vector inverse, hpcsync_key key, uint32_t first) {
    Vector y = h * inverse;
    if constexpr (STOCHASTIC) {
        const Ints units = (Ints)(random_words(key, first) >> 8);
        y = y + as_floats(units) * 5.9604644775390625e-8f;
        const Vector near = (y + MAGIC) - MAGIC;
        return lesser(near > y ? near - 1.0f : near, splat(7.0f));
    }
    return lesser((y + MAGIC) - MAGIC, splat(7.0f));
}

struct Job {
    int8_t *error;  // of the piece's first block; NULL for none
    uint8_t *exponents;
    float keep;
    hpcsync_key key, store_key;
};

// x, the values of block b, to coefficients h; returns their extreme.
template <bool FEEDBACK>
BODY float rotate_block(const float *x, const Job &job, size_t b, float *h) {
    Vector v[REGISTERS];
    butterfly(x, 0.00390625f, v);
    if constexpr (FEEDBACK) {
        const Vector unit = splat(hpcsync_int4_unit(job.exponents[b]));
        const int8_t *error = job.error + b * BLOCK;
        UNROLL for (size_t i = 0; i < REGISTERS; ++i)
            v[i] = exact_product_plus(load_chars(error + i * LANES), unit, v[i]);
    }
    UNROLL for (size_t i = 0; i < REGISTERS; ++i) store(h + i * LANES, v[i]);
    Extreme found[4] = {Extreme(v[0]), Extreme(v[1]), Extreme(v[2]), Extreme(v[3])};
    UNROLL for (size_t i = 4; i < REGISTERS; ++i) found[i % 4].put(Extreme(v[i]));
    found[0].put(found[1]);
    found[2].put(found[3]);
    found[0].put(found[2]);
    return found[0].found();
}

// Errors of a block, row by row, on their way into the store: whole numbers 0..255.
struct Keeper {
    Vector per_unit;
    Words dither[PARTS];

    INLINE Keeper() {}
    INLINE Keeper(float bound, const Job &job, size_t b) {
        const uint32_t exponent = hpcsync_int4_exponent(bound);
        job.exponents[b] = (uint8_t)exponent;
        per_unit = splat(hpcsync_int4_per_unit(exponent));
        first_dithers(job.store_key, (uint32_t)(b * BLOCK), dither);
    }
    INLINE Ints next(Vector lost, size_t part) {
        const Words here = dither[part];
        dither[part] = next_dither(here);
        return truncated(exact_product_plus(lost, per_unit, (Vector)here));
    }
};

INLINE void keep_rows(int8_t *error, const Ints *kept) {
    UNROLL for (size_t i = 0; i < 4 * PARTS; i += 4) store_chars(error + i * LANES, kept + i);
}

enum class Lost { DROPPED, KEPT, WRITTEN };

// Coefficients h of block b to its bytes. What is lost goes to the store, or where WRITTEN to h.
// `soon` is 256 values that will be needed: asked for one line after the other, as all at once
// would stop the stores.
template <bool STOCHASTIC, Lost LOST>
BODY void quantise_block(float *h, hpcsync_scale made, const Job &job, size_t b,
                           const float *soon, uint8_t *out) {
    const Vector inverse = splat(made.inverse), step = splat(-made.scale);
    const uint32_t first = (uint32_t)(b * BLOCK);
    Keeper keeper = LOST == Lost::KEPT ? Keeper(made.scale, job, b) : Keeper();
    UNROLL for (size_t half = 0; half < 2; ++half) {
        // Four nibbles' numbers in a float, all exact: below 2^16.
        Vector sums[2][PARTS] = {};
        UNROLL for (size_t four = 0; four < 2; ++four) {
            Ints kept[4 * PARTS];
            UNROLL for (size_t i = 0; i < 4 * PARTS; ++i) {
                const size_t at = (8 * half + 4 * four) * 16 + i * LANES, t = i / PARTS;
                if (i % PARTS == 0) __builtin_prefetch(soon + at);
                const Vector v = load(h + at);
                const Vector q = quantised<STOCHASTIC>(v, inverse, job.key, first + (uint32_t)at);
                const Vector weight = splat((float)(1u << (4 * t)));
                Vector &sum = sums[four][i % PARTS];
                sum = t ? exact_product_plus(q, weight, sum) : q;
                if constexpr (LOST == Lost::DROPPED) continue;
                const Vector lost = exact_product_plus(q, step, v);
                if constexpr (LOST == Lost::KEPT) kept[i] = keeper.next(lost, i % PARTS);
                else store(h + at, lost);
            }
            if constexpr (LOST == Lost::KEPT) {
                int8_t *error = job.error + first + 64 * (2 * half + four);
                __builtin_prefetch(error + AHEAD * BLOCK, 1);
                keep_rows(error, kept);
            }
        }
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            // 8 is added to each nibble.
            const Ints low = truncated(sums[0][p]), high = truncated(sums[1][p]) << 16;
            store_words(out + 64 * half + VECTOR_BYTES * p, low + high + (int32_t)0x88888888);
        }
    }
}

// LoCo's average of what was lost (overwritten) with what the store holds, and the largest of it.
INLINE float average(float *lost, const Job &job, size_t b) {
    const Vector unit = splat(hpcsync_int4_unit(job.exponents[b]));
    Extreme most(splat(0.0f));
    for (size_t i = 0; i < REGISTERS; ++i) {
        const Vector old = load_chars(job.error + b * BLOCK + i * LANES) * unit;
        const Vector made = job.keep * old + (1.0f - job.keep) * load(lost + i * LANES);
        store(lost + i * LANES, made);
        most.put(Extreme(made));
    }
    return most.found();
}

// What block b lost, averaged with what its store holds, to the store.
BODY void keep_average(float *lost, const Job &job, size_t b) {
    const float bound = average(lost, job, b);
    Keeper keeper(bound, job, b);
    for (size_t four = 0; four < 4; ++four) {
        Ints kept[4 * PARTS];
        UNROLL for (size_t i = 0; i < 4 * PARTS; ++i)
            kept[i] = keeper.next(load(lost + 64 * four + i * LANES), i % PARTS);
        keep_rows(job.error + b * BLOCK + 64 * four, kept);
    }
}

INLINE float load_scale(const uint8_t *from) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
}

enum class Out { SET, ADDED, STREAMED };

template <Out OUT>
BODY void decode_block(const uint8_t *packed, float scale, float *out) {
    Ints v[REGISTERS];
    integer_butterfly(packed, v);
    UNROLL for (size_t i = 0; i < REGISTERS; ++i) {
        const Vector value = as_floats(v[i]) * scale;
        float *to = out + i * LANES;
        if constexpr (OUT == Out::STREAMED) stream(to, value);
        else store(to, OUT == Out::ADDED ? load(to) + value : value);
    }
}

template <Out OUT>
APART void decode_apart(const uint8_t *packed, float scale, float *out) {
    decode_block<OUT>(packed, scale, out);
}

size_t blocks_of(size_t n) { return (n + BLOCK - 1) / BLOCK; }

template <Out OUT>
void decode_piece(const uint8_t *in, size_t n, float *out) {
    const size_t whole = n / BLOCK;
    const uint8_t *packed = in + 4 * blocks_of(n);
    for (size_t b = 0; b < whole; ++b)
        decode_block<OUT>(packed + b * (BLOCK / 2), load_scale(in + 4 * b), out + b * BLOCK);
    if (OUT == Out::STREAMED) stream_end();
    if (n % BLOCK)
        hpcsync_int4_decode_end(packed + whole * (BLOCK / 2), load_scale(in + 4 * whole),
                                (uint32_t)(n % BLOCK), OUT == Out::ADDED, out + whole * BLOCK);
}

void encode_end(const float *x, const Job &job, size_t n, bool stochastic, uint8_t *out) {
    const size_t whole = n / BLOCK, first = whole * BLOCK;
    const float scale = hpcsync_int4_encode_end(
        x, job.error ? job.error + first : nullptr, job.error ? job.exponents + whole : nullptr,
        job.keep, (uint32_t)(n % BLOCK), stochastic, job.key, job.store_key, (uint32_t)first,
        out + 4 * blocks_of(n) + first / 2);
    std::memcpy(out + 4 * whole, &scale, 4);
}

// What an owner codes: the mean of its own values and the other ranks' coded ones.
struct Mean {
    float *own;
    size_t place;
    const uint8_t *const *others;
    size_t n_others, piece;
    float divisor;

    // Of the n values of block b, in `total`.
    APART void make(size_t b, size_t n, float *total) const {
        const float *mine = own + b * BLOCK;
        for (size_t rank = 0; rank <= n_others; ++rank) {
            if (rank == place) {
                for (size_t i = 0; i < n; ++i) total[i] = rank ? total[i] + mine[i] : mine[i];
                continue;
            }
            const uint8_t *in = others[rank - (rank > place)];
            const uint8_t *packed = in + 4 * blocks_of(piece) + b * (BLOCK / 2);
            const float scale = load_scale(in + 4 * b);
            if (n < BLOCK) hpcsync_int4_decode_end(packed, scale, (uint32_t)n, rank != 0, total);
            else if (rank) decode_apart<Out::ADDED>(packed, scale, total);
            else decode_apart<Out::SET>(packed, scale, total);
        }
        if (hpcsync_is_power_of_two(divisor)) {
            const float inverse = 1.0f / divisor;
            for (size_t i = 0; i < n; ++i) total[i] *= inverse;
        } else {
            for (size_t i = 0; i < n; ++i) total[i] /= divisor;
        }
    }
};

// Codes a piece's n values x; or, given `mean`, that, which it is then decoded into. A block is
// rotated before the block before it is done: its scale is made while that one is quantised.
template <bool STOCHASTIC, bool FEEDBACK>
void encode_piece(const float *x, const Mean *mean, const Job &job, size_t n, uint8_t *scales) {
    const size_t count = n / BLOCK;
    uint8_t *payload = scales + 4 * blocks_of(n);
    float h[2][BLOCK] __attribute__((aligned(64)));
    float total[BLOCK] __attribute__((aligned(64)));
    hpcsync_scale made[2];
    for (size_t next = 0; next <= count; ++next) {
        if (next < count) {
            if (mean) mean->make(next, BLOCK, total);
            const float *from = mean ? total : x + next * BLOCK;
            const float extreme = rotate_block<FEEDBACK>(from, job, next, h[next % 2]);
            made[next % 2] = hpcsync_int4_scale(extreme, STOCHASTIC);
        }
        if (next == 0) continue;
        const size_t b = next - 1;
        const hpcsync_scale scale = made[b % 2];
        float *lost = h[b % 2];
        const float *soon = x + (b + AHEAD) * BLOCK;
        uint8_t *out = payload + b * (BLOCK / 2);
        std::memcpy(scales + 4 * b, &scale.scale, 4);
        if (hpcsync_finite(scale.scale)) {
            if constexpr (!FEEDBACK) {
                quantise_block<STOCHASTIC, Lost::DROPPED>(lost, scale, job, b, soon, out);
            } else if (job.keep == 0.0f) {
                quantise_block<STOCHASTIC, Lost::KEPT>(lost, scale, job, b, soon, out);
            } else {
                quantise_block<STOCHASTIC, Lost::WRITTEN>(lost, scale, job, b, soon, out);
                keep_average(lost, job, b);
            }
        } else {
            std::memset(out, HPCSYNC_INT4_ZERO * 17, BLOCK / 2);
        }
        if (mean) decode_apart<Out::SET>(out, load_scale(scales + 4 * b), mean->own + b * BLOCK);
    }
    if (n % BLOCK == 0) return;
    if (mean) mean->make(count, n % BLOCK, total);
    encode_end(mean ? total : x + count * BLOCK, job, n, STOCHASTIC, scales);
    if (mean)
        hpcsync_int4_decode_end(payload + count * (BLOCK / 2), load_scale(scales + 4 * count),
                                (uint32_t)(n % BLOCK), false, mean->own + count * BLOCK);
}

// The piece's encoder, by what is asked for.
void encode(const float *x, const Mean *mean, const Job &job, size_t n, bool stochastic,
            uint8_t *out) {
    if (stochastic)
        (job.error ? encode_piece<true, true> : encode_piece<true, false>)(x, mean, job, n, out);
    else
        (job.error ? encode_piece<false, true> : encode_piece<false, false>)(x, mean, job, n, out);
}

Job job_of(int8_t *error, uint8_t *exponents, float keep, uint64_t seed) {
    return {error, exponents, keep, hpcsync_random_key(seed), hpcsync_int4_store_key(seed)};
}

}  // namespace

void hadamard_f32(float *values, size_t blocks) {
    for (size_t b = 0; b < blocks; ++b, values += BLOCK) {
        Vector v[REGISTERS];
        butterfly(values, 0.0625f, v);
        UNROLL for (size_t i = 0; i < REGISTERS; ++i) store(values + i * LANES, v[i]);
    }
}

size_t int4_bytes(size_t n) { return 4 * blocks_of(n) + (n + 1) / 2; }

void int4_pack(const int8_t *q, size_t n, uint8_t *out) {
    const size_t whole = n - n % BLOCK;
    for (size_t b = 0; b < whole; b += BLOCK)
        UNROLL for (size_t half = 0; half < 2; ++half)
            UNROLL for (size_t p = 0; p < PARTS; ++p) {
                Ints words = {};
                UNROLL for (size_t t = 0; t < 8; ++t) {
                    const int8_t *from = q + b + 16 * (8 * half + t) + LANES * p;
                    const Ints v = truncated(load_chars(from)) + HPCSYNC_INT4_ZERO;
                    words |= (v & 15) << (4 * t);
                }
                store_words(out + b / 2 + 64 * half + VECTOR_BYTES * p, words);
            }
    int32_t end[BLOCK];
    for (size_t i = whole; i < n; ++i) end[i - whole] = q[i];
    hpcsync_int4_pack_end(end, (uint32_t)(n - whole), out + whole / 2);
}

void int4_unpack(const uint8_t *in, size_t n, int8_t *q) {
    const size_t whole = n - n % BLOCK;
    for (size_t b = 0; b < whole; b += BLOCK)
        UNROLL for (size_t half = 0; half < 2; ++half)
            UNROLL for (size_t t = 0; t < 8; t += 4 / PARTS > 0 ? 4 / PARTS : 1) {
                // Four registers at a time, whichever rows they are of.
                Ints v[4];
                UNROLL for (size_t i = 0; i < 4; ++i) {
                    const size_t row = t + i / PARTS, p = i % PARTS;
                    const Ints words = load_words(in + b / 2 + 64 * half + VECTOR_BYTES * p);
                    v[i] = ((words >> (4 * row)) & 15) + (128 - HPCSYNC_INT4_ZERO);
                }
                store_chars(q + b + 16 * (8 * half + t), v);
            }
    int32_t end[BLOCK];
    hpcsync_int4_unpack_end(in + whole / 2, (uint32_t)(n - whole), end);
    for (size_t i = whole; i < n; ++i) q[i] = (int8_t)end[i - whole];
}

void int4_encode(const float *x, int8_t *error, uint8_t *exponents, float keep, size_t n,
                 int stochastic, uint64_t seed, uint8_t *out) {
    encode(x, nullptr, job_of(error, exponents, keep, seed), n, stochastic, out);
}

void int4_decode(const uint8_t *in, size_t n, float *out) {
    const bool aligned = (uintptr_t)out % VECTOR_BYTES == 0;
    (aligned && n >= STREAMED ? decode_piece<Out::STREAMED> : decode_piece<Out::SET>)(in, n, out);
}

void int4_decode_add(const uint8_t *in, size_t n, float *out) {
    decode_piece<Out::ADDED>(in, n, out);
}

void int4_combine(float *own, size_t place, const uint8_t *const *others, size_t n_others, size_t n,
                  float divisor, int8_t *error, uint8_t *exponents, float keep, int stochastic,
                  uint64_t seed, uint8_t *out) {
    const Mean mean = {own, place, others, n_others, n, divisor};
    encode(own, &mean, job_of(error, exponents, keep, seed), n, stochastic, out);
}

}  // namespace HPCSYNC_ISA
