// Several tokens times two tiles at once: too few tokens to expand a chunk of weights for, too many for their sums to lie in registers
// beside a whole group. One group is expanded at a time, and eight tokens pass over it step by step. For the sets of micro_dot.h,
// with its order of operations.
#ifndef QWEN2_PAIRS_H
#define QWEN2_PAIRS_H

#include "micro_dot.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int SEVERAL = 8;  // tokens from which on two tiles are taken at once
constexpr int SOME = 40;    // tokens up to which nothing is expanded for later
constexpr int A_PASS = 8;   // tokens: with two tiles 16 sums, beside a step of weights

template <class Fmt> constexpr int some_of() { return SOME; }

// Two tiles' group, expanded, and what follows from its unit.
template <class Fmt>
struct GroupOfTwo {
    alignas(64) uint8_t w[2][8][4 * L];
    F scale[2][Fmt::SUBS], min[2][Fmt::SUBS];

    void read(int p, const Scaling<Fmt>& scaling, int group, const uint8_t* quants) {
        expand_to<Fmt>(quants, w[p][0]);
        for (int s = 0; s < Fmt::SUBS; s++) {
            scale[p][s] = scaling.scale(group, s);
            if (Fmt::MIN) min[p][s] = scaling.min(group, s);
        }
    }
};

// A group of T tokens, whose bytes and scales begin at q[t] and sx[t]: added to out[t][P] in memory.
template <class Fmt, int T>
static inline void pass(const GroupOfTwo<Fmt>& two, const int8_t* const* q, const float* const* sx, int64_t g, const Corrections<Fmt, SOME>& corrections,
                        int first, int at, float* out, int stride) {
    constexpr int S = Fmt::SUBS;
    F part[2][T];
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
        I sum[2][T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            for (int p = 0; p < 2; p++) sum[p][t] = zero_of<Fmt>() ? i_set(corrections.zeros[first + t][at + s]) : i_zero();
#pragma GCC unroll 8
        for (int j = s * 8 / S; j < (s + 1) * 8 / S; j++) {
            const I a = i_load(two.w[0][j]), b = i_load(two.w[1][j]);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const auto bytes = step_of(q[t] + g * 32, j);
                sum[0][t] = dot_bytes(sum[0][t], a, bytes), sum[1][t] = dot_bytes(sum[1][t], b, bytes);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            for (int p = 0; p < 2; p++) {
                const F f = f_from_i(sum[p][t]);
                part[p][t] = s == 0 ? f_mul(f, two.scale[p][s]) : f_fma(f, two.scale[p][s], part[p][t]);
            }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
        for (int p = 0; p < 2; p++) {
            float* place = out + t * stride + p * L;
            F y = f_fma(part[p][t], f_set(sx[t][g]), f_load(place));
            if (Fmt::MIN)
                for (int s = 0; s < S; s++) y = f_fnma(two.min[p][s], f_set(corrections.lows[first + t][at + s]), y);
            f_store(place, y);
        }
}

template <class Fmt, int T>
static inline void rest_of_pass(int left, const GroupOfTwo<Fmt>& two, const int8_t* const* q, const float* const* sx, int64_t g,
                                const Corrections<Fmt, SOME>& corrections, int first, int at, float* out, int stride) {
    if (left == T) pass<Fmt, T>(two, q, sx, g, corrections, first, at, out, stride);
    else if constexpr (T > 1) rest_of_pass<Fmt, T - 1>(left, two, q, sx, g, corrections, first, at, out, stride);
}

// Two neighbouring tiles times n tokens, at most SOME: each group is expanded once, used by all tokens at once and forgotten.
template <class Fmt>
static void several_tokens(const uint8_t* tile, const Activations& x, int n, float* out, int stride, int ahead) {
    const int64_t groups = x.columns / 32, tile_bytes = groups / Fmt::GROUPS * Unit<Fmt>::BYTES;
    const int8_t* q[SOME];
    const float* sx[SOME];
    for (int t = 0; t < n; t++) {
        const int64_t row = x.row(t);
        q[t] = x.q + row * x.columns, sx[t] = x.scales + row * groups;
        for (int p = 0; p < 2; p++) f_store(out + t * stride + p * L, f_zero());
    }
    Corrections<Fmt, SOME> corrections;
    GroupOfTwo<Fmt> two;
    for (int64_t g = 0; g < groups; tile += Unit<Fmt>::BYTES) {
        if (g % CHUNK == 0) corrections.prepare(x, 0, n, g, static_cast<int>(groups - g < CHUNK ? groups - g : CHUNK));
        const Scaling<Fmt> first(tile), second(tile + tile_bytes);
        for (int group = 0; group < Fmt::GROUPS; group++, g++) {
            const uint8_t* quants = tile + Unit<Fmt>::QUANTS + group * Unit<Fmt>::GROUP;
            for (int line = 0; line < Unit<Fmt>::GROUP; line += 64) prefetch(quants + ahead + line), prefetch(quants + tile_bytes + ahead + line);
            two.read(0, first, group, quants);
            two.read(1, second, group, quants + tile_bytes);
            const int at = static_cast<int>(g % CHUNK) * Fmt::SUBS;
            int t = 0;
            for (; t + A_PASS <= n; t += A_PASS) pass<Fmt, A_PASS>(two, q + t, sx + t, g, corrections, t, at, out + t * stride, stride);
            rest_of_pass<Fmt, A_PASS - 1>(n - t, two, q + t, sx + t, g, corrections, t, at, out + t * stride, stride);
        }
    }
}

// The tiles of a panel that were multiplied so, of n <= SOME tokens; `ahead` bytes are fetched before they are needed.
template <class Fmt>
static int several_tiles(const uint8_t* first, int tiles, const Activations& x, int n, float* out, int stride, int ahead) {
    int done = 0;
    if (n >= SEVERAL)
        for (; done + 2 <= tiles; done += 2)
            several_tokens<Fmt>(first + done * (x.columns / Fmt::BLOCK * Unit<Fmt>::BYTES), x, n, out + done * L, stride, ahead);
    return done;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
