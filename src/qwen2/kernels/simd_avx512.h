// Vectors of 16 lanes for processors with AVX-512 (F, BW, VL) and VNNI. Everything is local to the file that includes it.
#ifndef QWEN2_SIMD_AVX512_H
#define QWEN2_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int L = 16;               // lanes: rows of a tile
constexpr int S8_ZERO = 128;        // what is added to signed bytes: the dot product takes unsigned weights
typedef __m512 F;                   // L floats
typedef __m512i I;                  // L int32, or 4L bytes

static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
static inline void f_store_first(float* p, F v, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
static inline F f_load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
static inline F f_keep_first(F v, int n, F rest) {  // lanes 0 .. n - 1 of v; n may be anything
    return _mm512_mask_blend_ps(n <= 0 ? 0 : n >= L ? 0xffff : static_cast<__mmask16>((1u << n) - 1), rest, v);
}
static inline F f_set(float v) { return _mm512_set1_ps(v); }
static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
static inline F f_fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
static inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }              // b where one of them is NaN
static inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F f_from_i(I v) { return _mm512_cvtepi32_ps(v); }
static inline I i_from_f(F v) { return _mm512_cvtps_epi32(v); }              // to nearest, ties to even
static inline I i_bits(F v) { return _mm512_castps_si512(v); }
static inline F f_bits(I v) { return _mm512_castsi512_ps(v); }
static inline float f_sum(F v) { return _mm512_reduce_add_ps(v); }           // by halves: one fixed order
static inline float f_highest(F v) { return _mm512_reduce_max_ps(v); }
static inline F f_load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline F f_load_bf16(const uint16_t* p) {
    return f_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

static inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
static inline void i_store(void* p, I v) { _mm512_storeu_si512(p, v); }
static inline I i_set(int32_t v) { return _mm512_set1_epi32(v); }
static inline I i_set_bytes(int8_t v) { return _mm512_set1_epi8(v); }
static inline I i_zero() { return _mm512_setzero_si512(); }
static inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
static inline I i_mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
static inline I i_max(I a, I b) { return _mm512_max_epi32(a, b); }
static inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
static inline I i_or(I a, I b) { return _mm512_or_si512(a, b); }
static inline I i_xor(I a, I b) { return _mm512_xor_si512(a, b); }
static inline I i_and_or(I a, I mask, I c) { return _mm512_ternarylogic_epi32(a, mask, c, 0xEA); }  // (a & mask) | c
template <int n> static inline I i_srl16(I v) { return n == 0 ? v : _mm512_srli_epi16(v, n); }
template <int n> static inline I i_sll16(I v) { return n == 0 ? v : _mm512_slli_epi16(v, n); }
template <int n> static inline I i_sll(I v) { return _mm512_slli_epi32(v, n); }
template <int n> static inline I i_sra(I v) { return _mm512_srai_epi32(v, n); }
static inline I i_srl_by(I v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
static inline I i_table(I table, I indices) { return _mm512_shuffle_epi8(table, indices); }  // 16 bytes, the same in every 128 bits
static inline I i_repeat16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
static inline I i_broadcast4(const void* p) { return _mm512_set1_epi32(*static_cast<const int32_t __attribute__((may_alias, aligned(1)))*>(p)); }
static inline int32_t i_highest(I v) { return _mm512_reduce_max_epi32(v); }
static inline int32_t i_sum(I v) { return _mm512_reduce_add_epi32(v); }

// L bytes to L int32
static inline I i_load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline I i_load_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// L int32 to L int8 or int16, cut where they do not fit
static inline void i_store_s8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }
static inline void i_store_s16(int16_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v)); }
// 2L int8 to 2L int16
static inline I i_widen_s8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// accumulator + sum over each lane's pair of int16
static inline I dot_s16(I accumulator, I a, I b) { return _mm512_dpwssd_epi32(accumulator, a, b); }

// V vectors of pairs as `dot_pairs` takes them: as they are
template <int V> static inline void arrange_pairs(I*) {}
// sums[v] + sum over each lane's pair of b[v] times the pair at `a`
template <int V> static inline void dot_pairs(I* sums, const I* b, const int16_t* a) {
    const I two = i_broadcast4(a);
    for (int v = 0; v < V; v++) sums[v] = dot_s16(sums[v], b[v], two);
}

// four of a token's bytes, as `dot_bytes` takes them
static inline I step_of(const int8_t* group, int step) { return i_broadcast4(group + 4 * step); }
// accumulator + sum over each lane's four of unsigned weight byte times signed byte
static inline I dot_bytes(I accumulator, I weights, I x) { return _mm512_dpbusd_epi32(accumulator, weights, x); }

// the instruction that products of bytes are made of
static inline I multiply_add_bytes(I sums, I a, I b) { return _mm512_dpbusd_epi32(sums, a, b); }

static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
static inline void prefetch_second(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // not into the first cache

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
