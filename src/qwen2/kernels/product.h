// A panel of 32 output rows times the tokens of a step. One to a few tokens: quants are expanded in registers and used at once.
// Some more: see pairs.h, on sets that have it. Many: a chunk of the panel is expanded into the cache, and blocks of tokens pass over
// it. All give the same bits.
#ifndef QWEN2_PRODUCT_H
#define QWEN2_PRODUCT_H

#include "kernels.h"
#include "pool.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int PANEL = 32;            // rows
constexpr int TILES = PANEL / L;     // of a full panel
constexpr int FEW = 8;               // tokens that share one expansion of a group of weights in registers
constexpr int FETCHES = 16;          // of a chunk's bytes, one for each few tokens
constexpr int AHEAD = 4096;          // bytes between what is computed with and what is fetched

// y[t][L] of one tile for T tokens from `token` on.
template <class Fmt, int T>
static void few_tokens(const uint8_t* tile, const Activations& x, int64_t token, float* out) {
    constexpr int S = Fmt::SUBS;
    const int64_t units = x.columns / Fmt::BLOCK;
    const int8_t* q[T];
    const float* sx[T];
    const int32_t *sums[T], *halves[T];
    const float* lows[T];
    F y[T];
    for (int t = 0; t < T; t++) {
        const int64_t row = x.row(token + t), groups = x.columns / 32;
        q[t] = x.q + row * x.columns, sx[t] = x.scales + row * groups;
        sums[t] = S == 2 ? x.half_sums + 2 * row * groups : x.sums + row * groups;
        halves[t] = x.halves + row * groups;
        lows[t] = S == 2 ? x.half_lows + 2 * row * groups : x.lows + row * groups;
        y[t] = f_zero();
    }
    int64_t g = 0;
    for (int64_t unit = 0; unit < units; unit++, tile += Unit<Fmt>::BYTES) {
        const Scaling<Fmt> scaling(tile);
        for (int group = 0; group < Fmt::GROUPS; group++, g++) {
            const uint8_t* quants = tile + Unit<Fmt>::QUANTS + group * Unit<Fmt>::GROUP;
            for (int line = 0; line < Unit<Fmt>::GROUP; line += 64) prefetch(quants + AHEAD + line);
            I w[8];
            expand<Fmt>(quants, w);
            GroupScales<Fmt> scales;
            scales.read(scaling, group);
            F min[S];
            if (Fmt::MIN)
                for (int s = 0; s < S; s++) min[s] = scaling.min(group, s);
#pragma GCC unroll 16  // otherwise the sums of many tokens lie in memory
            for (int t = 0; t < T; t++) {
                const F part = scales.part(w, q[t], sums[t], halves[t], g);
                y[t] = f_fma(part, f_set(sx[t][g]), y[t]);
                if (Fmt::MIN)
                    for (int s = 0; s < S; s++) y[t] = f_fnma(min[s], f_set(lows[t][g * S + s]), y[t]);
            }
        }
    }
    for (int t = 0; t < T; t++) f_store(out + t * PANEL, y[t]);
}

template <class Fmt, int T>
static void some_tokens(const uint8_t* tile, const Activations& x, int64_t token, int left, float* out) {
    if (left == T) few_tokens<Fmt, T>(tile, x, token, out);
    else if constexpr (T > 1) some_tokens<Fmt, T - 1>(tile, x, token, left, out);
}

template <class Fmt, int P, int T>
static void micro_of(int left, const uint8_t* panel, const float* scales, const float* mins, int groups, const Activations& x, int64_t token,
                     int64_t group0, float* out) {
    if (left >= T) micro<Fmt, P, T>(panel, scales, mins, groups, x, token, group0, out, PANEL);
    else if constexpr (T > 1) micro_of<Fmt, P, T - 1>(left, panel, scales, mins, groups, x, token, group0, out);
}

// One of `parts` parts of a tile's groups `from` .. `to` into the cache.
template <class Fmt>
static inline void fetch(const uint8_t* tile, int64_t from, int64_t to, int64_t part, int64_t parts) {
    const int64_t begin = from / Fmt::GROUPS * Unit<Fmt>::BYTES / 64, lines = (to / Fmt::GROUPS * Unit<Fmt>::BYTES + 63) / 64 - begin;
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; line++) prefetch(tile + (begin + line) * 64);
}

