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
 *   - `stochastic`, where a function takes it: 0 rounds to nearest even; else at random, without
 *     bias, by a counter-based generator of `seed` and the element's index.
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

/* ---- sums: buffers of several ranks ------------------------------------------------------------
 *
 * Each of `outs` becomes (sources[0] + sources[1] + ...) / divisor, added from left to right. An
 * output may be one of the sources; apart from that no two arrays overlap. There is at least one
 * source. Outputs of 4 MiB and more that are no sources are written past the caches.
 */
HPCSYNC_API void hpcsync_add_f32(float *const *outs, size_t n_outs, const float *const *sources,
                                 size_t n_sources, size_t n, float divisor);

/* The same of bfloat16 and of float16, by their bits: widened to float, added and divided there,
 * and rounded once, to nearest even. NaN becomes the quiet NaN of its sign. */
HPCSYNC_API void hpcsync_add_bf16(uint16_t *const *outs, size_t n_outs,
                                  const uint16_t *const *sources, size_t n_sources, size_t n,
                                  float divisor);
HPCSYNC_API void hpcsync_add_f16(uint16_t *const *outs, size_t n_outs,
                                 const uint16_t *const *sources, size_t n_sources, size_t n,
                                 float divisor);

/* ---- floats and integers: one code an element ---------------------------------------------------
 *
 *   bf16   upper half of a float; 2 bytes an element
 *   fp16   IEEE half precision; 2 bytes an element; what is too large becomes Inf
 *   fp8    e4m3fn, 1 byte an element, and a scale a block: its largest magnitude / 448
 *   int8   -127..127, 1 byte an element, and a scale a block: its largest magnitude / 127
 *
 * Blocks have 256 elements, the last one what is left. Coded layout: the blocks' scales as float,
 * if there are any, then the codes, without padding; NAME_bytes says how many bytes. Each codec has
 *
 *   encode      codes x + error (x alone where error is NULL); error, where it is not NULL, becomes
 *               what was lost: (x + error) - decoded
 *   decode      writes n elements to out
 *   decode_add  adds n elements to out
 *   combine     the owner's part of a sum: own, the n_others coded arrays before and behind it in
 *               rank order (`place` of them come before), added from left to right, divided, then
 *               coded as by encode; own becomes what `out` decodes to. `out` is none of `others`.
 *
 * stochastic: not 0 rounds at random by `seed` and the element's index, without bias; 0 to nearest,
 * ties to even.
 * A block with a NaN or Inf has a scale of NaN, codes of 0, and leaves its part of error as it was;
 * of bf16 and fp16 the same goes for the one element, which stays NaN or Inf. Blocks whose largest
 * magnitude is below about 1e-36 are coded as zeros; error keeps all of them.
 */
HPCSYNC_API size_t hpcsync_bf16_bytes(size_t n);
HPCSYNC_API void hpcsync_bf16_encode(const float *x, float *error, size_t n, int stochastic,
                                     uint64_t seed, uint8_t *out);
