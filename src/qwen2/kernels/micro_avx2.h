// The innermost products for AVX2, which has no instruction for four bytes at once: unsigned times signed bytes give sums of two in
// 16 bits (vpmaddubsw). Those are added up in 16 bits as long as nothing can overflow, |sum of 2| being at most 2 * 127 * q:
// eight steps for quants up to 15, four up to 31, two up to 63. Signed bytes (Q8_0, IQ4_NL) go as |w| times x with w's sign where
// tokens are few, and as 16-bit numbers where they are many. The integers are exact, so few tokens and many
// have the same bits.
#ifndef QWEN2_MICRO_AVX2_H
#define QWEN2_MICRO_AVX2_H

#include "activations.h"
#include "tile.h"

namespace qwen2 {
namespace QWEN2_ISA {

template <int COUNT>
static inline void sixes_in_vectors(const uint8_t* plane, uint8_t* out) {
    constexpr int LOW = COUNT / 2 * L;  // bytes
    const I nibble = i_set_bytes(15), two = i_set_bytes(3), upper = i_set_bytes(48);
    for (int i = 0; i < LOW; i += 4 * L) {
        const I low = i_load(plane + i);
        I high;  // bits 0 and 1 belong to the lower halves of `low`, bits 4 and 5 to the upper ones
        if constexpr (COUNT == 8) high = i_repeat16(plane + LOW), high = _mm256_blend_epi32(high, i_srl16<2>(high), 0xf0);
        else high = i_load(plane + LOW), high = i == 0 ? high : i_srl16<2>(high);
        I first = i_or(i_and(low, nibble), i_sll16<4>(i_and(high, two))), second = i_and_or(high, upper, i_and(i_srl16<4>(low), nibble));
        if constexpr (COUNT == 16) first = _mm256_sub_epi8(first, i_set_bytes(32)), second = _mm256_sub_epi8(second, i_set_bytes(32));
        i_store(out + i, first);
        i_store(out + LOW + i, second);
    }
}

constexpr int CHUNK = 16;       // groups of weights that are expanded at a time; a multiple of 8
constexpr int PANEL_VECTORS = 2;

// Bytes of an expanded group of one tile: signed bytes are widened.
template <class Fmt> constexpr int panel_bytes() { return (Fmt::BITS >= 8 ? 2 : 1) * 8 * 4 * L; }
// Tokens up to which nothing is expanded for later.
template <class Fmt> constexpr int some_of() { return Fmt::BITS >= 8 ? 24 : 8; }

static inline I pairs(I w, I x) { return _mm256_maddubs_epi16(w, x); }
static inline I add16(I a, I b) { return _mm256_add_epi16(a, b); }
static inline I widen(I sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }
static inline I weigh16(I sums16, I weights) { return _mm256_madd_epi16(sums16, weights); }  // the same, each sum times its weight

// Steps whose 16-bit sums may be added before they are widened.
template <class Fmt> constexpr int steps_in_16() { return Fmt::BITS <= 4 ? 8 : Fmt::BITS == 5 ? 4 : 2; }

// Sum over steps FROM .. FROM + COUNT of expanded weights times a token's bytes, times `by` in 16 bits.
template <class Fmt, int FROM, int COUNT>
static inline I dot_steps(const I* w, const int8_t* x, I by) {
    I sum = i_zero();
    if constexpr (Fmt::BITS >= 8) {
        for (int j = FROM; j < FROM + COUNT; j++)
            sum = i_add(sum, weigh16(pairs(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(i_broadcast4(x + 4 * j), w[j])), by));
    } else {
        constexpr int RUN = steps_in_16<Fmt>() < COUNT ? steps_in_16<Fmt>() : COUNT;
        for (int from = FROM; from < FROM + COUNT; from += RUN) {
            I run = pairs(w[from], i_broadcast4(x + 4 * from));
            for (int j = from + 1; j < from + RUN; j++) run = add16(run, pairs(w[j], i_broadcast4(x + 4 * j)));
            sum = from == FROM ? weigh16(run, by) : i_add(sum, weigh16(run, by));
        }
    }
    return sum;
}

// Bytes of the rows into their lanes: of row 0 byte `a` goes to the lane's lowest byte, `d` to its highest, of row r the r-th after it;
// -1 gives a zero.
template <int a, int b, int c, int d>
static inline I spread(I scales) {
    constexpr auto at = [](int byte, int row) { return static_cast<char>(byte < 0 ? -128 : byte + row); };
    return _mm256_shuffle_epi8(scales, _mm256_setr_epi8(
        at(a, 0), at(b, 0), at(c, 0), at(d, 0), at(a, 1), at(b, 1), at(c, 1), at(d, 1), at(a, 2), at(b, 2), at(c, 2), at(d, 2), at(a, 3), at(b, 3), at(c, 3), at(d, 3),
        at(a, 4), at(b, 4), at(c, 4), at(d, 4), at(a, 5), at(b, 5), at(c, 5), at(d, 5), at(a, 6), at(b, 6), at(c, 6), at(d, 6), at(a, 7), at(b, 7), at(c, 7), at(d, 7)));
}

// What scales a group of one tile: where the block has one scale for 32 weights a float; where it has two, they are small integers
// that are multiplied in as sums of two become sums of four, so that a group is one exact integer times the block's d.
template <class Fmt>
struct GroupScales {
    static constexpr bool TWO = Fmt::SUBS == 2;
    static constexpr int Z = zero_of<Fmt>(), VECTORS = TWO ? Z ? 4 : 3 : 1;  // of L floats or word pairs, as `store` leaves them
    F scale;
    I by[2], zero;  // (scale, scale) of either half; (zero * scale, zero * scale) of both

