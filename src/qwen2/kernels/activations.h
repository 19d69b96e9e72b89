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
    const int32_t* halves;    // [row][G]: the same two in 16 bits each
    const float* lows;        // [row][G]: scale * sum, what a minimum of the weights is multiplied by
    const float* half_lows;   // [row][2G]
    const float* x;           // [row][stride]: as they are, for float weights; may be null
    int64_t columns, stride;
    const int32_t* rows;      // of the step's activations, or null: all in order

    int64_t row(int64_t t) const { return rows ? rows[t] : t; }
};

// One piece of memory for N rows of K columns, and where the parts lie in it.
struct ActivationMemory {
    int8_t* q;
    float* scales;
    int32_t *sums, *half_sums, *halves;
    float *lows, *half_lows;
    int64_t columns;

    static int64_t bytes(int64_t rows, int64_t columns) { return rows * (columns + columns / 32 * 32) + 256; }
    ActivationMemory(void* memory, int64_t rows, int64_t columns_) : columns(columns_) {
        const int64_t groups = rows * (columns / 32);
        scales = static_cast<float*>(memory);
        sums = reinterpret_cast<int32_t*>(scales + groups);
        half_sums = sums + groups;
        halves = half_sums + 2 * groups;
        lows = reinterpret_cast<float*>(halves + groups);
        half_lows = lows + groups;
        q = reinterpret_cast<int8_t*>(half_lows + 2 * groups);
    }
    Activations view(const float* x, int64_t stride) const { return {q, scales, sums, half_sums, halves, lows, half_lows, x, columns, stride, nullptr}; }
};

// The 32 numbers at `x` become group `g` of a row.
static inline void quantize_group(const float* x, const ActivationMemory& out, int64_t row, int64_t g) {
    constexpr int V = 32 / L, HALF = V / 2;
    const int64_t at = row * (out.columns / 32) + g;
    int8_t* q = out.q + row * out.columns + g * 32;
    const I magnitude = i_set(0x7fffffff);
    F v[V];
    I bits = i_zero();
    for (int i = 0; i < V; i++) v[i] = f_load(x + i * L), bits = i_max(bits, i_and(i_bits(v[i]), magnitude));
    const int32_t highest = i_highest(bits);
    I half[2] = {i_zero(), i_zero()};
    if (highest < 0x0554ad2e || highest >= 0x7f800000) {  // below 1e-35 (whose inverse overflows): zeros; NaN and infinity
        for (int i = 0; i < V; i++) i_store_s8(q + i * L, i_zero());
        out.scales[at] = highest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    } else {
        float amax;
        __builtin_memcpy(&amax, &highest, 4);
        const F inverse = f_set(127.0f / amax);
        for (int i = 0; i < V; i++) {
            const I rounded = i_from_f(f_mul(v[i], inverse));
            i_store_s8(q + i * L, rounded);
            half[i / HALF] = i_add(half[i / HALF], rounded);
        }
        out.scales[at] = amax * (1.0f / 127.0f);
    }
    const int32_t first = i_sum(half[0]), second = i_sum(half[1]);
    const float scale = out.scales[at];
    out.sums[at] = first + second, out.half_sums[2 * at] = first, out.half_sums[2 * at + 1] = second;
    out.halves[at] = (first & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(second) << 16);
    out.lows[at] = scale * static_cast<float>(first + second);
    out.half_lows[2 * at] = scale * static_cast<float>(first), out.half_lows[2 * at + 1] = scale * static_cast<float>(second);
}

static inline void quantize_row(const float* x, const ActivationMemory& out, int64_t row) {
    for (int64_t g = 0; g < out.columns / 32; g++) quantize_group(x + g * 32, out, row, g);
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
