// The steps of training that pass over rows once, forward and backward: norm, SwiGLU, sums, softmax of logits. What is summed over rows
// is summed in groups of rows whose size depends on the shape alone, and the groups in order: the same bits for any number of threads.
#ifndef QWEN2_TRAIN_ROWS_H
#define QWEN2_TRAIN_ROWS_H

#include "exp.h"
#include "kernels.h"
#include "pool.h"
#include "train_numbers.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int64_t ROWS = 32;        // of a tile that passes over rows
constexpr int64_t GROUPS = 64;      // at most, of rows that are summed

static inline int tiles_of(int64_t n, int64_t rows) { return static_cast<int>((n + rows - 1) / rows); }
static inline int64_t group_rows(int64_t n) { return n <= ROWS * GROUPS ? ROWS : (n + GROUPS - 1) / GROUPS; }

template <class T>
static int norm_forward(const qwen2_norm_step& s) {
    for_lent_tiles(tiles_of(s.n, ROWS), [&](int tile, int) {
        for (int64_t row = tile * ROWS; row < s.n && row < (tile + 1) * ROWS; row++) {
            const float* x = s.x + row * s.columns;
            T* y = static_cast<T*>(s.y) + row * s.columns;
            F squares = f_zero();
            along(s.columns, [&](int64_t i, auto part) {
                const F v = part.load(x + i);
                squares = f_fma(v, v, squares);
            });
            const float inverse = 1.0f / __builtin_sqrtf(f_sum(squares) / static_cast<float>(s.columns) + s.eps);
            s.inverse[row] = inverse;
            along(s.columns, [&](int64_t i, auto part) { part.store(y + i, f_mul(f_mul(part.load(x + i), f_set(inverse)), part.load(s.weight + i))); });
        }
    });
    return 0;
}

// dx = residual + inverse * (w dy - x inverse^2 mean(w dy x)), dweight = sum of dy x inverse; y again in the place of dy.
template <class T>
static int norm_backward(const qwen2_norm_step& s) {
    const int64_t rows = group_rows(s.n), width = (s.columns + L - 1) / L * L;
    const int groups = tiles_of(s.n, rows);
    float* partial = static_cast<float*>(shared_scratch(PARTIALS, static_cast<size_t>(groups) * width * sizeof(float)));
    if (partial == nullptr) return NO_MEMORY;
    for_lent_tiles(groups, [&](int tile, int) {
        float* sums = partial + tile * width;
        for (int64_t i = 0; i < width; i += L) f_store(sums + i, f_zero());
        for (int64_t row = tile * rows; row < s.n && row < (tile + 1) * rows; row++) {
            const float *x = s.x + row * s.columns, *residual = s.residual == nullptr ? nullptr : s.residual + row * s.columns;
            float* dx = s.dx + row * s.columns;
            T* y = static_cast<T*>(s.y) + row * s.columns;
            F products = f_zero();
            along(s.columns, [&](int64_t i, auto part) { products = f_fma(f_mul(part.load(s.weight + i), part.load(y + i)), part.load(x + i), products); });
            const float r = s.inverse[row];
            const F inverse = f_set(r), back = f_set(r * r * r * f_sum(products) / static_cast<float>(s.columns));
            along(s.columns, [&](int64_t i, auto part) {
                const F v = part.load(x + i), dy = part.load(y + i), w = part.load(s.weight + i), normed = f_mul(v, inverse);
                f_store(sums + i, f_fma(dy, normed, f_load(sums + i)));
                const F rest = residual == nullptr ? f_zero() : part.load(residual + i);
                part.store(dx + i, f_fma(f_mul(w, dy), inverse, f_fnma(v, back, rest)));
                part.store(y + i, f_mul(normed, w));
            });
        }
    });
    for (int tile = 0; tile < groups; tile++)
        along(s.columns, [&](int64_t i, auto part) { part.store(s.dweight + i, f_add(tile == 0 ? f_zero() : part.load(s.dweight + i), f_load(partial + tile * width + i))); });
    return 0;
}

static inline F logistic(F v) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), v)))); }

// out = silu(gate) * up, times the row's scale where there are some; gate and up lie side by side.
template <class T>
static int gated_forward(const void* gate_up, int64_t n, int64_t f, const float* scales, void* out) {
    for_lent_tiles(tiles_of(n, ROWS), [&](int tile, int) {
        for (int64_t row = tile * ROWS; row < n && row < (tile + 1) * ROWS; row++) {
            const T *gate = static_cast<const T*>(gate_up) + row * 2 * f, *up = gate + f;
            T* y = static_cast<T*>(out) + row * f;
            const F scale = f_set(scales == nullptr ? 1.0f : scales[row]);
            along(f, [&](int64_t i, auto part) {
                const F g = part.load(gate + i);
                part.store(y + i, f_mul(f_mul(f_mul(g, logistic(g)), part.load(up + i)), scale));
            });
        }
    });
    return 0;
}