HPCSYNC_API void hpcsync_bf16_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_bf16_decode_add(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_bf16_combine(float *own, size_t place, const uint8_t *const *others,
                                      size_t n_others, size_t n, float divisor, float *error,
                                      int stochastic, uint64_t seed, uint8_t *out);

HPCSYNC_API size_t hpcsync_fp16_bytes(size_t n);
HPCSYNC_API void hpcsync_fp16_encode(const float *x, float *error, size_t n, int stochastic,
                                     uint64_t seed, uint8_t *out);
HPCSYNC_API void hpcsync_fp16_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_fp16_decode_add(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_fp16_combine(float *own, size_t place, const uint8_t *const *others,
                                      size_t n_others, size_t n, float divisor, float *error,
                                      int stochastic, uint64_t seed, uint8_t *out);

HPCSYNC_API size_t hpcsync_fp8_bytes(size_t n);
HPCSYNC_API void hpcsync_fp8_encode(const float *x, float *error, size_t n, int stochastic,
                                    uint64_t seed, uint8_t *out);
HPCSYNC_API void hpcsync_fp8_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_fp8_decode_add(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_fp8_combine(float *own, size_t place, const uint8_t *const *others,
                                     size_t n_others, size_t n, float divisor, float *error,
                                     int stochastic, uint64_t seed, uint8_t *out);

HPCSYNC_API size_t hpcsync_int8_bytes(size_t n);
HPCSYNC_API void hpcsync_int8_encode(const float *x, float *error, size_t n, int stochastic,
                                     uint64_t seed, uint8_t *out);
HPCSYNC_API void hpcsync_int8_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_int8_decode_add(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_int8_combine(float *own, size_t place, const uint8_t *const *others,
                                      size_t n_others, size_t n, float divisor, float *error,
                                      int stochastic, uint64_t seed, uint8_t *out);

/* ---- integers of shared scales ------------------------------------------------------------------
 *
 * Integers that ranks add: the ranks agree on each block's largest magnitude first. maxima[b] is
 * that of block b of 256 elements, as the bits of a float: nonnegative, in the order of the floats,
 * Inf and NaN above all others; ranks take the maximum as integers. The scale is maximum / levels.
 */

/* The largest magnitudes of x + error (x alone where error is NULL). */
HPCSYNC_API void hpcsync_shared_maxima(const float *x, const float *error, size_t n,
                                       int32_t *maxima);

/* Numbers from -levels to levels (1..127) for x + error; error, where it is not NULL, becomes what
 * was lost. Blocks with a NaN or Inf among their maxima are zeros, and leave error as it was. The
 * result is the sum of all numbers modulo 2^32. One function for each width of integers. */
HPCSYNC_API uint32_t hpcsync_shared_encode_i8(const float *x, float *error, size_t n,
                                              const int32_t *maxima, int32_t levels,
                                              int stochastic, uint64_t seed, int8_t *out);
HPCSYNC_API uint32_t hpcsync_shared_encode_i16(const float *x, float *error, size_t n,
                                               const int32_t *maxima, int32_t levels,
                                               int stochastic, uint64_t seed, int16_t *out);
HPCSYNC_API uint32_t hpcsync_shared_encode_i32(const float *x, float *error, size_t n,
                                               const int32_t *maxima, int32_t levels,
                                               int stochastic, uint64_t seed, int32_t *out);

/* Numbers, added over ranks, times the scale, then divided. The result is the sum of all numbers
 * modulo 2^32: that of the ranks' results of encode, or a number was changed on its way. */
HPCSYNC_API uint32_t hpcsync_shared_decode_i8(const int8_t *in, size_t n,
                                              const int32_t *maxima, int32_t levels,
                                              float divisor, float *out);
HPCSYNC_API uint32_t hpcsync_shared_decode_i16(const int16_t *in, size_t n,
                                               const int32_t *maxima, int32_t levels,
                                               float divisor, float *out);
HPCSYNC_API uint32_t hpcsync_shared_decode_i32(const int32_t *in, size_t n,
                                               const int32_t *maxima, int32_t levels,
                                               float divisor, float *out);

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

/* ---- sparse: the elements of largest magnitude --------------------------------------------------
 *
 * Coded: a header of two uint32, kind and number of entries; indices; then a bfloat16 (nearest even,
 * finite values stay finite) for each entry, in the order of the indices. Kinds:
 *
 *   0 poison   nothing follows: every element is NaN
 *   1 bytes    a count (uint8) for each block of 256 elements, an index in its block (uint8) for
 *              each entry; not where a block has 256 entries
 *   2 words    the same with blocks of 65536, counts of uint32, indices of uint16
 *   3 bitmap   a bit an element, the lowest of a byte first; (n + 7) / 8 bytes
 *   4 dense    no indices: every element is an entry
 *
 * The kind is the one of fewest bytes, the lower of equals. 0 elements are 0 bytes; n < 2^32.
 *
 * Which elements go: the k largest of the magnitudes not below `minimum`, never zeros. Of those that
 * equal the least of them, evenly spread ones go; the seed decides which: see hpcsync_ties_begin in
 * hpcsync_block_sparse.h.
 */

/* Most bytes of a coded piece with at most `most` entries. */
HPCSYNC_API uint64_t hpcsync_sparse_bytes(size_t n, size_t most);

/* How many uint32 of scratch hpcsync_sparse_encode needs; their contents do not matter. */
HPCSYNC_API size_t hpcsync_sparse_scratch(size_t n, size_t k, float minimum);

/* Code a piece; the result is the bytes used. Adds into the stores, which may be NULL:
 *
 *   velocity = momentum * velocity + x / divisor
 *   error    = error + velocity             (error + x / divisor without velocity)
 *
 * and codes the error store, or x itself where error is NULL (then divisor must be 1). Of entries,
 * velocity becomes 0, and error what rounding lost. Where a sum is NaN or Inf, the stores keep their
 * elements, and the piece is coded as poison. */
HPCSYNC_API size_t hpcsync_sparse_encode(const float *x, float divisor, float momentum,
                                         float *velocity, float *error, size_t n, size_t k,
                                         float minimum, uint64_t seed, uint32_t *scratch,
                                         uint8_t *out);

/* Decode n elements; or add the entries to what `out` holds. */
HPCSYNC_API void hpcsync_sparse_decode(const uint8_t *in, size_t n, float *out);
HPCSYNC_API void hpcsync_sparse_decode_add(const uint8_t *in, size_t n, float *out);

/* Zero a field of n elements where a coded piece has entries; poison has none. */
HPCSYNC_API void hpcsync_sparse_clear(const uint8_t *in, size_t n, float *field);

/* The stores' sums of hpcsync_sparse_encode alone; 1 if one is NaN or Inf, else 0. */
HPCSYNC_API int hpcsync_sparse_accumulate(const float *x, float divisor, float momentum,
                                          float *velocity, float *error, size_t n);

/* x = momentum * velocity + x, and velocity the same where it is finite; 1 if it is not, else 0. */
HPCSYNC_API int hpcsync_sparse_momentum(float *x, float momentum, float *velocity, size_t n);

/* Random-k: `groups` different groups of 16 elements, by the seed alone (hpcsync_group_at in
 * hpcsync_block_sparse.h). take copies them to out, 16 * groups floats, zeros beyond the end of x;
 * with `clear` it zeroes them in x. put writes in / divisor * scale to their elements of out, and
 * zero to all others; groups is at least 1 unless n is 0. */
HPCSYNC_API void hpcsync_groups_take(float *x, size_t n, size_t groups, uint64_t seed, int clear,
                                     float *out);
HPCSYNC_API void hpcsync_groups_put(const float *in, size_t n, size_t groups, uint64_t seed,
                                    float divisor, float scale, float *out);

#ifdef __cplusplus
}
#endif
#endif
