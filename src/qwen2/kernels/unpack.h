// Packed matrices back to numbers: any rows, or all of a tile at once, in fp32, bit-equal to what the file's blocks mean.
#ifndef QWEN2_UNPACK_H
#define QWEN2_UNPACK_H

#include "float_product.h"

namespace qwen2 {
namespace QWEN2_ISA {

template <class Fmt>
static void unpack_row(const uint8_t* tile, int row, int64_t units, float* out) {
    constexpr int S = Fmt::SUBS, Z = zero_of<Fmt>();
    for (int64_t unit = 0; unit < units; unit++, tile += Unit<Fmt>::BYTES) {
        const Scaling<Fmt> scaling(tile);
        for (int g = 0; g < Fmt::GROUPS; g++) {
            alignas(64) uint8_t bytes[8][4 * L];
            alignas(64) float scale[L], min[L];
            I w[8];
            expand<Fmt>(tile + Unit<Fmt>::QUANTS + g * Unit<Fmt>::GROUP, w);
            for (int j = 0; j < 8; j++) i_store(bytes[j], w[j]);
            for (int s = 0; s < S; s++) {
                f_store(scale, scaling.scale(g, s));
                if (Fmt::MIN) f_store(min, scaling.min(g, s));
                for (int i = 32 / S * s; i < 32 / S * (s + 1); i++) {
                    const uint8_t byte = bytes[i / 4][4 * row + i % 4];
                    const int q = Fmt::BITS >= 8 && Z == 0 ? static_cast<int8_t>(byte) : byte - Z;
                    const float v = scale[row] * static_cast<float>(q);
                    *out++ = Fmt::MIN ? v - min[row] : v;
                }
            }
        }
    }
}

template <class Fmt>
static void unpack_quantized(const uint8_t* packed, int64_t columns, int64_t row, float* out) {
    const int64_t units = columns / Fmt::BLOCK;
    unpack_row<Fmt>(packed + row / L * units * Unit<Fmt>::BYTES, static_cast<int>(row % L), units, out);
}

template <Type TYPE>
static void unpack_floats(const uint8_t* packed, int64_t columns, int64_t row, float* out) {
    constexpr int B = float_bytes<TYPE>();
    const uint8_t* p = packed + (row / L * columns * L + row % L) * B;
    for (int64_t k = 0; k < columns; k++, p += L * B) {
        if constexpr (TYPE == F32) {
            __builtin_memcpy(out + k, p, 4);
        } else if constexpr (TYPE == F16) {
            alignas(64) uint16_t halves[L] = {word(p)};
            alignas(64) float wide[L];
            f_store(wide, f_load_half(halves));
            out[k] = wide[0];
        } else {
            const uint32_t bits = static_cast<uint32_t>(word(p)) << 16;
            __builtin_memcpy(out + k, &bits, 4);
        }
    }
}

// 32 columns of a tile, [column][row], as rows of `columns` numbers.
static inline void store_rows(const float (*numbers)[L], int count, int64_t columns, float* out) {
    for (int row = 0; row < L; row++)
        for (int i = 0; i < count; i++) out[row * columns + i] = numbers[i][row];
}

// All rows of a tile: each group is expanded once for all, and columns are computed as vectors, by the same operations.
template <class Fmt>
static void unpack_quantized_tile(const uint8_t* packed, int64_t columns, int64_t tile, float* out) {
    constexpr int S = Fmt::SUBS, Z = zero_of<Fmt>();
    const int64_t units = columns / Fmt::BLOCK;
    const uint8_t* p = packed + tile * units * Unit<Fmt>::BYTES;
    for (int64_t unit = 0; unit < units; unit++, p += Unit<Fmt>::BYTES) {
        const Scaling<Fmt> scaling(p);
        for (int g = 0; g < Fmt::GROUPS; g++, out += 32) {
            alignas(64) float numbers[32][L];
            I w[8];
            expand<Fmt>(p + Unit<Fmt>::QUANTS + g * Unit<Fmt>::GROUP, w);
            for (int i = 0; i < 32; i++) {
                const int s = i / (32 / S);
                I q = i_and(i_srl_by(w[i / 4], i % 4 * 8), i_set(0xff));
                if (Fmt::BITS >= 8 && Z == 0) q = i_sub(i_xor(q, i_set(0x80)), i_set(0x80));  // a signed byte
                else q = i_sub(q, i_set(Z));
                const F v = f_mul(scaling.scale(g, s), f_from_i(q));
                f_store(numbers[i], Fmt::MIN ? f_sub(v, scaling.min(g, s)) : v);
            }
            store_rows(numbers, 32, columns, out);
        }
    }
}

template <Type TYPE>
static void unpack_float_tile(const uint8_t* packed, int64_t columns, int64_t tile, float* out) {
    constexpr int W = L * float_bytes<TYPE>();
    const uint8_t* p = packed + tile * columns * W;
    for (int64_t k = 0; k < columns; k += 32) {
        alignas(64) float numbers[32][L];
        const int count = static_cast<int>(columns - k < 32 ? columns - k : 32);
        for (int i = 0; i < count; i++, p += W) f_store(numbers[i], load_weights<TYPE>(p));
        store_rows(numbers, count, columns, out + k);
    }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
