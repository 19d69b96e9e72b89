// Vectors of 8 lanes for processors with AVX2, FMA and F16C. Everything is local to the file that includes it.
#ifndef QWEN2_SIMD_AVX2_H
#define QWEN2_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int L = 8;                // lanes: rows of a tile
constexpr int S8_ZERO = 0;          // signed bytes are multiplied as they are
typedef __m256 F;                   // L floats
typedef __m256i I;                  // L int32, or 4L bytes

static inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void f_store(float* p, F v) { _mm256_storeu_ps(p, v); }
static inline I first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline void f_store_first(float* p, F v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
static inline F f_load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
static inline F f_keep_first(F v, int n, F rest) {  // lanes 0 .. n - 1 of v; n may be anything
    return _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(first_lanes(n)));
}
static inline F f_set(float v) { return _mm256_set1_ps(v); }
static inline F f_zero() { return _mm256_setzero_ps(); }
static inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
static inline F f_fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
static inline F f_max(F a, F b) { return _mm256_max_ps(a, b); }              // b where one of them is NaN
static inline F f_min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F f_from_i(I v) { return _mm256_cvtepi32_ps(v); }
static inline I i_from_f(F v) { return _mm256_cvtps_epi32(v); }              // to nearest, ties to even
static inline I i_bits(F v) { return _mm256_castps_si256(v); }
static inline F f_bits(I v) { return _mm256_castsi256_ps(v); }
static inline float f_sum(F v) {                                             // by halves: one fixed order
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float f_highest(F v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline F f_load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline F f_load_bf16(const uint16_t* p) {
    return f_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

static inline I i_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void i_store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
static inline I i_set(int32_t v) { return _mm256_set1_epi32(v); }
static inline I i_set_bytes(int8_t v) { return _mm256_set1_epi8(v); }
static inline I i_zero() { return _mm256_setzero_si256(); }
static inline I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I i_sub(I a, I b) { return _mm256_sub_epi32(a, b); }
static inline I i_mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
static inline I i_max(I a, I b) { return _mm256_max_epi32(a, b); }
static inline I i_and(I a, I b) { return _mm256_and_si256(a, b); }
static inline I i_or(I a, I b) { return _mm256_or_si256(a, b); }
static inline I i_xor(I a, I b) { return _mm256_xor_si256(a, b); }
static inline I i_and_or(I a, I mask, I c) { return i_or(i_and(a, mask), c); }  // (a & mask) | c
template <int n> static inline I i_srl16(I v) { return n == 0 ? v : _mm256_srli_epi16(v, n); }
template <int n> static inline I i_sll16(I v) { return n == 0 ? v : _mm256_slli_epi16(v, n); }
template <int n> static inline I i_sll(I v) { return _mm256_slli_epi32(v, n); }
template <int n> static inline I i_sra(I v) { return _mm256_srai_epi32(v, n); }
static inline I i_srl_by(I v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
static inline I i_table(I table, I indices) { return _mm256_shuffle_epi8(table, indices); }  // 16 bytes, the same in every 128 bits
static inline I i_repeat16(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
static inline I i_broadcast4(const void* p) { return _mm256_set1_epi32(*static_cast<const int32_t __attribute__((may_alias, aligned(1)))*>(p)); }
static inline int32_t i_highest(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
static inline int32_t i_sum(I v) {
    __m128i m = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_add_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}

// L bytes to L int32
static inline I i_load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
static inline I i_load_s8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
// L int32 to L int8 or int16, cut where they do not fit
static inline __m128i narrow16(I v) { return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
static inline void i_store_s8(int8_t* p, I v) {
    const __m128i words = narrow16(v);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
static inline void i_store_s16(int16_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16(v)); }
// 2L int8 to 2L int16
static inline I i_widen_s8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// A sum stays in its register from step to step: left alone, GCC computes all products first, puts them into memory and adds them up
// as a tree, which takes half as long again.
static inline void keep(I& sum) { __asm__("" : "+x"(sum)); }
// accumulator + sum over each lane's pair of int16
static inline I dot_s16(I accumulator, I a, I b) {
    I sum = i_add(accumulator, _mm256_madd_epi16(a, b));
    keep(sum);
    return sum;
}

// the instructions that products of bytes are made of: sums of two in 16 bits
static inline I multiply_add_bytes(I sums, I a, I b) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(a, b)); }

// V vectors of pairs as `dot_pairs` takes them: as they are
template <int V> static inline void arrange_pairs(I*) {}
// sums[v] + sum over each lane's pair of b[v] times the pair at `a`
template <int V> static inline void dot_pairs(I* sums, const I* b, const int16_t* a) {
    const I two = i_broadcast4(a);
    for (int v = 0; v < V; v++) sums[v] = dot_s16(sums[v], b[v], two);
}

static inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
static inline void prefetch_second(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // not into the first cache

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
