// Products with weights that are floating-point numbers: tiles are [column][row], every row and token is one chain of fused
// multiply-adds over the columns in order, whatever the number of tokens. Where many tokens pass over weights of 16 bits, these are
// widened once into the cache, not for every few tokens again.
#ifndef QWEN2_FLOAT_PRODUCT_H
#define QWEN2_FLOAT_PRODUCT_H

#include "product.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int FLOAT_TILES = L == 4 ? 4 : 2, FLOAT_TOKENS = L == 4 ? 4 : 6;  // of a micro-kernel: what the registers hold
constexpr int FEW_FLOATS = L == 8 ? 2 : 0;  // tokens whose sums of a whole panel they hold: with two tiles an addition waits for the last
constexpr int FLOAT_COLUMNS = 256;          // of a chunk that stays in the cache while the tokens pass
// Tokens from which on 16 bits are widened once for all: 91 to 107 GFLOP/s with AVX-512 on Zen 4, where AVX2 widens beside its products
// and gains a hundredth or two from long prompts alone.
constexpr int WIDENED = (L == 16 ? 4 : 16) * FLOAT_TOKENS;

template <Type TYPE> constexpr int float_bytes() { return TYPE == F32 ? 4 : 2; }

template <Type TYPE>
static inline F load_weights(const uint8_t* p) {
    if constexpr (TYPE == F32) return f_load(reinterpret_cast<const float*>(p));
    else if constexpr (TYPE == F16) return f_load_half(reinterpret_cast<const uint16_t*>(p));
    else return f_load_bf16(reinterpret_cast<const uint16_t*>(p));
}

// P tiles, given from column `from` on, times T tokens over columns from .. to.
template <Type TYPE, int P, int T>
static void float_micro(const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t token, int64_t from, int64_t to, float* out) {
    constexpr int W = L * float_bytes<TYPE>();
    const float* xs[T];
    F y[P][T];
    for (int t = 0; t < T; t++) {
        xs[t] = x.x + x.row(token + t) * x.stride;
        for (int p = 0; p < P; p++) y[p][t] = from == 0 ? f_zero() : f_load(out + t * PANEL + p * L);
    }
#pragma GCC unroll 4
    for (int64_t k = from; k < to; k++, tiles += W) {
        F w[P];
        for (int p = 0; p < P; p++) {
            w[p] = load_weights<TYPE>(tiles + p * tile_bytes);
            if (L > 4 && P <= FLOAT_TILES) prefetch(tiles + p * tile_bytes + AHEAD);
        }
        for (int t = 0; t < T; t++) {
            const F xk = f_set(xs[t][k]);
            for (int p = 0; p < P; p++) y[p][t] = f_fma(w[p], xk, y[p][t]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int p = 0; p < P; p++) f_store(out + t * PANEL + p * L, y[p][t]);
}

template <Type TYPE, int P, int T>
static void float_micro_of(int64_t left, const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t token, int64_t from, int64_t to,
                           float* out) {
    if (left >= T) float_micro<TYPE, P, T>(tiles, tile_bytes, x, token, from, to, out);
    else if constexpr (T > 1) float_micro_of<TYPE, P, T - 1>(left, tiles, tile_bytes, x, token, from, to, out);
}

// P tiles times n tokens; `wide` has room for FLOAT_COLUMNS columns of the tiles in fp32, or is nullptr.
template <Type TYPE, int P, int T>
static void float_tiles(const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t n, float* out, float* wide) {
    constexpr int W = L * float_bytes<TYPE>();
    if (x.columns == 0)
        for (int64_t t = 0; t < n; t++)
            for (int p = 0; p < P; p++) f_store(out + t * PANEL + p * L, f_zero());
    const int64_t step = n <= T ? x.columns : FLOAT_COLUMNS;
    for (int64_t k = 0; k < x.columns; k += step) {
        const int64_t to = k + step < x.columns ? k + step : x.columns;
        if (wide != nullptr)
            for (int p = 0; p < P; p++)
                for (int64_t i = k; i < to; i++) f_store(wide + (p * FLOAT_COLUMNS + i - k) * L, load_weights<TYPE>(tiles + p * tile_bytes + i * W));
        for (int64_t t = 0; t < n; t += T) {
            if (wide == nullptr) float_micro_of<TYPE, P, T>(n - t, tiles + k * W, tile_bytes, x, t, k, to, out + t * PANEL);
            else float_micro_of<F32, P, T>(n - t, reinterpret_cast<const uint8_t*>(wide), FLOAT_COLUMNS * L * 4, x, t, k, to, out + t * PANEL);
        }
    }
}

// Rows first_row .. first_row + PANEL times n tokens, as `quantized_panel`.
template <Type TYPE>
static bool float_panel(const uint8_t* packed, int64_t rows, int64_t first_row, const Activations& x, int64_t n, float* out, int thread) {
    const int64_t tile_bytes = x.columns * L * float_bytes<TYPE>(), left = (rows - first_row + L - 1) / L;
    const int tiles = static_cast<int>(left < TILES ? left : TILES);
    const uint8_t* first = packed + first_row / L * tile_bytes;
    float* wide = nullptr;
    if (TYPE != F32 && n >= WIDENED) {
        wide = static_cast<float*>(scratch(thread, PANEL_MEMORY, FLOAT_TILES * FLOAT_COLUMNS * L * sizeof(float)));
        if (wide == nullptr) return false;
    }
    int i = 0;
    if constexpr (FEW_FLOATS > 0)
        if (n <= FEW_FLOATS)
            for (; i + TILES <= tiles; i += TILES) float_tiles<TYPE, TILES, FEW_FLOATS>(first + i * tile_bytes, tile_bytes, x, n, out + i * L, nullptr);
    for (; i + FLOAT_TILES <= tiles; i += FLOAT_TILES)
        float_tiles<TYPE, FLOAT_TILES, FLOAT_TOKENS>(first + i * tile_bytes, tile_bytes, x, n, out + i * L, wide);
    for (; i < tiles; i++) float_tiles<TYPE, 1, FLOAT_TOKENS>(first + i * tile_bytes, tile_bytes, x, n, out + i * L, wide);
    return true;
}

template <Type TYPE>
static void pack_float_tile(const uint8_t* in, int64_t row_bytes, int rows, int64_t columns, uint8_t* out) {
    constexpr int B = float_bytes<TYPE>();
    for (int64_t k = 0; k < columns; k++)
        for (int row = 0; row < L; row++, out += B) {
            if (row < rows) __builtin_memcpy(out, in + row * row_bytes + k * B, B);
            else __builtin_memset(out, 0, B);
        }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
