// Low-rank factors of matrices (PowerSGD), with the sums of hpcsync_kernels.h in their order.
#include "gpu.h"

namespace {

constexpr uint32_t SUMS = 16;        // partial sums of a dot product, one a lane of half a warp
constexpr uint32_t BLOCK_ROWS = 32;  // rows that are added before they are added to the total
constexpr int FACTORS = 4;           // factors at once, of the registers that a thread has
constexpr uint32_t STRIP = 4;        // rows that share what is loaded of a factor

// What was found of a matrix, a word each, 0 at first: see factor_bounds and factor_check.
constexpr int SPOILT = 0;  // the mean of its Q is not finite
constexpr int LARGE = 1;   // its own Q is so large that the error could overflow
constexpr int LOST = 2;    // the error would not be finite

// The tree over the sixteen lanes of half a warp; in every lane, since a + b is b + a.
template <typename Number>
DEVICE Number tree(Number sum) {
    for (int distance = SUMS / 2; distance; distance >>= 1)
        sum = sum + __shfl_xor_sync(ALL_LANES, sum, distance);
    return sum;
}

// row += error, then its dots with K factors, to p[k, i]. Half a warp a row; all lanes take part, those past the
// last row with nothing.
template <int K>
DEVICE void dot_rows(float *row, const float *error, bool there, uint32_t columns, const float *q,
                     float *p, uint64_t rows) {
    float sums[K] = {};
    for (uint32_t j = lane_of() % SUMS; there && j < columns; j += SUMS) {
        float x = row[j];
        if (error) {
            x += error[j];
            row[j] = x;
        }
        for (int k = 0; k < K; ++k) sums[k] += x * q[(uint64_t)k * columns + j];
    }
    for (int k = 0; k < K; ++k) {
        const float sum = tree(sums[k]);
        if (there && lane_of() % SUMS == 0) p[k * rows] = sum;
    }
}

struct Dots {
    double product, square;
};

// x times y, and y times y, in all threads of the block.
DEVICE Dots dots(const float *x, const float *y, uint64_t n) {
    __shared__ double found[2];
    if (threadIdx.x < 32) {
        const float *left = lane_of() < SUMS ? x : y;
        double sum = 0;
        for (uint64_t i = lane_of() % SUMS; i < n; i += SUMS)
            sum += (double)left[i] * (double)y[i];
        sum = tree(sum);
        if (lane_of() % SUMS == 0) found[lane_of() / SUMS] = sum;
    }
    __syncthreads();
    const Dots made = {found[0], found[1]};
    __syncthreads();
    return made;
}

DEVICE void scale(float *x, double factor, uint64_t n) {
    for (uint64_t i = threadIdx.x; i < n; i += blockDim.x) x[i] = (float)((double)x[i] * factor);
    __syncthreads();
}

// x less its projection on y.
DEVICE void project_out(float *x, const float *y, uint64_t n) {
    const Dots found = dots(x, y, n);
    if (found.square == 0) return;
    const double factor = found.product / found.square;
    for (uint64_t i = threadIdx.x; i < n; i += blockDim.x)
        x[i] = (float)((double)x[i] - factor * (double)y[i]);
    __syncthreads();
}

// The sums over k of p[k, i] * q[k, j] for `count` rows from i on.
DEVICE void products(const float *p, uint64_t rows, const float *q, uint64_t columns,
                     uint32_t rank, uint32_t count, float (&sums)[STRIP]) {
    for (uint32_t k = 0; k < rank; ++k) {
        const float x = q[k * columns];
        for (uint32_t a = 0; a < STRIP; ++a) {
            const float product = a < count ? x * p[k * rows + a] : 0.0f;
            sums[a] = k ? sums[a] + product : product;
        }
    }
}

}  // namespace

KERNEL factor_rows(float *m, const float *error, uint64_t rows, uint32_t columns, const float *q,
                   uint32_t rank, float *p) {
    // Both halves of a warp stay in the loop as long as one of them has a row.
    for (uint64_t pair = warp_of(); 2 * pair < rows; pair += warps_in_all()) {
        const uint64_t i = 2 * pair + lane_of() / SUMS;
        const bool there = i < rows;
        float *row = m + i * columns;
        const float *held = error && there ? error + i * columns : nullptr;
        uint32_t k = 0;
        for (; k + FACTORS <= rank; k += FACTORS, held = nullptr)
            dot_rows<FACTORS>(row, held, there, columns, q + (uint64_t)k * columns,
                              p + k * rows + i, rows);
        for (; k < rank; ++k, held = nullptr)
            dot_rows<1>(row, held, there, columns, q + (uint64_t)k * columns, p + k * rows + i,
                        rows);
    }
}

