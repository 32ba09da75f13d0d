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

#ifdef __cplusplus
}
#endif
#endif
