// Vectors of 4 lanes for Arm's 64-bit processors with the dot product (Armv8.2-A). Everything is local to the file that includes it.
#ifndef QWEN2_SIMD_NEON_H
#define QWEN2_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int L = 4;                // lanes: rows of a tile
constexpr int S8_ZERO = 0;          // signed bytes are multiplied as they are
typedef float32x4_t F;              // L floats
typedef int32x4_t I;                // L int32, or 4L bytes

static inline F f_load(const float* p) { return vld1q_f32(p); }
static inline void f_store(float* p, F v) { vst1q_f32(p, v); }
static inline I first_lanes(int n) {
    static const int32_t ORDER[4] = {0, 1, 2, 3};
    return vreinterpretq_s32_u32(vcltq_s32(vld1q_s32(ORDER), vdupq_n_s32(n)));
}
static inline void f_store_first(float* p, F v, int n) {
    float lanes[L];
    vst1q_f32(lanes, v);
    for (int i = 0; i < n; i++) p[i] = lanes[i];
}
static inline F f_load_first(const float* p, int n) {
    float lanes[L] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return vld1q_f32(lanes);
}
static inline F f_keep_first(F v, int n, F rest) { return vbslq_f32(vreinterpretq_u32_s32(first_lanes(n)), v, rest); }  // lanes 0 .. n - 1 of v; n may be anything
static inline F f_set(float v) { return vdupq_n_f32(v); }
static inline F f_zero() { return vdupq_n_f32(0.0f); }
static inline F f_add(F a, F b) { return vaddq_f32(a, b); }
static inline F f_sub(F a, F b) { return vsubq_f32(a, b); }
static inline F f_mul(F a, F b) { return vmulq_f32(a, b); }
static inline F f_div(F a, F b) { return vdivq_f32(a, b); }
static inline F f_fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }          // a * b + c
static inline F f_fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }         // c - a * b
static inline F f_max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where one of them is NaN, unlike fmax
static inline F f_min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline F f_from_i(I v) { return vcvtq_f32_s32(v); }
static inline I i_from_f(F v) { return vcvtnq_s32_f32(v); }                  // to nearest, ties to even
static inline I i_bits(F v) { return vreinterpretq_s32_f32(v); }
static inline F f_bits(I v) { return vreinterpretq_f32_s32(v); }
static inline float f_sum(F v) {                                             // by halves: one fixed order
    const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float f_highest(F v) { return vmaxvq_f32(v); }
static inline F f_load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline F f_load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

static inline I i_load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
static inline void i_store(void* p, I v) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
static inline I i_set(int32_t v) { return vdupq_n_s32(v); }
static inline I i_set_bytes(int8_t v) { return vreinterpretq_s32_s8(vdupq_n_s8(v)); }
static inline I i_zero() { return vdupq_n_s32(0); }
static inline I i_add(I a, I b) { return vaddq_s32(a, b); }
static inline I i_sub(I a, I b) { return vsubq_s32(a, b); }
static inline I i_mul(I a, I b) { return vmulq_s32(a, b); }
static inline I i_max(I a, I b) { return vmaxq_s32(a, b); }
static inline I i_and(I a, I b) { return vandq_s32(a, b); }
static inline I i_or(I a, I b) { return vorrq_s32(a, b); }
static inline I i_xor(I a, I b) { return veorq_s32(a, b); }
static inline I i_and_or(I a, I mask, I c) { return i_or(i_and(a, mask), c); }  // (a & mask) | c
template <int n> static inline I i_srl16(I v) {
    if constexpr (n == 0) return v;
    else return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(v), n));
}
template <int n> static inline I i_sll16(I v) { return vreinterpretq_s32_u16(vshlq_n_u16(vreinterpretq_u16_s32(v), n)); }
template <int n> static inline I i_sll(I v) { return vshlq_n_s32(v, n); }
template <int n> static inline I i_sra(I v) {
    if constexpr (n == 0) return v;
    else return vshrq_n_s32(v, n);
}
static inline I i_srl_by(I v, int n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-n))); }
static inline I i_table(I table, I indices) {  // of 16 bytes
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(indices)));
}
static inline I i_repeat16(const void* p) { return i_load(p); }
static inline I i_broadcast4(const void* p) { return vdupq_n_s32(*static_cast<const int32_t __attribute__((may_alias, aligned(1)))*>(p)); }
static inline int32_t i_highest(I v) { return vmaxvq_s32(v); }
static inline int32_t i_sum(I v) { return vaddvq_s32(v); }