// Sums over each block of 32 rows: partial[block, k, j].
KERNEL factor_partials(const float *m, uint64_t rows, uint32_t columns, const float *p,
                       uint32_t rank, float *partial) {
    const uint64_t groups = (rank + FACTORS - 1) / FACTORS;
    const uint64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (uint64_t at = thread_of(); at < blocks * groups * columns; at += threads_in_all()) {
        const uint64_t j = at % columns, k = at / columns % groups * FACTORS;
        const uint64_t block = at / columns / groups, first = block * BLOCK_ROWS;
        const uint32_t count = count_of(rows, first, BLOCK_ROWS);
        float sums[FACTORS] = {};
        for (uint32_t i = 0; i < count; ++i) {
            const float x = m[(first + i) * columns + j];
            for (int a = 0; a < FACTORS; ++a)
                if (k + a < rank) sums[a] += x * p[(k + a) * rows + first + i];
        }
        for (int a = 0; a < FACTORS; ++a)
            if (k + a < rank) partial[(block * rank + k + a) * columns + j] = sums[a];
    }
}

// The sum of `blocks` arrays of n values, in order.
KERNEL factor_total(const float *partial, uint64_t blocks, uint64_t n, float *q) {
    for (uint64_t at = thread_of(); at < n; at += threads_in_all()) {
        float total = 0.0f;
        for (uint64_t block = 0; block < blocks; ++block) total += partial[block * n + at];
        q[at] = total;
    }
}

// With `found`, which may be NULL: a spoilt matrix becomes NaN; of one that is spoilt or lost the
// error stays as it was.
KERNEL factor_apply(float *m, float *error, uint64_t rows, uint32_t columns, const float *p,
                    const float *own, const float *mean, uint32_t rank, const uint32_t *found) {
    const uint64_t strips = (rows + STRIP - 1) / STRIP;
    const bool spoilt = found && found[SPOILT];
    if (spoilt || (found && found[LOST])) error = nullptr;
    for (uint64_t at = thread_of(); at < strips * columns; at += threads_in_all()) {
        const uint64_t j = at % columns, first = at / columns * STRIP;
        const uint32_t count = count_of(rows, first, STRIP);
        float sums[STRIP];
        if (error) {
            products(p + first, rows, own + j, columns, rank, count, sums);
            for (uint32_t a = 0; a < count; ++a) {
                const uint64_t place = (first + a) * columns + j;
                error[place] = m[place] - sums[a];
            }
        }
        products(p + first, rows, mean + j, columns, rank, count, sums);
        for (uint32_t a = 0; a < count; ++a)
            m[(first + a) * columns + j] = spoilt ? hpcsync_float(HPCSYNC_NAN_BITS) : sums[a];
    }
}

// Finds whether a matrix is spoilt, and whether `rank` times the largest of its own Q, of n
// values, is below `bound`.
KERNEL factor_bounds(const float *own, const float *mean, uint64_t n, uint32_t rank, float bound,
                     uint32_t *found) {
    for (uint64_t i = thread_of(); i < n; i += threads_in_all()) {
        if (!hpcsync_finite(mean[i])) found[SPOILT] = 1;
        if (!((double)fabsf(own[i]) * rank < bound)) found[LARGE] = 1;
    }
}

// Finds whether the error of a large matrix would be finite.
KERNEL factor_check(const float *m, uint64_t rows, uint32_t columns, const float *p,
                    const float *own, uint32_t rank, uint32_t *found) {
    if (!found[LARGE]) return;
    const uint64_t strips = (rows + STRIP - 1) / STRIP;
    for (uint64_t at = thread_of(); at < strips * columns; at += threads_in_all()) {
        const uint64_t j = at % columns, first = at / columns * STRIP;
        const uint32_t count = count_of(rows, first, STRIP);
        float sums[STRIP];
        products(p + first, rows, own + j, columns, rank, count, sums);
        for (uint32_t a = 0; a < count; ++a)
            if (!hpcsync_finite(m[(first + a) * columns + j] - sums[a])) found[LOST] = 1;
    }
}

// out = q, of n values, unless the matrix is spoilt.
KERNEL factor_keep(const float *q, uint64_t n, const uint32_t *found, float *out) {
    if (found[SPOILT]) return;
    for (uint64_t i = thread_of(); i < n; i += threads_in_all()) out[i] = q[i];
}

// Rows of zeros become those of `fresh`; a thread block a row.
KERNEL factor_renew(float *q, uint32_t rank, uint64_t n, const float *fresh) {
    __shared__ uint32_t used;
    for (uint64_t k = blockIdx.x; k < rank; k += gridDim.x) {
        if (threadIdx.x == 0) used = 0;
        __syncthreads();
        for (uint64_t i = threadIdx.x; i < n; i += blockDim.x)
            if (q[k * n + i] != 0.0f) used = 1;
        __syncthreads();
        for (uint64_t i = threadIdx.x; i < n && !used; i += blockDim.x)
            q[k * n + i] = fresh[k * n + i];
        __syncthreads();
    }
}

// One thread block: each row waits for those before it.
KERNEL orthogonalise(float *x, uint32_t rank, uint64_t n) {
    if (blockIdx.x) return;
    for (uint32_t k = 0; k < rank; ++k) {
        float *own = x + k * n;
        const double norm = sqrt(dots(own, own, n).square);
        scale(own, norm == 0 ? 0 : 1 / norm, n);
        for (int pass = 0; k && pass < 2; ++pass) {
            for (uint32_t j = 0; j < k; ++j) project_out(own, x + j * n, n);
            scale(own, 1 / (sqrt(dots(own, own, n).square) + 1e-8), n);
        }
    }
}
