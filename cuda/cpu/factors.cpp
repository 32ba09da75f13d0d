// Low-rank factors of matrices (PowerSGD). hpcsync_kernels.h states the order of every sum.
#include <cmath>

#include "kernel.h"
#include "vector.h"

namespace HPCSYNC_ISA {

namespace {

constexpr size_t SUMS = 16;   // partial sums of a dot product
constexpr size_t BLOCK = 32;  // rows that factor_columns adds before it adds to the total
constexpr size_t PARTS = SUMS / LANES;

// Rows, factors and registers of columns at once: as many sums as there are registers for.
constexpr size_t ROWS = LANES == 16 ? 2 : 1;
constexpr size_t FACTORS = LANES == 4 ? 2 : 4;
constexpr size_t WIDTH = LANES == 16 ? 4 : 2;

#define INLINE static inline __attribute__((always_inline))

// The fixed tree over sixteen partial sums, which it overwrites.
template <typename Number>
INLINE Number tree(Number *sums) {
    for (size_t half = SUMS / 2; half; half /= 2)
        for (size_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sums[0];
}

// p[k, i] for R rows from row i and K factors from factor k.
template <size_t R, size_t K>
INLINE void rows_tile(const float *m, size_t columns, const float *q, float *p, size_t rows) {
    Vector sums[R][K][PARTS] = {};
    size_t j = 0;
    for (; j + SUMS <= columns; j += SUMS)
        for (size_t part = 0; part < PARTS; ++part) {
            const size_t at = j + part * LANES;
            Vector x[R];
            for (size_t a = 0; a < R; ++a) x[a] = load(m + a * columns + at);
            for (size_t k = 0; k < K; ++k) {
                const Vector y = load(q + k * columns + at);
                for (size_t a = 0; a < R; ++a) sums[a][k][part] += x[a] * y;
            }
        }
    for (size_t a = 0; a < R; ++a)
        for (size_t k = 0; k < K; ++k) {
            float each[SUMS];
            for (size_t part = 0; part < PARTS; ++part)
                store(each + part * LANES, sums[a][k][part]);
            for (size_t at = j; at < columns; ++at)
                each[at - j] += m[a * columns + at] * q[k * columns + at];
            p[k * rows + a] = tree(each);
        }
}

template <size_t R>
INLINE void rows_strip(const float *m, size_t columns, const float *q, size_t rank, float *p,
                       size_t rows) {
    size_t k = 0;
    for (; k + FACTORS <= rank; k += FACTORS)
        rows_tile<R, FACTORS>(m, columns, q + k * columns, p + k * rows, rows);
    for (; k < rank; ++k) rows_tile<R, 1>(m, columns, q + k * columns, p + k * rows, rows);
}

// q[k, j] of K factors for V registers of columns, over all rows.
template <size_t V, size_t K>
INLINE void columns_tile(const float *m, size_t rows, size_t columns, const float *p, float *q,
                         size_t p_stride) {
    Vector sums[K][V] = {};
    for (size_t i = 0; i < rows; ++i) {
        Vector x[V];
        for (size_t v = 0; v < V; ++v) x[v] = load(m + i * columns + v * LANES);
        for (size_t k = 0; k < K; ++k)
            for (size_t v = 0; v < V; ++v) sums[k][v] += x[v] * p[k * p_stride + i];
    }
    for (size_t k = 0; k < K; ++k)
        for (size_t v = 0; v < V; ++v) {
            float *at = q + k * columns + v * LANES;
            store(at, load(at) + sums[k][v]);
        }
}

template <size_t K>
INLINE void columns_strip(const float *m, size_t rows, size_t columns, const float *p, float *q,
                          size_t p_stride) {
    size_t j = 0;
    for (; j + WIDTH * LANES <= columns; j += WIDTH * LANES)
        columns_tile<WIDTH, K>(m + j, rows, columns, p, q + j, p_stride);
    for (; j + LANES <= columns; j += LANES)
        columns_tile<1, K>(m + j, rows, columns, p, q + j, p_stride);
    for (; j < columns; ++j)
        for (size_t k = 0; k < K; ++k) {
            float sum = 0;
            for (size_t i = 0; i < rows; ++i) sum += m[i * columns + j] * p[k * p_stride + i];
            q[k * columns + j] += sum;
        }
}

// The sum over k of p[k, i] * q[k, j], for R rows and one register of columns.
template <size_t R>
INLINE void product(const float *p, size_t rows, const float *q, size_t columns, size_t rank,
                    Vector (&out)[R]) {
    Vector x = load(q);
    for (size_t a = 0; a < R; ++a) out[a] = x * p[a];
    for (size_t k = 1; k < rank; ++k) {
        x = load(q + k * columns);
        for (size_t a = 0; a < R; ++a) out[a] += x * p[k * rows + a];
    }
}

INLINE float product(const float *p, size_t rows, const float *q, size_t columns, size_t rank) {
    float sum = q[0] * p[0];
    for (size_t k = 1; k < rank; ++k) sum += q[k * columns] * p[k * rows];
    return sum;
}

template <size_t R>
INLINE void apply_strip(float *m, float *error, size_t columns, const float *p, size_t rows,
                        const float *own, const float *mean, size_t rank) {
    size_t j = 0;
    for (; j + LANES <= columns; j += LANES) {
        Vector sums[R];
        if (error) {
            product<R>(p, rows, own + j, columns, rank, sums);
            for (size_t a = 0; a < R; ++a)
                store(error + a * columns + j, load(m + a * columns + j) - sums[a]);
        }
        product<R>(p, rows, mean + j, columns, rank, sums);
        for (size_t a = 0; a < R; ++a) store(m + a * columns + j, sums[a]);
    }
    for (; j < columns; ++j)
        for (size_t a = 0; a < R; ++a) {
            float *at = m + a * columns + j;
            if (error)
                error[a * columns + j] = *at - product(p + a, rows, own + j, columns, rank);
            *at = product(p + a, rows, mean + j, columns, rank);
        }
}

double dot(const float *x, const float *y, size_t n) {
    double sums[SUMS] = {0};
    size_t i = 0;
    for (; i + SUMS <= n; i += SUMS)
        for (size_t l = 0; l < SUMS; ++l) sums[l] += (double)x[i + l] * (double)y[i + l];
    for (size_t l = 0; i + l < n; ++l) sums[l] += (double)x[i + l] * (double)y[i + l];
    return tree(sums);
}

// x less its projection on y. y is a unit vector only to within float's rounding.
void project_out(float *x, const float *y, size_t n) {
    const double square = dot(y, y, n);
    if (square == 0) return;
    const double factor = dot(y, x, n) / square;
    for (size_t i = 0; i < n; ++i) x[i] = (float)((double)x[i] - factor * (double)y[i]);
}

void scale(float *x, double factor, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] = (float)((double)x[i] * factor);
}

}  // namespace

void factor_rows(float *m, const float *error, size_t rows, size_t columns, const float *q,
                 size_t rank, float *p) {
    for (size_t i = 0; i < rows;) {
        const size_t strip = rows - i >= ROWS ? ROWS : 1;
        float *at = m + i * columns;
        if (error) {
            const float *held = error + i * columns;
            for (size_t j = 0; j < strip * columns; ++j) at[j] += held[j];
        }
        if (strip == ROWS)
            rows_strip<ROWS>(at, columns, q, rank, p + i, rows);
        else
            rows_strip<1>(at, columns, q, rank, p + i, rows);
        i += strip;
    }
}

void factor_columns(const float *m, size_t rows, size_t columns, const float *p, size_t rank,
                    float *q) {
    for (size_t i = 0; i < rank * columns; ++i) q[i] = 0;
    for (size_t i = 0; i < rows; i += BLOCK) {
        const size_t count = rows - i < BLOCK ? rows - i : BLOCK;
        const float *at = m + i * columns;
        size_t k = 0;
        for (; k + 4 <= rank; k += 4)
            columns_strip<4>(at, count, columns, p + k * rows + i, q + k * columns, rows);
        for (; k < rank; ++k)
            columns_strip<1>(at, count, columns, p + k * rows + i, q + k * columns, rows);
    }
}

void factor_apply(float *m, float *error, size_t rows, size_t columns, const float *p,
                  const float *own, const float *mean, size_t rank) {
    size_t i = 0;
    for (; i + 4 <= rows; i += 4)
        apply_strip<4>(m + i * columns, error ? error + i * columns : nullptr, columns, p + i, rows,
                       own, mean, rank);
    for (; i < rows; ++i)
        apply_strip<1>(m + i * columns, error ? error + i * columns : nullptr, columns, p + i, rows,
                       own, mean, rank);
}

void orthogonalise(float *x, size_t rank, size_t n) {
    for (size_t k = 0; k < rank; ++k) {
        float *own = x + k * n;
        const double norm = std::sqrt(dot(own, own, n));
        scale(own, norm == 0 ? 0 : 1 / norm, n);
        for (int pass = 0; k && pass < 2; ++pass) {
            for (size_t j = 0; j < k; ++j) project_out(own, x + j * n, n);
            scale(own, 1 / (std::sqrt(dot(own, own, n)) + 1e-8), n);
        }
    }
}

}  // namespace HPCSYNC_ISA