// L bytes to L int32
static inline int16x8_t four_bytes(const void* p, bool is_signed) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, p, 4);
    const uint8x8_t v = vcreate_u8(bytes);
    return is_signed ? vmovl_s8(vreinterpret_s8_u8(v)) : vreinterpretq_s16_u16(vmovl_u8(v));
}
static inline I i_load_u8(const uint8_t* p) { return vmovl_s16(vget_low_s16(four_bytes(p, false))); }
static inline I i_load_s8(const int8_t* p) { return vmovl_s16(vget_low_s16(four_bytes(p, true))); }
// L int32 to L int8 or int16, cut where they do not fit
static inline void i_store_s8(int8_t* p, I v) {
    const int16x4_t words = vqmovn_s32(v);
    const uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    __builtin_memcpy(p, &bytes, 4);
}
static inline void i_store_s16(int16_t* p, I v) { vst1_s16(p, vqmovn_s32(v)); }
// 2L int8 to 2L int16
static inline I i_widen_s8(const int8_t* p) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(p))); }

// accumulator + sum over each lane's pair of int16
static inline I dot_s16(I accumulator, I a, I b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vaddq_s32(accumulator, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}

// V vectors of pairs as `dot_pairs` takes them: of every two vectors, the first numbers of all pairs and then the second ones, which
// a multiplication with accumulation takes without adding neighbours
template <int V> static inline void arrange_pairs(I* b) {
    for (int v = 0; v + 2 <= V; v += 2) {
        const int16x8_t x = vreinterpretq_s16_s32(b[v]), y = vreinterpretq_s16_s32(b[v + 1]);
        b[v] = vreinterpretq_s32_s16(vuzp1q_s16(x, y)), b[v + 1] = vreinterpretq_s32_s16(vuzp2q_s16(x, y));
    }
}
// sums[v] + sum over each lane's pair of b[v] times the pair at `a`
template <int V> static inline void dot_pairs(I* sums, const I* b, const int16_t* a) {
    const I repeated = i_broadcast4(a);
    const int16x4_t two = vget_low_s16(vreinterpretq_s16_s32(repeated));
    for (int v = 0; v + 2 <= V; v += 2) {
        const int16x8_t firsts = vreinterpretq_s16_s32(b[v]), seconds = vreinterpretq_s16_s32(b[v + 1]);
        sums[v] = vmlal_lane_s16(vmlal_lane_s16(sums[v], vget_low_s16(firsts), two, 0), vget_low_s16(seconds), two, 1);
        sums[v + 1] = vmlal_high_lane_s16(vmlal_high_lane_s16(sums[v + 1], firsts, two, 0), seconds, two, 1);
    }
    if (V % 2) sums[V - 1] = dot_s16(sums[V - 1], b[V - 1], repeated);
}

// Four of a token's bytes, as `dot_bytes` takes them: the instruction finds them inside 16 that are loaded once.
struct Bytes {
    I sixteen;
    int at;
};
static inline Bytes step_of(const int8_t* group, int step) { return {i_load(group + step / 4 * 16), step % 4}; }

// accumulator + sum over each lane's four of signed weight byte times signed byte
static inline I dot_bytes(I accumulator, I weights, Bytes x) {
    const int8x16_t w = vreinterpretq_s8_s32(weights), v = vreinterpretq_s8_s32(x.sixteen);
    switch (x.at) {  // known where the caller's loop is unrolled
        case 0: return vdotq_laneq_s32(accumulator, w, v, 0);
        case 1: return vdotq_laneq_s32(accumulator, w, v, 1);
        case 2: return vdotq_laneq_s32(accumulator, w, v, 2);
        default: return vdotq_laneq_s32(accumulator, w, v, 3);
    }
}

// the instruction that products of bytes are made of
static inline I multiply_add_bytes(I sums, I a, I b) { return vdotq_s32(sums, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_second(const void* p) { __builtin_prefetch(p, 0, 2); }  // not into the first cache

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
