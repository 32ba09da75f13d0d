// int4: whole blocks in registers; the end of a piece by hpcsync_block_int4.h, value by value.
#include "rotation.h"
#include "kernel.h"

namespace HPCSYNC_ISA {
namespace {

constexpr size_t BLOCK = HPCSYNC_INT4_BLOCK;

INLINE Vector splat(float value) { return Vector{} + value; }

INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
INLINE Vector lesser(Vector a, Vector b) { return a < b ? a : b; }

// The largest and least of a register. No NaN matters: it is then in all lanes, or Inf is.
INLINE void extremes(Vector most, Vector least, float *out) {
    if constexpr (LANES > 8) most = larger(most, partner<8>(most)), least = lesser(least, partner<8>(least));
    if constexpr (LANES > 4) most = larger(most, partner<4>(most)), least = lesser(least, partner<4>(least));
    most = larger(most, partner<2>(most)), least = lesser(least, partner<2>(least));
    most = larger(most, partner<1>(most)), least = lesser(least, partner<1>(least));
    out[0] = most[0];
    out[1] = least[0];
}

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

// hpcsync_int4_dither for the four rows of quarter `quarter` of the block, from coefficient `first`.
INLINE void dithers(hpcsync_key key, uint32_t first, uint32_t quarter, Vector *out) {
    UNROLL for (size_t p = 0; p < PARTS; ++p) {
        const Words w = random_words(key, (first >> 2) + 16 * quarter + LANES * p);
        const Words mask = Words{} + 0xFFFFu, base = Words{} + 0x43000000u;
        out[0 * PARTS + p] = (Vector)((w & mask) | base);
        out[1 * PARTS + p] = (Vector)(((w >> 5) & mask) | base);
        out[2 * PARTS + p] = (Vector)(((w >> 11) & mask) | base);
        out[3 * PARTS + p] = (Vector)((w >> 16) | base);
    }
}

// a * b + c where a * b is exact.
INLINE Vector exact_product_plus(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// Where a sum of a small number and this has that number, rounded, in its lower bits.
constexpr float MAGIC = 12582912.0f + HPCSYNC_INT4_ZERO;

// Coefficients to whole numbers plus MAGIC.
template <bool STOCHASTIC>
INLINE Vector quantised(Vector h, Vector inverse, hpcsync_key key, uint32_t first) {
    Vector y = h * inverse;
    if constexpr (STOCHASTIC) {
        const Ints units = (Ints)(random_words(key, first) >> 8);
        y = y + as_floats(units) * 5.9604644775390625e-8f;
        const Vector near = (y + MAGIC) - MAGIC;
        y = near > y ? near - 1.0f : near;
    }
    return lesser(y + MAGIC, splat(MAGIC + 7.0f));
}

// LoCo's average of what was lost (overwritten) with what the store holds, and the largest of it.
INLINE float average(float *lost, const int8_t *error, float unit, float keep) {
    Vector most = {};
    for (size_t i = 0; i < REGISTERS; ++i) {
        const Vector old = load_chars(error + i * LANES) * unit;
        const Vector made = keep * old + (1.0f - keep) * load(lost + i * LANES);
        store(lost + i * LANES, made);
        most = larger(most, (Vector)((Words)made & 0x7FFFFFFFu));
    }
    float found[2];
    extremes(most, most, found);
    return found[0];
}

// Errors of a block (register i from `lost`) into the store.
INLINE void keep_errors(const float *lost, float bound, hpcsync_key key, uint32_t first,
                        int8_t *error, uint8_t *exponent) {
    const uint32_t made = hpcsync_int4_exponent(bound);
    const Vector per_unit = splat(hpcsync_int4_per_unit(made));
    *exponent = (uint8_t)made;
    for (uint32_t quarter = 0; quarter < 4; ++quarter) {
        Vector dither[4 * PARTS];
        Ints kept[4 * PARTS];
        dithers(key, first, quarter, dither);
        UNROLL for (size_t i = 0; i < 4 * PARTS; ++i)
            kept[i] = truncated(exact_product_plus(load(lost + 64 * quarter + i * LANES), per_unit, dither[i]));
        UNROLL for (size_t i = 0; i < 4 * PARTS; i += 4)
            store_chars(error + 64 * quarter + i * LANES, kept + i);
    }
}

struct Job {
    int8_t *error;  // of the piece's first block; NULL for none
    uint8_t *exponents;
    float keep;
    hpcsync_key key, store_key;
};

// Codes block b from x; its scale and payload to `scale` and `out`.
template <bool STOCHASTIC, bool FEEDBACK>
INLINE void encode_block(const float *x, const Job &job, size_t b, uint8_t *scale, uint8_t *out) {
    const uint32_t first = (uint32_t)(b * BLOCK);
    int8_t *error = job.error + (FEEDBACK ? b * BLOCK : 0);
    uint8_t *exponent = job.exponents + (FEEDBACK ? b : 0);
    Vector h[REGISTERS];
    butterfly(x, 0.00390625f, h);
    const float unit = FEEDBACK ? hpcsync_int4_unit(*exponent) : 0.0f;
    Vector most = splat(0.0f), least = splat(0.0f);
    UNROLL for (size_t i = 0; i < REGISTERS; ++i) {
        if constexpr (FEEDBACK)
            h[i] = exact_product_plus(load_chars(error + i * LANES), splat(unit), h[i]);
        most = i ? larger(most, h[i]) : h[i];
        least = i ? lesser(least, h[i]) : h[i];
    }
    float found[2];
    extremes(most, least, found);
    const hpcsync_scale made = hpcsync_int4_scale(found[0], found[1], STOCHASTIC);
    std::memcpy(scale, &made.scale, 4);
    if (!hpcsync_finite(made.scale)) {
        std::memset(out, HPCSYNC_INT4_ZERO * 17, BLOCK / 2);
        return;
    }
    const Vector inverse = splat(made.inverse), step = splat(-made.scale);
    float lost[FEEDBACK ? BLOCK : LANES] __attribute__((aligned(64)));
    UNROLL for (size_t half = 0; half < 2; ++half)
        UNROLL for (size_t p = 0; p < PARTS; ++p) {
            Ints words = {};
            UNROLL for (size_t t = 0; t < 8; ++t) {
                const size_t i = (8 * half + t) * PARTS + p;
                const Vector q = quantised<STOCHASTIC>(h[i], inverse, job.key, first + i * LANES);
                words |= ((Ints)q & 15) << (4 * t);
                if constexpr (FEEDBACK) store(lost + i * LANES, exact_product_plus(q - MAGIC, step, h[i]));
            }
            store_words(out + 64 * half + VECTOR_BYTES * p, words);
        }
    if constexpr (FEEDBACK) {
        const float bound = job.keep == 0.0f ? made.scale : average(lost, error, unit, job.keep);
        keep_errors(lost, bound, job.store_key, first, error, exponent);
    }
}

INLINE float load_scale(const uint8_t *from) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
}

template <bool ADD>
INLINE void decode_block(const uint8_t *packed, float scale, float *out) {
    Ints v[REGISTERS];
    integer_butterfly(packed, v);
    UNROLL for (size_t i = 0; i < REGISTERS; ++i) {
        const Vector value = as_floats(v[i]) * scale;
        store(out + i * LANES, ADD ? load(out + i * LANES) + value : value);
    }
}

size_t blocks_of(size_t n) { return (n + BLOCK - 1) / BLOCK; }

template <bool ADD>
void decode_piece(const uint8_t *in, size_t n, float *out) {
    const size_t whole = n / BLOCK;
    const uint8_t *packed = in + 4 * blocks_of(n);
    for (size_t b = 0; b < whole; ++b)
        decode_block<ADD>(packed + b * (BLOCK / 2), load_scale(in + 4 * b), out + b * BLOCK);
    if (n % BLOCK)
        hpcsync_int4_decode_end(packed + whole * (BLOCK / 2), load_scale(in + 4 * whole),
                                (uint32_t)(n % BLOCK), ADD, out + whole * BLOCK);
}

void encode_end(const float *x, const Job &job, size_t n, bool stochastic, uint8_t *out) {
    const size_t whole = n / BLOCK, first = whole * BLOCK;
    const float scale = hpcsync_int4_encode_end(
        x, job.error ? job.error + first : nullptr, job.error ? job.exponents + whole : nullptr,
        job.keep, (uint32_t)(n % BLOCK), stochastic, job.key, job.store_key, (uint32_t)first,
        out + 4 * blocks_of(n) + first / 2);
    std::memcpy(out + 4 * whole, &scale, 4);
}

template <bool STOCHASTIC, bool FEEDBACK>
void encode_piece(const float *x, const Job &job, size_t n, uint8_t *out) {
    const size_t whole = n / BLOCK;
    uint8_t *packed = out + 4 * blocks_of(n);
    for (size_t b = 0; b < whole; ++b)
        encode_block<STOCHASTIC, FEEDBACK>(x + b * BLOCK, job, b, out + 4 * b, packed + b * (BLOCK / 2));
    if (n % BLOCK) encode_end(x + whole * BLOCK, job, n, STOCHASTIC, out);
}

// The sum over ranks of the n values of block b, divided, in `total`.
INLINE void sum_block(const float *own, size_t place, const uint8_t *const *others,
                      size_t n_others, size_t piece, size_t b, size_t n, float divisor,
                      float *total) {
    for (size_t rank = 0; rank <= n_others; ++rank) {
        if (rank == place) {
            for (size_t i = 0; i < n; ++i) total[i] = rank ? total[i] + own[i] : own[i];
            continue;
        }
        const uint8_t *in = others[rank - (rank > place)];
        const uint8_t *packed = in + 4 * blocks_of(piece) + b * (BLOCK / 2);
        const float scale = load_scale(in + 4 * b);
        if (n < BLOCK) hpcsync_int4_decode_end(packed, scale, (uint32_t)n, rank != 0, total);
        else if (rank) decode_block<true>(packed, scale, total);
        else decode_block<false>(packed, scale, total);
    }
    if (hpcsync_is_power_of_two(divisor)) {
        const float inverse = 1.0f / divisor;
        for (size_t i = 0; i < n; ++i) total[i] *= inverse;
    } else {
        for (size_t i = 0; i < n; ++i) total[i] /= divisor;
    }
}

template <bool STOCHASTIC, bool FEEDBACK>
void combine_piece(float *own, size_t place, const uint8_t *const *others, size_t n_others,
                   size_t n, float divisor, const Job &job, uint8_t *out) {
    const size_t whole = n / BLOCK;
    uint8_t *packed = out + 4 * blocks_of(n);
    float total[BLOCK] __attribute__((aligned(64)));
    for (size_t b = 0; b < whole; ++b) {
        sum_block(own + b * BLOCK, place, others, n_others, n, b, BLOCK, divisor, total);
        uint8_t *coded = packed + b * (BLOCK / 2);
        encode_block<STOCHASTIC, FEEDBACK>(total, job, b, out + 4 * b, coded);
        decode_block<false>(coded, load_scale(out + 4 * b), own + b * BLOCK);
    }
    if (n % BLOCK) {
        sum_block(own + whole * BLOCK, place, others, n_others, n, whole, n % BLOCK, divisor, total);
        encode_end(total, job, n, STOCHASTIC, out);
        hpcsync_int4_decode_end(packed + whole * (BLOCK / 2), load_scale(out + 4 * whole),
                                (uint32_t)(n % BLOCK), false, own + whole * BLOCK);
    }
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
    const Job job = job_of(error, exponents, keep, seed);
    if (stochastic)
        (error ? encode_piece<true, true> : encode_piece<true, false>)(x, job, n, out);
    else
        (error ? encode_piece<false, true> : encode_piece<false, false>)(x, job, n, out);
}

void int4_decode(const uint8_t *in, size_t n, float *out) { decode_piece<false>(in, n, out); }

void int4_decode_add(const uint8_t *in, size_t n, float *out) { decode_piece<true>(in, n, out); }

void int4_combine(float *own, size_t place, const uint8_t *const *others, size_t n_others, size_t n,
                  float divisor, int8_t *error, uint8_t *exponents, float keep, int stochastic,
                  uint64_t seed, uint8_t *out) {
    const Job job = job_of(error, exponents, keep, seed);
    auto *combine = stochastic ? (error ? combine_piece<true, true> : combine_piece<true, false>)
                               : (error ? combine_piece<false, true> : combine_piece<false, false>);
    combine(own, place, others, n_others, n, divisor, job, out);
}

}  // namespace HPCSYNC_ISA