    void read(const Scaling<Fmt>& scaling, int group) {
        if constexpr (TWO) {
            const I bytes = i_repeat16(scaling.integers(group));
            scale = scaling.d;
            if constexpr (Z == 0) {
                const I four = i_and(bytes, i_set_bytes(15));
                by[0] = spread<0, -1, 0, -1>(four), by[1] = spread<8, -1, 8, -1>(four);
            } else {  // signed: from a word's upper byte downwards
                by[0] = _mm256_srai_epi16(spread<-1, 0, -1, 0>(bytes), 8), by[1] = _mm256_srai_epi16(spread<-1, 8, -1, 8>(bytes), 8);
                zero = _mm256_srai_epi16(spread<-1, 0, -1, 8>(bytes), 8 - log2_of(Z));
            }
        } else {
            scale = scaling.scale(group, 0);
        }
    }
    void store(float* out) const {
        f_store(out, scale);
        if constexpr (TWO) i_store(out + L, by[0]), i_store(out + 2 * L, by[1]);
        if constexpr (TWO && Z != 0) i_store(out + 3 * L, zero);
    }
    // The scaled sum of group `g` for a token whose bytes begin at x, and its sums of integers at `sums`, or those of halves.
    F part(const I* w, const int8_t* x, const int32_t* sums, const int32_t* halves, int64_t g) const {
        I sum;
        if constexpr (TWO) {
            sum = i_add(dot_steps<Fmt, 0, 4>(w, x + g * 32, by[0]), dot_steps<Fmt, 4, 4>(w, x + g * 32, by[1]));
            if constexpr (Z != 0) sum = i_sub(sum, weigh16(zero, i_broadcast4(halves + g)));
        } else {
            sum = dot_steps<Fmt, 0, 8>(w, x + g * 32, _mm256_set1_epi16(1));
            if constexpr (Z != 0) sum = i_sub(sum, i_sll<log2_of(Z)>(i_broadcast4(sums + g)));
        }
        return f_mul(f_from_i(sum), scale);
    }
};

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

template <class Fmt> constexpr int tokens_of() { return Fmt::BITS == 5 || Fmt::BITS == 6 ? 3 : 4; }  // of a full micro-kernel: 16 registers

// P tiles times T tokens, steps FROM .. FROM + COUNT of a group: exact sums, times the words at `by` where the block has two scales.
template <class Fmt, int P, int T, int FROM, int COUNT>
static inline void group_sums(const uint8_t* w, const int8_t* const* q, const int16_t (*wide)[CHUNK * 32], int g, const float* by, I (*sum)[T]) {
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
            for (int p = 0; p < P; p++) {
                const I weights = Fmt::SUBS == 2 ? i_load(by + p * CHUNK * GroupScales<Fmt>::VECTORS * L) : _mm256_set1_epi16(1);
                for (int t = 0; t < T; t++) {
                    const I four = weigh16(run[p][t], weights);
                    sum[p][t] = from == 0 ? four : i_add(sum[p][t], four);
                }
            }
        }
    }
}

