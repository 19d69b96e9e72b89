// The innermost products for AVX2, which has no instruction for four bytes at once: unsigned times signed bytes give sums of two in
// 16 bits (vpmaddubsw). Those are added up in 16 bits as long as nothing can overflow, |sum of 2| being at most 2 * 127 * q:
// eight steps for quants up to 15, four up to 31, two up to 63. Signed bytes (Q8_0, IQ4_NL) go as |w| times x with w's sign where
// tokens are few, and as 16-bit numbers where they are many. The integers are exact, so the results are those of micro_dot.h's order.
#ifndef QWEN2_MICRO_AVX2_H
#define QWEN2_MICRO_AVX2_H

#include "activations.h"
#include "tile.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int CHUNK = 16;       // groups of weights that are expanded at a time; a multiple of 8
constexpr int PANEL_VECTORS = 2;

// Bytes of an expanded group of one tile: signed bytes are widened.
template <class Fmt> constexpr int panel_bytes() { return (Fmt::BITS >= 8 ? 2 : 1) * 8 * 4 * L; }
// Tokens up to which nothing is expanded for later.
template <class Fmt> constexpr int some_of() { return Fmt::BITS >= 8 ? 24 : 8; }

static inline I pairs(I w, I x) { return _mm256_maddubs_epi16(w, x); }
static inline I add16(I a, I b) { return _mm256_add_epi16(a, b); }
static inline I widen(I sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// Steps whose 16-bit sums may be added before they are widened.
template <class Fmt> constexpr int steps_in_16() { return Fmt::BITS <= 4 ? 8 : Fmt::BITS == 5 ? 4 : 2; }

template <class Fmt, int FROM, int COUNT>
static inline I dot_steps(const I* w, const int8_t* x) {
    if constexpr (Fmt::BITS >= 8) {
        I sum = i_zero();
        for (int j = FROM; j < FROM + COUNT; j++)
            sum = i_add(sum, widen(pairs(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(i_broadcast4(x + 4 * j), w[j]))));
        return sum;
    } else {
        constexpr int RUN = steps_in_16<Fmt>() < COUNT ? steps_in_16<Fmt>() : COUNT;
        I sum = i_zero();
        for (int from = FROM; from < FROM + COUNT; from += RUN) {
            I run = pairs(w[from], i_broadcast4(x + 4 * from));
            for (int j = from + 1; j < from + RUN; j++) run = add16(run, pairs(w[j], i_broadcast4(x + 4 * j)));
            sum = from == FROM ? widen(run) : i_add(sum, widen(run));
        }
        return sum;
    }
}

// Signed bytes as words: those at even places, and those at odd ones.
static inline I even_words(I bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
static inline I odd_words(I bytes) { return _mm256_srai_epi16(bytes, 8); }

// A group of one tile, expanded for many tokens: [8 steps][L rows][4] bytes, or for signed bytes [8 steps][2][L rows][2] words: of a
// step's four numbers the first and third, then the second and fourth.
template <class Fmt>
static inline void expand_to(const uint8_t* quants, uint8_t* out) {
    I w[8];
    expand<Fmt>(quants, w);
    if constexpr (Fmt::BITS >= 8) {
        for (int j = 0; j < 8; j++) {
            i_store(out + 2 * j * 4 * L, even_words(w[j]));
            i_store(out + (2 * j + 1) * 4 * L, odd_words(w[j]));
        }
    } else {
        for (int j = 0; j < 8; j++) i_store(out + j * 4 * L, w[j]);
    }
}

template <class Fmt>
static int pairs_of_tiles(const uint8_t*, int, const Activations&, int, float*, int, int) {  // 16 registers hold too few sums for that
    return 0;
}

template <class Fmt> constexpr int tokens_of() { return Fmt::BITS == 5 || Fmt::BITS == 6 ? 3 : 4; }  // of a full micro-kernel: 16 registers

// P tiles times T tokens, steps FROM .. FROM + COUNT of a group: exact sums.
template <class Fmt, int P, int T, int FROM, int COUNT>
static inline void group_sums(const uint8_t* w, const int8_t* const* q, const int16_t (*wide)[CHUNK * 32], int g, I (*sum)[T]) {
    if constexpr (Fmt::BITS >= 8) {
        for (int p = 0; p < P; p++)
            for (int t = 0; t < T; t++) sum[p][t] = i_zero();
#pragma GCC unroll 16
        for (int j = 2 * FROM; j < 2 * (FROM + COUNT); j++) {
            I vector[P];
            for (int p = 0; p < P; p++) vector[p] = i_load(w + p * CHUNK * panel_bytes<Fmt>() + j * 4 * L);
            for (int t = 0; t < T; t++) {
                const I two = i_broadcast4(&wide[t][g * 32 + j % 2 * 16 + j / 2 * 2]);
                for (int p = 0; p < P; p++) sum[p][t] = dot_s16(sum[p][t], vector[p], two);
            }
        }
    } else {
        constexpr int RUN = steps_in_16<Fmt>() < COUNT ? steps_in_16<Fmt>() : COUNT;
#pragma GCC unroll 4
        for (int from = FROM; from < FROM + COUNT; from += RUN) {
            I run[P][T];
#pragma GCC unroll 8
            for (int j = from; j < from + RUN; j++) {
                I vector[P];
                for (int p = 0; p < P; p++) vector[p] = i_load(w + p * CHUNK * panel_bytes<Fmt>() + j * 4 * L);
                for (int t = 0; t < T; t++) {
                    const I four = i_broadcast4(q[t] + g * 32 + 4 * j);
                    for (int p = 0; p < P; p++) keep(run[p][t] = j == from ? pairs(vector[p], four) : add16(run[p][t], pairs(vector[p], four)));
                }
            }
            for (int p = 0; p < P; p++)
                for (int t = 0; t < T; t++) sum[p][t] = from == FROM ? widen(run[p][t]) : i_add(sum[p][t], widen(run[p][t]));
        }
    }
}

// P tiles times T tokens over one chunk: y[T][P] in memory is added to. `panel` [P][CHUNK][..], `scales` and `mins`
// [P][CHUNK][SUBS][L].
template <class Fmt, int P, int T>
static void micro(const uint8_t* panel, const float* scales, const float* mins, int groups, const Activations& x, int64_t token, int64_t group0,
                  float* out, int stride) {
    constexpr int S = Fmt::SUBS, Z = zero_of<Fmt>();
    const int8_t* q[T];
    const float* sx[T];
    alignas(32) int32_t zeros[Z ? T : 1][CHUNK * S];      // zero * sum of x
    alignas(32) float lows[Fmt::MIN ? T : 1][CHUNK * S];  // scale_x * sum of x
    alignas(32) int16_t wide[Fmt::BITS >= 8 ? T : 1][CHUNK * 32];
    for (int t = 0; t < T; t++) {
        const int64_t row = x.row(token + t), at = row * (x.columns / 32) + group0;
        q[t] = x.q + row * x.columns + group0 * 32;
        sx[t] = x.scales + at;
        const int32_t* sums = S == 2 ? x.half_sums + 2 * at : x.sums + at;
        for (int i = 0; i < groups * S; i++) {
            if constexpr (Z != 0) zeros[t][i] = Z * sums[i];
            if constexpr (Fmt::MIN) lows[t][i] = sx[t][i / S] * static_cast<float>(sums[i]);
        }
        if constexpr (Fmt::BITS >= 8)
            for (int i = 0; i < groups * 32; i += 32) {  // 16 words of each kind
                const I bytes = i_load(q[t] + i);
                i_store(&wide[t][i], even_words(bytes)), i_store(&wide[t][i + 16], odd_words(bytes));
            }
    }
    for (int g = 0; g < groups; g++) {
        const uint8_t* w = panel + g * panel_bytes<Fmt>();
        F part[P][T];
        for (int s = 0; s < S; s++) {
            I sum[P][T];
            if constexpr (S == 1) group_sums<Fmt, P, T, 0, 8>(w, q, wide, g, sum);
            else if (s == 0) group_sums<Fmt, P, T, 0, 4>(w, q, wide, g, sum);
            else group_sums<Fmt, P, T, 4, 4>(w, q, wide, g, sum);
            for (int t = 0; t < T; t++)
                for (int p = 0; p < P; p++) {
                    const F f = f_from_i(Z ? i_sub(sum[p][t], i_set(zeros[t][g * S + s])) : sum[p][t]);
                    const F scale = f_load(scales + ((p * CHUNK + g) * S + s) * L);
                    part[p][t] = s == 0 ? f_mul(f, scale) : f_fma(f, scale, part[p][t]);
                }
        }
        for (int t = 0; t < T; t++) {
            const F scale = f_set(sx[t][g]);
            for (int p = 0; p < P; p++) {
                float* place = out + t * stride + p * L;
                F y = f_fma(part[p][t], scale, f_load(place));
                if (Fmt::MIN)
                    for (int s = 0; s < S; s++)
                        y = f_fnma(f_load(mins + ((p * CHUNK + g) * S + s) * L), f_set(lows[t][g * S + s]), y);
                f_store(place, y);
            }
        }
    }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
