// The innermost products for sets whose instruction multiplies bytes and adds four of them at once (VNNI, Arm's dot product).
// The order of every float operation of a row and token is the same in all of a set's files: for each group of 32,
// y += scale_x * (scale_w * sum), then y -= min * (scale_x * sum of x). Where a group has two scales, scale_w * sum is two products
// here, and one integer in micro_avx2.h: these formats' last bits differ from set to set.
#ifndef QWEN2_MICRO_DOT_H
#define QWEN2_MICRO_DOT_H

#include "activations.h"
#include "tile.h"

namespace qwen2 {
namespace QWEN2_ISA {

// Sum over steps FROM .. FROM + COUNT of expanded weights times a token's bytes; x at the group's first.
template <class Fmt, int FROM, int COUNT>
static inline I dot_steps(const I* w, const int8_t* x) {
    I even = i_zero(), odd = i_zero();
    for (int j = FROM; j < FROM + COUNT; j += 2) {
        even = dot_bytes(even, w[j], step_of(x, j));
        odd = dot_bytes(odd, w[j + 1], step_of(x, j + 1));
    }
    return i_add(even, odd);
}

// What scales a group of one tile.
template <class Fmt>
struct GroupScales {
    static constexpr int VECTORS = Fmt::SUBS;  // of L floats, as `store` leaves them
    F scale[Fmt::SUBS];

    void read(const Scaling<Fmt>& scaling, int group) {
        for (int s = 0; s < Fmt::SUBS; s++) scale[s] = scaling.scale(group, s);
    }
    void store(float* out) const {
        for (int s = 0; s < Fmt::SUBS; s++) f_store(out + s * L, scale[s]);
    }
    // The scaled sum of group `g` for a token whose bytes begin at x and whose sums of integers at `sums`.
    F part(const I* w, const int8_t* x, const int32_t* sums, const int32_t*, int64_t g) const {
        constexpr int Z = zero_of<Fmt>(), S = Fmt::SUBS;
        F part = f_zero();
        for (int s = 0; s < S; s++) {
            I sum = S == 1 ? dot_steps<Fmt, 0, 8>(w, x + g * 32) : s == 0 ? dot_steps<Fmt, 0, 4>(w, x + g * 32) : dot_steps<Fmt, 4, 4>(w, x + g * 32);
            if (Z) sum = i_sub(sum, i_sll<log2_of(Z)>(i_broadcast4(sums + g * S + s)));
            part = s == 0 ? f_mul(f_from_i(sum), scale[s]) : f_fma(f_from_i(sum), scale[s], part);
        }
        return part;
    }
};

constexpr int CHUNK = 16;       // groups of weights that are expanded at a time; a multiple of 8
constexpr int PANEL_VECTORS = 2;
template <class Fmt> constexpr int panel_bytes() { return 8 * 4 * L; }  // of an expanded group of one tile

// What a group of one tile looks like when it is expanded for many tokens.
template <class Fmt>
static inline void expand_to(const uint8_t* quants, uint8_t* out) {
    I w[8];
    expand<Fmt>(quants, w);
    for (int j = 0; j < 8; j++) i_store(out + j * 4 * L, w[j]);
}

// Sums of up to T tokens as a micro-kernel needs them, for one chunk.
template <class Fmt, int T>
struct Corrections {
    alignas(64) int32_t zeros[T][CHUNK * Fmt::SUBS + L];  // -zero * sum of x
    const float* lows[T];                                 // scale_x * sum of x

    void prepare(const Activations& x, int64_t first_token, int tokens, int64_t first_group, int groups) {
        for (int t = 0; t < tokens; t++) {
            const int64_t at = x.row(first_token + t) * (x.columns / 32) + first_group;
            const int32_t* sums = Fmt::SUBS == 2 ? x.half_sums + 2 * at : x.sums + at;
            lows[t] = Fmt::SUBS == 2 ? x.half_lows + 2 * at : x.lows + at;
            if (zero_of<Fmt>() != 0)
                for (int i = 0; i < groups * Fmt::SUBS; i++) zeros[t][i] = -zero_of<Fmt>() * sums[i];
        }
    }
};

// P tiles times T tokens over one chunk: y[T][P] is read, added to and written. `panel` [P][CHUNK][8][4L] expanded weights,
// `scales` and `mins` [P][CHUNK][SUBS][L].
template <class Fmt, int P, int T>
static void micro(const uint8_t* panel, const float* scales, const float* mins, int groups, const Activations& x, int64_t token, int64_t group0,
                  float* out, int stride) {
    constexpr int S = Fmt::SUBS;
    Corrections<Fmt, T> corrections;
    corrections.prepare(x, token, T, group0, groups);
    const int8_t* q[T];
    const float* sx[T];
    F y[P][T];
    for (int t = 0; t < T; t++) {
        const int64_t row = x.row(token + t);
        q[t] = x.q + row * x.columns + group0 * 32;
        sx[t] = x.scales + row * (x.columns / 32) + group0;
        for (int p = 0; p < P; p++) y[p][t] = f_load(out + t * stride + p * L);
    }
    for (int g = 0; g < groups; g++) {
        const uint8_t* w = panel + g * panel_bytes<Fmt>();
        F part[P][T];
        for (int s = 0; s < S; s++) {
            I sum[P][T];
            for (int t = 0; t < T; t++)
                for (int p = 0; p < P; p++) sum[p][t] = zero_of<Fmt>() ? i_set(corrections.zeros[t][g * S + s]) : i_zero();
#pragma GCC unroll 8
            for (int j = s * 8 / S; j < (s + 1) * 8 / S; j++) {
                I vector[P];
                for (int p = 0; p < P; p++) vector[p] = i_load(w + p * CHUNK * panel_bytes<Fmt>() + j * 4 * L);
                for (int t = 0; t < T; t++) {
                    const auto bytes = step_of(q[t] + g * 32, j);
                    for (int p = 0; p < P; p++) sum[p][t] = dot_bytes(sum[p][t], vector[p], bytes);
                }
            }
            for (int p = 0; p < P; p++) {
                const F scale = f_load(scales + ((p * CHUNK + g) * S + s) * L);
                for (int t = 0; t < T; t++) {
                    const F f = f_from_i(sum[p][t]);
                    part[p][t] = s == 0 ? f_mul(f, scale) : f_fma(f, scale, part[p][t]);
                }
            }
        }
        for (int t = 0; t < T; t++) {
            const F scale = f_set(sx[t][g]);
            for (int p = 0; p < P; p++) y[p][t] = f_fma(part[p][t], scale, y[p][t]);
        }
        if (Fmt::MIN)
            for (int s = 0; s < S; s++)
                for (int p = 0; p < P; p++) {
                    const F min = f_load(mins + ((p * CHUNK + g) * S + s) * L);
                    for (int t = 0; t < T; t++) y[p][t] = f_fnma(min, f_set(corrections.lows[t][g * S + s]), y[p][t]);
                }
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < P; p++) f_store(out + t * stride + p * L, y[p][t]);
}

template <class Fmt> constexpr int tokens_of() { return Fmt::SUBS == 2 ? 4 : 6; }  // of a full micro-kernel: what the registers hold

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
