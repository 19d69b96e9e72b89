// Activations as the products take them: int8 in groups of 32 with an fp32 scale each, and the sums of the integers, which formats
// with minimums or unsigned quants need. A group that holds a NaN or an infinity gets a NaN as scale: every output of its row is NaN.
#ifndef QWEN2_ACTIVATIONS_H
#define QWEN2_ACTIVATIONS_H

#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

struct Activations {          // K columns, G = K / 32 groups; rows of the step, or those that `rows` names
    const int8_t* q;          // [row][K]
    const float* scales;      // [row][G]
    const int32_t* sums;      // [row][G]
    const int32_t* half_sums; // [row][2G], of 16 each
    const float* x;           // [row][stride]: as they are, for float weights; may be null
    int64_t columns, stride;
    const int32_t* rows;      // of the step's activations, or null: all in order

    int64_t row(int64_t t) const { return rows ? rows[t] : t; }
};

// One piece of memory for N rows of K columns, and where the parts lie in it.
struct ActivationMemory {
    int8_t* q;
    float* scales;
    int32_t *sums, *half_sums;
    int64_t columns;

    static int64_t bytes(int64_t rows, int64_t columns) { return rows * (columns + columns / 32 * 16) + 256; }
    ActivationMemory(void* memory, int64_t rows, int64_t columns_) : columns(columns_) {
        const int64_t groups = rows * (columns / 32);
        scales = static_cast<float*>(memory);
        sums = reinterpret_cast<int32_t*>(scales + groups);
        half_sums = sums + groups;
        q = reinterpret_cast<int8_t*>(half_sums + 2 * groups);
    }
    Activations view(const float* x, int64_t stride) const { return {q, scales, sums, half_sums, x, columns, stride, nullptr}; }
};

// 32 numbers.
static inline void quantize_group(const float* x, int8_t* q, float* scale, int32_t* sum, int32_t* half_sums) {
    constexpr int V = 32 / L, HALF = V / 2;
    const I magnitude = i_set(0x7fffffff);
    F v[V];
    I bits = i_zero();
    for (int i = 0; i < V; i++) v[i] = f_load(x + i * L), bits = i_max(bits, i_and(i_bits(v[i]), magnitude));
    const int32_t highest = i_highest(bits);
    if (highest < 0x0554ad2e || highest >= 0x7f800000) {  // below 1e-35 (whose inverse overflows): zeros; NaN and infinity
        for (int i = 0; i < V; i++) i_store_s8(q + i * L, i_zero());
        *scale = highest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
        *sum = half_sums[0] = half_sums[1] = 0;
        return;
    }
    float amax;
    __builtin_memcpy(&amax, &highest, 4);
    const F inverse = f_set(127.0f / amax);
    I first = i_zero(), second = i_zero();
    for (int i = 0; i < V; i++) {
        const I rounded = i_from_f(f_mul(v[i], inverse));
        i_store_s8(q + i * L, rounded);
        if (i < HALF) first = i_add(first, rounded);
        else second = i_add(second, rounded);
    }
    *scale = amax * (1.0f / 127.0f);
    half_sums[0] = i_sum(first), half_sums[1] = i_sum(second);
    *sum = half_sums[0] + half_sums[1];
}

static inline void quantize_row(const float* x, const ActivationMemory& out, int64_t row) {
    const int64_t groups = out.columns / 32, at = row * groups;
    for (int64_t g = 0; g < groups; g++)
        quantize_group(x + g * 32, out.q + row * out.columns + g * 32, out.scales + at + g, out.sums + at + g, out.half_sums + 2 * (at + g));
}

// RMSNorm of a row: x / sqrt(mean(x^2) + eps) * weight. Any width.
static inline void norm_row(const float* x, const float* weight, float eps, int64_t columns, float* out) {
    F total[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
    int64_t i = 0;
    for (; i + 4 * L <= columns; i += 4 * L)
        for (int part = 0; part < 4; part++) {
            const F v = f_load(x + i + part * L);
            total[part] = f_fma(v, v, total[part]);
        }
    float sum = f_sum(f_add(f_add(total[0], total[1]), f_add(total[2], total[3])));
    for (; i < columns; i++) sum += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(sum / static_cast<float>(columns) + eps);
    const F factors = f_set(factor);
    for (i = 0; i + L <= columns; i += L) f_store(out + i, f_mul(f_mul(f_load(x + i), factors), f_load(weight + i)));
    for (; i < columns; i++) out[i] = x[i] * factor * weight[i];
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
