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

#ifdef __cplusplus
}
#endif
#endif
