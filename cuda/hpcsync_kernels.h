/* hpcsync_kernels.h: the C ABI of hpcsync's kernels on host memory.
 *
 * Plain C: usable from C, C++, Go, Rust, Python's ctypes. No function allocates, none keeps state
 * besides the instruction set that was chosen, all may be called from several threads at once.
 *
 * Conventions
 *   - `n` counts elements; arrays are flat; float is IEEE-754 binary32; little endian.
 *   - Pointers need only the natural alignment of their element; coded data none at all. Ranges
 *     must not overlap unless a function says that they may.
 *   - Results are the same bits on every instruction set, and those of the NumPy reference: no
 *     fused multiply-add, no flushing of denormals, sums in the order that the function states.
 *   - `error`, where it may be NULL, is the error store: what was lost is written to it, and what
 *     it holds is added before coding.
 *   - `seed` rounds at random, without bias, from a counter-based generator; HPCSYNC_NEAREST
 *     (see each function) rounds to nearest even.
 */
#ifndef HPCSYNC_KERNELS_H
#define HPCSYNC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HPCSYNC_ABI_VERSION 1
#define HPCSYNC_API __attribute__((visibility("default")))

/* Version of this ABI that the library was built with. */
HPCSYNC_API int hpcsync_abi_version(void);

/* The instruction set in use: "avx512", "avx2" or "plain". */
HPCSYNC_API const char *hpcsync_isa(void);

/* Choose an instruction set by name; 0 if the processor has it, else -1 and nothing changes. */
HPCSYNC_API int hpcsync_use_isa(const char *name);

/* ---- factors: low-rank products (PowerSGD) ------------------------------------------------------
 *
 * A matrix m is row-major, rows x columns. Factors are kept as rows: p is rank x rows, q is
 * rank x columns, so that m is approximately the sum over k of p[k, i] * q[k, j]. Every product
 * is rounded to float before it is added.
 */

/* m += error where error is not NULL, then p[k, i] = sum over j of m[i, j] * q[k, j].
 * Sixteen partial sums by j mod 16, each in ascending j, starting at 0; then their tree: lane l
 * adds lane l + 8, then l + 4, l + 2, l + 1. */
HPCSYNC_API void hpcsync_factor_rows(float *m, const float *error, size_t rows, size_t columns,
                                     const float *q, size_t rank, float *p);

/* q[k, j] = sum over i of m[i, j] * p[k, i]: 32 rows at a time, in ascending i, starting at 0;
 * these partial sums in order, starting at 0. */
HPCSYNC_API void hpcsync_factor_columns(const float *m, size_t rows, size_t columns,
                                        const float *p, size_t rank, float *q);

/* error = m - product of p and own, where error is not NULL; then m = product of p and mean.
 * A product is the sum over k of p[k, i] * q[k, j], in ascending k, starting with the first. */
HPCSYNC_API void hpcsync_factor_apply(float *m, float *error, size_t rows, size_t columns,
                                      const float *p, const float *own, const float *mean,
                                      size_t rank);

/* Make the rows of x (rank x n) orthonormal by modified Gram-Schmidt, each projected twice; a row
 * of zeros stays one, NaN or Inf make NaN. Row k: times 1/norm (0 if the norm is 0); then twice:
 * less dot(row j, row k) / dot(row j, row j) times row j for j = 0 .. k-1 (rows of zeros left
 * out), then times 1/(norm + 1e-8). In double, each new row rounded to float; dots over sixteen
 * lanes and their tree as above. */
HPCSYNC_API void hpcsync_orthogonalise(float *x, size_t rank, size_t n);

/* ---- int4: rotated blocks of 256, four bits an element --------------------------------------------
 *
 * Coded: ceil(n / 256) scales (float), then (n + 1) / 2 bytes of nibbles q + 8, q in -8..7. A block
 * of x is coded through h = H x / 256 + e, H the Hadamard matrix in Sylvester's order, and decodes
 * to (H q) * scale, one rounding. A block with a NaN or Inf has the scale NaN and keeps its store.
 * hpcsync_block_int4.h states scale, layout, and how the n % 256 values at the end are rotated.
 *
 * The error store is n int8 and ceil(n / 256) exponents, all 0 at first: e is the int8 times the
 * power of two with that biased exponent. What was lost is rounded into it at random, by `seed`, so
 * that no two calls should have the same. It becomes keep * e + (1 - keep) * lost; keep in [0, 1).
 */

/* Multiply each block of 256 values by H / 16, in place: orthonormal, its own inverse. Values are
 * multiplied by 1/16, then added in pairs at distance 1, 2, 4 up to 128. */
HPCSYNC_API void hpcsync_hadamard_f32(float *values, size_t blocks);

/* Bytes of a coded piece. */
HPCSYNC_API size_t hpcsync_int4_bytes(size_t n);

/* n whole numbers -8..7 to (n + 1) / 2 bytes in the layout of a piece, and back. */
HPCSYNC_API void hpcsync_int4_pack(const int8_t *q, size_t n, uint8_t *out);
HPCSYNC_API void hpcsync_int4_unpack(const uint8_t *in, size_t n, int8_t *q);

/* Code n values. error and exponents: the store, both or none NULL. stochastic: 0 to nearest even,
 * else at random by `seed`; the store is rounded at random in both. */
HPCSYNC_API void hpcsync_int4_encode(const float *x, int8_t *error, uint8_t *exponents, float keep,
                                     size_t n, int stochastic, uint64_t seed, uint8_t *out);

/* Decode n values; or add them to what `out` holds. */
HPCSYNC_API void hpcsync_int4_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_int4_decode_add(const uint8_t *in, size_t n, float *out);

/* An owner's part, block by block: the sum in rank order of the decoded pieces of `n_others` ranks
 * and of `own`, which `place` of them precede; divided by `divisor`, coded to `out` as by
 * hpcsync_int4_encode, and decoded to `own`. */
HPCSYNC_API void hpcsync_int4_combine(float *own, size_t place, const uint8_t *const *others,
                                      size_t n_others, size_t n, float divisor, int8_t *error,
                                      uint8_t *exponents, float keep, int stochastic,
                                      uint64_t seed, uint8_t *out);

/* ---- onebit: signs and the mean magnitude of blocks of 1024 ---------------------------------------
 *
 * Coded: ceil(n / 1024) scales (float), then (n + 7) / 8 bytes, the sign bit of element i in bit
 * i % 8 of byte i / 8. h = x + error decodes to the block's scale with its sign. The scale is the
 * sum of |h| over the count of elements: 16 partial sums by index mod 16, then lane l adds lane
 * l + 8, then l + 4, l + 2, l + 1. A block with a NaN or Inf has the scale NaN, no sign bits, and
 * keeps its errors.
 */

/* Bytes of a coded piece. */
HPCSYNC_API size_t hpcsync_onebit_bytes(size_t n);

/* Code n values; error (n floats, or NULL) is added, and becomes what was lost. */
HPCSYNC_API void hpcsync_onebit_encode(const float *x, float *error, size_t n, uint8_t *out);

/* Decode n values; or add them to what `out` holds. */
HPCSYNC_API void hpcsync_onebit_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_onebit_decode_add(const uint8_t *in, size_t n, float *out);

/* An owner's part, as hpcsync_int4_combine. */
HPCSYNC_API void hpcsync_onebit_combine(float *own, size_t place, const uint8_t *const *others,
                                        size_t n_others, size_t n, float divisor, float *error,
                                        uint8_t *out);

#ifdef __cplusplus
}
#endif
#endif
