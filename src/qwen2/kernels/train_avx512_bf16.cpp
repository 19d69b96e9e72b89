// The steps of training for AVX-512 with products of bfloat16 pairs, which attention then multiplies in bfloat16; the rest is as in
// train_avx512.cpp. Nothing of the standard library's inline code may be used.
#define QWEN2_ISA avx512bf16
#define QWEN2_DOT_BF16
#include "simd_avx512.h"

namespace qwen2 {
namespace QWEN2_ISA {

// sum + the two products of each lane's pairs of bfloat16
static inline F f_dot_bf16(F a, F b, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// two vectors rounded to bfloat16, side by side in each lane
static inline F f_pair_bf16(F first, F second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
    return f_bits(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#include "train_set.h"

namespace qwen2 {

extern const TrainSet AVX512_BF16_TRAIN = QWEN2_ISA::train_set();

}  // namespace qwen2
