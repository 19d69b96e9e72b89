// The first phase of attention: rotation of queries and keys, their integers, and the write to the cache.
#ifndef QWEN2_ROTATE_H
#define QWEN2_ROTATE_H

#include "cache.h"
#include "exp.h"
#include "pool.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int MAX_DIM = 256;
constexpr float SHORT = 32700.0f;  // length of an int16 query or key: |sum of products| <= length * length < 2^31, by Cauchy and Schwarz

struct Queries {          // of all tokens and heads, rotated
    int16_t* q;           // [token][head][d]
    float* scales;        // [token][head], with 1 / sqrt(head_dim) in it
};

// Pairs (i, i + half) turned by their angles; d is the padded size of `out`.
static inline void rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, int64_t d, float* out) {
    const int64_t half = head_dim / 2;
    int64_t i = 0;
    for (; i + L <= half; i += L) {
        const F a = f_load(x + i), b = f_load(x + half + i), c = f_load(cos + i), s = f_load(sin + i);
        f_store(out + i, f_sub(f_mul(a, c), f_mul(b, s)));
        f_store(out + half + i, f_add(f_mul(b, c), f_mul(a, s)));
    }
    for (; i < half; i++) {
        out[i] = x[i] * cos[i] - x[half + i] * sin[i];
        out[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
    }
    for (int64_t k = head_dim; k < d; k++) out[k] = 0.0f;
}

// Pairs (i, i + half) times their factors, or divided by them; nothing where there are none. A pair has one factor, so turning it
// before or after is the same.
template <bool DIVIDE>
static inline void apply_factors(float* x, const float* factors, int64_t head_dim) {
    if (factors == nullptr) return;
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float factor = DIVIDE ? 1.0f / factors[i] : factors[i];
        x[i] *= factor, x[half + i] *= factor;
    }
}

// Integers of a vector of padded size d, and the scale back; 0 for zeros, NaN where a number is not finite.
static inline float quantize_to(const float* x, int64_t d, float inverse, float scale, bool finite, int16_t* out) {
    const F factor = f_set(finite ? inverse : 0.0f);
    for (int64_t i = 0; i < d; i += L) i_store_s16(out + i, finite ? i_from_f(f_mul(f_load(x + i), factor)) : i_zero());
    return finite ? scale : __builtin_nanf("");
}

static inline float highest_magnitude(const float* x, int64_t d, bool* finite) {
    I bits = i_zero();
    for (int64_t i = 0; i < d; i += L) bits = i_max(bits, i_and(i_bits(f_load(x + i)), i_set(0x7fffffff)));
    const int32_t highest = i_highest(bits);
    *finite = highest < 0x7f800000;
    float value;
    __builtin_memcpy(&value, &highest, 4);
    return value;
}

// Scaled to length SHORT: queries, and keys of 16 bits.
static inline float quantize_length(const float* x, int64_t d, int16_t* out) {
    bool finite;
    const float highest = highest_magnitude(x, d, &finite);
    if (finite && highest < 1e-18f) return quantize_to(x, d, 0.0f, 0.0f, true, out);  // its square vanishes: zeros
    F total = f_zero();
    const F down = f_set(finite ? 1.0f / highest : 0.0f);
    for (int64_t i = 0; i < d; i += L) {
        const F v = f_mul(f_load(x + i), down);
        total = f_fma(v, v, total);
    }
    const float length = highest * __builtin_sqrtf(f_sum(total));
    return quantize_to(x, d, SHORT / length, length * (1.0f / SHORT), finite && length < __builtin_inff(), out);
}

// Scaled to a largest magnitude of `most`: values, and keys of 8 bits.
static inline float quantize_highest(const float* x, int64_t d, float most, int16_t* out) {
    bool finite;
    const float highest = highest_magnitude(x, d, &finite);
    if (finite && highest < 1e-33f) return quantize_to(x, d, 0.0f, 0.0f, true, out);
    return quantize_to(x, d, most / highest, highest / most, finite, out);
}

static inline const float* factors_of(const qwen2_attention& a, int kv_head) {
    return a.key_factors == nullptr ? nullptr : a.key_factors + static_cast<int64_t>(kv_head) * (a.head_dim / 2);
}

// One token's keys and values into its block. Neighbouring tokens' integers lie in the same words: each is written alone.
template <class Int>
static void write_token(const qwen2_attention& a, const float* k, const float* v, const float* cos, const float* sin, uint8_t* block, int64_t slot) {
    const int64_t d = padded(a.head_dim), bytes = cache_bytes(a.head_dim, a.bits);
    alignas(64) float turned[MAX_DIM];
    alignas(64) int16_t whole[MAX_DIM];
    for (int head = 0; head < a.kv_heads; head++) {
        const Piece<Int> piece(block + a.offset + head * bytes, d);
        rotate(k + head * a.head_dim, cos, sin, a.head_dim, d, turned);
        apply_factors<true>(turned, factors_of(a, head), a.head_dim);
        piece.key_scales[slot] = sizeof(Int) == 2 ? quantize_length(turned, d, whole) : quantize_highest(turned, d, 127.0f, whole);
        for (int64_t i = 0; i < d; i++) piece.keys[key_at(slot, i, d)] = static_cast<Int>(whole[i]);
        for (int64_t i = 0; i < d; i++) turned[i] = i < a.head_dim ? v[head * a.head_dim + i] : 0.0f;
        piece.value_scales[slot] = quantize_highest(turned, d, sizeof(Int) == 2 ? 32767.0f : 127.0f, whole);
        for (int64_t i = 0; i < d; i++) piece.values[value_at(slot, i, d)] = static_cast<Int>(whole[i]);
    }
}

static void rotate_queries(const qwen2_attention& a, int64_t token, const float* q, const float* cos, const float* sin, const Queries& out) {
    const int64_t d = padded(a.head_dim);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim));
    alignas(64) float turned[MAX_DIM];
    for (int head = 0; head < a.heads; head++) {
        const int64_t row = token * a.heads + head;
        rotate(q + head * a.head_dim, cos, sin, a.head_dim, d, turned);
        apply_factors<false>(turned, factors_of(a, head / (a.heads / a.kv_heads)), a.head_dim);
        out.scales[row] = scale * quantize_length(turned, d, out.q + row * d);
    }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