// P tiles times T tokens over one chunk: y[T][P] in memory is added to. `panel` [P][CHUNK][..], `scales` [P][CHUNK][VECTORS][L],
// `mins` [P][CHUNK][SUBS][L].
template <class Fmt, int P, int T>
static void micro(const uint8_t* panel, const float* scales, const float* mins, int groups, const Activations& x, int64_t token, int64_t group0,
                  float* out, int stride) {
    constexpr int S = Fmt::SUBS, Z = zero_of<Fmt>(), V = GroupScales<Fmt>::VECTORS;
    const int8_t* q[T];
    const float *sx[T], *lows[T];
    const int32_t* halves[T];
    alignas(32) int32_t zeros[Z && S == 1 ? T : 1][CHUNK];  // zero * sum of x
    alignas(32) int16_t wide[Fmt::BITS >= 8 ? T : 1][CHUNK * 32];
    for (int t = 0; t < T; t++) {
        const int64_t row = x.row(token + t), at = row * (x.columns / 32) + group0;
        q[t] = x.q + row * x.columns + group0 * 32;
        sx[t] = x.scales + at;
        halves[t] = x.halves + at;
        lows[t] = S == 2 ? x.half_lows + 2 * at : x.lows + at;
        if constexpr (Z != 0 && S == 1)
            for (int i = 0; i < groups; i++) zeros[t][i] = Z * x.sums[at + i];
        if constexpr (Fmt::BITS >= 8)
            for (int i = 0; i < groups * 32; i += 32) {  // 16 words of each kind
                const I bytes = i_load(q[t] + i);
                i_store(&wide[t][i], even_words(bytes)), i_store(&wide[t][i + 16], odd_words(bytes));
            }
    }
    for (int g = 0; g < groups; g++, scales += V * L, mins += S * L) {
        const uint8_t* w = panel + g * panel_bytes<Fmt>();
        I sum[P][T];
        if constexpr (S == 1) {
            group_sums<Fmt, P, T, 0, 8>(w, q, wide, g, nullptr, sum);
        } else {
            group_sums<Fmt, P, T, 0, 4>(w, q, wide, g, scales + L, sum);
            group_sums<Fmt, P, T, 4, 4>(w, q, wide, g, scales + 2 * L, sum);
        }
        for (int t = 0; t < T; t++) {
            const F scale_x = f_set(sx[t][g]);
            for (int p = 0; p < P; p++) {
                const float* of_tile = scales + p * CHUNK * V * L;
                if constexpr (Z != 0 && S == 1) sum[p][t] = i_sub(sum[p][t], i_set(zeros[t][g]));
                if constexpr (Z != 0 && S == 2) sum[p][t] = i_sub(sum[p][t], weigh16(i_load(of_tile + 3 * L), i_set(halves[t][g])));
                float* place = out + t * stride + p * L;
                F y = f_fma(f_mul(f_from_i(sum[p][t]), f_load(of_tile)), scale_x, f_load(place));
                if (Fmt::MIN)
                    for (int s = 0; s < S; s++) y = f_fnma(f_load(mins + (p * CHUNK * S + s) * L), f_set(lows[t][g * S + s]), y);
                f_store(place, y);
            }
        }
    }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