// From the product's gradient those of gate and up, side by side, and of the scales; the product again in the place of its gradient.
template <class T>
static int gated_backward(const void* gate_up, int64_t n, int64_t f, const float* scales, void* product, void* into, float* dscales) {
    for_lent_tiles(tiles_of(n, ROWS), [&](int tile, int) {
        for (int64_t row = tile * ROWS; row < n && row < (tile + 1) * ROWS; row++) {
            const T *gate = static_cast<const T*>(gate_up) + row * 2 * f, *up = gate + f;
            T *y = static_cast<T*>(product) + row * f, *d_gate = static_cast<T*>(into) + row * 2 * f, *d_up = d_gate + f;
            const F scale = f_set(scales == nullptr ? 1.0f : scales[row]);
            F sum = f_zero();
            along(f, [&](int64_t i, auto part) {
                const F g = part.load(gate + i), u = part.load(up + i), dy = part.load(y + i), s = logistic(g), silu = f_mul(g, s);
                const F slope = f_fma(silu, f_sub(f_set(1.0f), s), s);  // of silu: s + g s (1 - s)
                const F all = f_mul(silu, u), scaled = f_mul(dy, scale);
                sum = f_fma(dy, all, sum);
                part.store(y + i, f_mul(all, scale));
                part.store(d_up + i, f_mul(scaled, silu));
                part.store(d_gate + i, f_mul(f_mul(scaled, u), slope));
            });
            if (dscales != nullptr) dscales[row] = f_sum(sum);
        }
    });
    return 0;
}

// out (n, columns) = base + the sum of `active` rows of x, those that `places` (n, active) names, in order
template <class T>
static int gather_rows(const void* x, const int64_t* places, int64_t n, int64_t active, int64_t columns, const float* base, float* out) {
    for_lent_tiles(tiles_of(n, ROWS), [&](int tile, int) {
        for (int64_t row = tile * ROWS; row < n && row < (tile + 1) * ROWS; row++)
            along(columns, [&](int64_t i, auto part) {
                F sum = base == nullptr ? f_zero() : part.load(base + row * columns + i);
                for (int64_t a = 0; a < active; a++) sum = f_add(sum, part.load(static_cast<const T*>(x) + places[row * active + a] * columns + i));
                part.store(out + row * columns + i, sum);
            });
    });
    return 0;
}

// out = x + y
template <class T>
static int add_rows(const float* x, const void* y, int64_t count, float* out) {
    constexpr int64_t PIECE = 16384;
    for_lent_tiles(tiles_of(count, PIECE), [&](int tile, int) {
        const int64_t from = tile * PIECE, left = count - from < PIECE ? count - from : PIECE;
        const T* added = static_cast<const T*>(y) + from;
        along(left, [&](int64_t i, auto part) { part.store(out + from + i, f_add(part.load(x + from + i), part.load(added + i))); });
    });
    return 0;
}

// sums (columns) of x (n, columns), rows `stride` numbers apart
template <class T>
static int sum_rows(const void* x, int64_t n, int64_t columns, int64_t stride, float* sums) {
    const int64_t rows = group_rows(n), width = (columns + L - 1) / L * L;
    const int groups = tiles_of(n, rows);
    float* partial = static_cast<float*>(shared_scratch(PARTIALS, static_cast<size_t>(groups) * width * sizeof(float)));
    if (partial == nullptr) return NO_MEMORY;
    for_lent_tiles(groups, [&](int tile, int) {
        float* own = partial + tile * width;
        for (int64_t i = 0; i < width; i += L) f_store(own + i, f_zero());
        for (int64_t row = tile * rows; row < n && row < (tile + 1) * rows; row++) {
            const T* p = static_cast<const T*>(x) + row * stride;
            along(columns, [&](int64_t i, auto part) { f_store(own + i, f_add(f_load(own + i), part.load(p + i))); });
        }
    });
    along(columns, [&](int64_t i, auto part) {
        F total = f_zero();
        for (int tile = 0; tile < groups; tile++) total = f_add(total, f_load(partial + tile * width + i));
        part.store(sums + i, total);
    });
    return 0;
}

// Softmax cross-entropy of rows of logits, and its gradient in their place.
template <class T>
static int entropy_rows(const qwen2_entropy& s) {
    for_lent_tiles(tiles_of(s.n, 4), [&](int tile, int) {
        for (int64_t row = tile * 4; row < s.n && row < (tile + 1) * 4; row++) {
            T* logits = static_cast<T*>(s.logits) + row * s.columns;
            const int64_t label = s.labels[row];
            if (label < 0) {
                s.losses[row] = s.log_sums[row] = 0.0f;
                along(s.columns, [&](int64_t i, auto part) { part.store(logits + i, f_zero()); });
                continue;
            }
            F top = f_set(-__builtin_inff()), total = f_zero();
            int64_t i = 0;
            for (; i + L <= s.columns; i += L) top = f_max(get(logits + i), top);
            float highest = f_highest(top);
            for (; i < s.columns; i++) {
                const float one = f_sum(get_first(logits + i, 1));
                highest = one > highest ? one : highest;
            }
            const F shift = f_set(highest);
            const float own = f_sum(get_first(logits + label, 1));
            along(s.columns, [&](int64_t at, auto part) {
                const int64_t left = s.columns - at;
                total = f_add(total, f_keep_first(f_exp(f_sub(part.load(logits + at), shift)), left < L ? static_cast<int>(left) : L, f_zero()));
            });
            const float sum = f_sum(total), log_sum = highest + __builtin_logf(sum);
            s.losses[row] = log_sum - own, s.log_sums[row] = log_sum;
            if (s.scale == 0.0f) continue;
            // d/dlogits of loss + z_loss log_sum^2 is (1 + 2 z_loss log_sum) softmax - one at the label
            const F factor = f_set(s.scale * (1.0f + 2.0f * s.z_loss * log_sum) / sum);
            along(s.columns, [&](int64_t at, auto part) { part.store(logits + at, f_mul(f_exp(f_sub(part.load(logits + at), shift)), factor)); });
            T* place = logits + label;
            put_first(place, f_sub(get_first(place, 1), f_set(s.scale)), 1);
        }
    });
    return 0;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
