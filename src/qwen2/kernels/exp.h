// e^x for vectors, to about one unit in the last place: x = n ln 2 + r, a polynomial for e^r, n added to the exponent. Below -87 and
// above 88 the results of -87 and 88; exactly 1 at 0; NaN stays NaN.
#ifndef QWEN2_EXP_H
#define QWEN2_EXP_H

#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

static inline F f_exp(F x) {
    x = f_max(f_set(-87.0f), f_min(f_set(88.0f), x));  // constants first: the second operand is what a NaN comes out of
    const I n = i_from_f(f_mul(x, f_set(1.44269504f)));
    const F whole = f_from_i(n);
    const F r = f_fnma(whole, f_set(-2.12194440e-4f), f_fnma(whole, f_set(0.693359375f), x));  // ln 2 in two parts
    F p = f_set(1.9875691500e-4f);  // Cephes' polynomial for e^r - 1 - r, |r| <= ln 2 / 2
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_add(f_fma(p, f_mul(r, r), r), f_set(1.0f));
    return f_mul(p, f_bits(i_sll<23>(i_add(n, i_set(127)))));
}

static inline float exp_of(float x) {
    alignas(64) float lanes[L];
    f_store(lanes, f_exp(f_set(x)));
    return lanes[0];
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