// P neighbouring tiles times many tokens, from column 0 of `out` [n][PANEL].
template <class Fmt, int P>
static bool many_tokens(const uint8_t* tiles, const Activations& x, int64_t n, float* out, int thread) {
    constexpr int S = Fmt::SUBS, T = tokens_of<Fmt>();
    const int64_t groups = x.columns / 32, tile_bytes = groups / Fmt::GROUPS * Unit<Fmt>::BYTES;
    constexpr size_t quants_size = PANEL_VECTORS * CHUNK * panel_bytes<Fmt>(), scales_size = PANEL_VECTORS * CHUNK * 4 * L * sizeof(float);
    uint8_t* panel = static_cast<uint8_t*>(scratch(thread, PANEL_MEMORY, quants_size + 2 * scales_size));
    if (panel == nullptr) return false;
    float* scales = reinterpret_cast<float*>(panel + quants_size);
    float* mins = scales + scales_size / sizeof(float);
    for (int64_t t = 0; t < n; t++)
        for (int p = 0; p < P; p++) f_store(out + t * PANEL + p * L, f_zero());
    for (int64_t group0 = 0; group0 < groups; group0 += CHUNK) {
        const int count = static_cast<int>(groups - group0 < CHUNK ? groups - group0 : CHUNK);
        for (int p = 0; p < P; p++)
            for (int g = 0; g < count; g += Fmt::GROUPS) {
                const uint8_t* unit = tiles + p * tile_bytes + (group0 + g) / Fmt::GROUPS * Unit<Fmt>::BYTES;
                const Scaling<Fmt> scaling(unit);
                for (int group = 0; group < Fmt::GROUPS; group++) {
                    const int at = p * CHUNK + g + group;
                    expand_to<Fmt>(unit + Unit<Fmt>::QUANTS + group * Unit<Fmt>::GROUP, panel + at * panel_bytes<Fmt>());
                    GroupScales<Fmt> of_group;
                    of_group.read(scaling, group);
                    of_group.store(scales + at * GroupScales<Fmt>::VECTORS * L);
                    if (Fmt::MIN)
                        for (int s = 0; s < S; s++) f_store(mins + (at * S + s) * L, scaling.min(group, s));
                }
            }
        // While computing, the memory is free to bring what comes next, some lines at a time: the next groups, or the next tiles' first.
        const int64_t from = group0 + CHUNK < groups ? group0 + CHUNK : 0, to = from + CHUNK < groups ? from + CHUNK : groups;
        const uint8_t* next = tiles + (from ? 0 : P) * tile_bytes;
        const int64_t parts = (n + T - 1) / T < FETCHES ? (n + T - 1) / T : FETCHES;
        for (int64_t t = 0, part = 0; t < n; t += T, part++) {
            for (int p = 0; p < P && part < parts; p++) fetch<Fmt>(next + p * tile_bytes, from, to, part, parts);
            micro_of<Fmt, P, T>(static_cast<int>(n - t < T ? n - t : T), panel, scales, mins, count, x, t, group0, out + t * PANEL);
        }
    }
    return true;
}

// Rows first_row .. first_row + PANEL (or the matrix's end) times n tokens: out [n][PANEL]. False where there is no memory.
template <class Fmt>
static bool quantized_panel(const uint8_t* packed, int64_t rows, int64_t first_row, const Activations& x, int64_t n, float* out, int thread) {
    const int64_t tile_bytes = x.columns / Fmt::BLOCK * Unit<Fmt>::BYTES, left = (rows - first_row + L - 1) / L;
    const int tiles = static_cast<int>(left < TILES ? left : TILES);
    const uint8_t* first = packed + first_row / L * tile_bytes;
    if (n <= some_of<Fmt>()) {
        for (int i = several_tiles<Fmt>(first, tiles, x, static_cast<int>(n), out, PANEL, AHEAD); i < tiles; i++)
            for (int64_t t = 0; t < n; t += FEW)
                some_tokens<Fmt, FEW>(first + i * tile_bytes, x, t, static_cast<int>(n - t < FEW ? n - t : FEW), out + t * PANEL + i * L);
        return true;
    }
    int i = 0;
    for (; i + 2 <= tiles; i += 2)
        if (!many_tokens<Fmt, 2>(first + i * tile_bytes, x, n, out + i * L, thread)) return false;
    return i == tiles || many_tokens<Fmt, 1>(first + i * tile_bytes, x, n, out + i * L, thread);
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
