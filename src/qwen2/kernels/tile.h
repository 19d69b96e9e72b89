// Tiles of L rows (formats.h): packing blocks into them, and reading scales and quants out of them in vectors.
#ifndef QWEN2_TILE_H
#define QWEN2_TILE_H

#include "formats.h"

namespace qwen2 {
namespace QWEN2_ISA {

// Where the parts of a tile's unit begin, in bytes.
template <class Fmt>
struct Unit {
    static constexpr int M = 2 * L;                         // mins behind the fp16 d of every row
    static constexpr int SCALES = (Fmt::MIN ? 4 : 2) * L;
    static constexpr int QUANTS = Fmt::HEAD * L;            // of the first group
    static constexpr int GROUP = Fmt::QUANTS * L;           // bytes of a group's quants
    static constexpr int BYTES = Fmt::BYTES * L;
    static_assert(Fmt::SCALES != SIX_OF_16 || SCALES == 2 * L, "");
};

// ---- packing

static inline void put_six(uint8_t* plane, int row, int index, int count, uint8_t value) {  // `count` scales of six bits
    const int half = count / 2, quarter = count / 4;
    uint8_t* low = plane + index % half * L + row;
    uint8_t* high = plane + half * L + index % quarter * L + row;
    *low = static_cast<uint8_t>(*low | (value & 15) << (index / half * 4));
    *high = static_cast<uint8_t>(*high | (value >> 4) << (index / quarter * 2));
}

template <class Fmt>
static inline void pack_scales(const Parts& parts, int row, uint8_t* plane) {
    if constexpr (Fmt::SCALES == SIX_WITH_MINS) {
        for (int i = 0; i < 8; i++) put_six(plane, row, i, 8, parts.scales[i]), put_six(plane + 6 * L, row, i, 8, parts.mins[i]);
    } else if constexpr (Fmt::SCALES == SIX_OF_16) {
        for (int i = 0; i < 16; i++) put_six(plane, row, i, 16, parts.scales[i]);
    } else if constexpr (Fmt::SCALES == FOUR_WITH_MINS_OF_16) {
        for (int i = 0; i < 16; i++) plane[i * L + row] = static_cast<uint8_t>(parts.scales[i] | parts.mins[i] << 4);
    } else if constexpr (Fmt::SCALES == BYTES_OF_16) {
        for (int i = 0; i < 16; i++) plane[i * L + row] = parts.scales[i];
    }
}

// A group's quants [row][32] into its planes.
template <class Fmt>
static inline void pack_quants(const uint8_t (*q)[Fmt::BLOCK], int at, uint8_t* out) {
    alignas(64) uint8_t step[8][4 * L];
    for (int j = 0; j < 8; j++)
        for (int row = 0; row < L; row++) __builtin_memcpy(&step[j][4 * row], &q[row][at + 4 * j], 4);
    constexpr int W = 4 * L;
    if constexpr (Fmt::BITS == 8) {
        __builtin_memcpy(out, step, sizeof(step));
    } else if constexpr (Fmt::BITS <= 3) {
        for (int i = 0; i < 2; i++)
            for (int b = 0; b < W; b++) {
                const uint8_t* s = &step[4 * i][b];
                out[i * W + b] = static_cast<uint8_t>((s[0] & 3) | (s[W] & 3) << 2 | (s[2 * W] & 3) << 4 | (s[3 * W] & 3) << 6);
            }
    } else {
        for (int i = 0; i < 4; i++)
            for (int b = 0; b < W; b++) out[i * W + b] = static_cast<uint8_t>((step[i][b] & 15) | (step[i + 4][b] & 15) << 4);
    }
    if constexpr (Fmt::BITS == 6) {
        for (int i = 0; i < 2; i++)
            for (int b = 0; b < W; b++) {
                const uint8_t* s = &step[4 * i][b];
                out[(4 + i) * W + b] = static_cast<uint8_t>(s[0] >> 4 | s[W] >> 4 << 2 | s[2 * W] >> 4 << 4 | s[3 * W] >> 4 << 6);
            }
    }
    if constexpr (Fmt::BITS == 5 || Fmt::BITS == 3) {
        constexpr int shift = Fmt::BITS - 1, plane = Fmt::BITS == 5 ? 4 : 2;
        for (int b = 0; b < W; b++) {
            int bits = 0;
            for (int j = 0; j < 8; j++) bits |= step[j][b] >> shift << j;
            out[plane * W + b] = static_cast<uint8_t>(bits);
        }
    }
}

// One tile: `rows` rows of `units` blocks each, the rest of the L rows zero.
template <class Fmt>
static void pack_tile(const uint8_t* blocks, int64_t row_bytes, int rows, int64_t units, uint8_t* out) {
    alignas(64) uint8_t q[L][Fmt::BLOCK];
    Parts parts;
    for (int64_t unit = 0; unit < units; unit++, out += Unit<Fmt>::BYTES) {
        __builtin_memset(out, 0, Unit<Fmt>::QUANTS);
        if (rows < L) __builtin_memset(q, 0, sizeof(q));
        for (int row = 0; row < rows; row++) {
            read_block<Fmt>(blocks + row * row_bytes + unit * Fmt::BYTES, parts, q[row]);
            __builtin_memcpy(out + 2 * row, &parts.d, 2);
            if (Fmt::MIN) __builtin_memcpy(out + Unit<Fmt>::M + 2 * row, &parts.m, 2);
            pack_scales<Fmt>(parts, row, out + Unit<Fmt>::SCALES);
        }
        for (int group = 0; group < Fmt::GROUPS; group++)
            pack_quants<Fmt>(q, group * 32, out + Unit<Fmt>::QUANTS + group * Unit<Fmt>::GROUP);
    }
}

// ---- reading

// Scales of six bits taken apart once for all of a unit's groups, [index][row]: short vectors are not worth it group by group.
constexpr bool SIXES_AT_ONCE = L <= 8;
template <int COUNT> static inline void sixes_in_vectors(const uint8_t* plane, uint8_t* out);  // for L = 8; sixteen come out less 32

template <int COUNT>
static inline void all_sixes(const uint8_t* plane, uint8_t* out) {
    constexpr int LOW = COUNT / 2 * L, HIGH = COUNT / 4 * L;  // bytes
    if constexpr (L == 8) return sixes_in_vectors<COUNT>(plane, out);
    for (int i = 0; i < LOW; i += 8) {
        uint64_t low, high;
        __builtin_memcpy(&low, plane + i, 8);
        __builtin_memcpy(&high, plane + LOW + i % HIGH, 8);
        high >>= i / HIGH * 2;
        const uint64_t first = (low & every_byte(15)) | (high & every_byte(3)) << 4, second = (low >> 4 & every_byte(15)) | (high & every_byte(48));
        __builtin_memcpy(out + i, &first, 8);
        __builtin_memcpy(out + LOW + i, &second, 8);
    }
}

static inline I six(const uint8_t* plane, int index, int count) {
    if constexpr (SIXES_AT_ONCE) return i_load_u8(plane + index * L);
    const int half = count / 2, quarter = count / 4;
    const I low = i_and(i_srl_by(i_load_u8(plane + index % half * L), index / half * 4), i_set(15));
    const I high = i_and(i_srl_by(i_load_u8(plane + half * L + index % quarter * L), index / quarter * 2), i_set(3));
    return i_or(low, i_sll<4>(high));
}

// Scale and min of every row for a group of 32 weights, or for each 16 of it.
template <class Fmt>
struct Scaling {
    static constexpr bool APART = SIXES_AT_ONCE && (Fmt::SCALES == SIX_WITH_MINS || Fmt::SCALES == SIX_OF_16);
    static constexpr int MINS = APART ? 8 * L : 6 * L;

    F d, m;
    const uint8_t* planes;
    uint8_t sixes[APART ? 16 * L : 1];

    void read(const uint8_t* unit) {
        d = m = f_load_half(reinterpret_cast<const uint16_t*>(unit));
        planes = unit + Unit<Fmt>::SCALES;
        if (Fmt::MIN) m = f_load_half(reinterpret_cast<const uint16_t*>(unit + Unit<Fmt>::M));
        if constexpr (APART) {
            if constexpr (Fmt::SUBS == 2) all_sixes<16>(planes, sixes);
            else all_sixes<8>(planes, sixes), all_sixes<8>(planes + 6 * L, sixes + MINS);
            planes = sixes;
        }
    }
    Scaling() = default;
    explicit Scaling(const uint8_t* unit) { read(unit); }
    Scaling(const Scaling&) = delete;
    const uint8_t* integers(int group) const { return planes + 2 * group * L; }  // of a group's halves, [2][L]
    F scale(int group, int sub) const {
        if constexpr (Fmt::SCALES == NONE) return d;
        else if constexpr (Fmt::SCALES == SIX_WITH_MINS) return f_mul(d, f_from_i(six(planes, group, 8)));
        else if constexpr (Fmt::SCALES == SIX_OF_16) return f_mul(d, f_from_i(L == 8 ? i_load_s8(reinterpret_cast<const int8_t*>(integers(group)) + sub * L) : i_sub(six(planes, 2 * group + sub, 16), i_set(32))));
        else if constexpr (Fmt::SCALES == FOUR_WITH_MINS_OF_16) return f_mul(d, f_from_i(i_and(i_load_u8(planes + (2 * group + sub) * L), i_set(15))));
        else return f_mul(d, f_from_i(i_load_s8(reinterpret_cast<const int8_t*>(planes) + (2 * group + sub) * L)));
    }
    // what is subtracted, whatever the quant
    F min(int group, int sub) const {
        if constexpr (Fmt::SCALES == NONE) return f_sub(f_zero(), m);  // Q4_1 and Q5_1 store what is added
        else if constexpr (Fmt::SCALES == SIX_WITH_MINS) return f_mul(m, f_from_i(six(planes + MINS, group, 8)));
        else return f_mul(m, f_from_i(i_srl_by(i_load_u8(planes + (2 * group + sub) * L), 4)));
    }
};

template <int left> static inline I shifted(I v) {  // bits of every byte, left or right; what crosses into a neighbour is masked after
    if constexpr (left >= 0) return i_sll16<left>(v);
    else return i_srl16<-left>(v);
}

// The quants of a group as eight vectors of bytes, step by step: unsigned, or signed where BITS >= 8 and the set takes them so.
template <class Fmt>
static inline void expand(const uint8_t* p, I* w) {
    constexpr int W = 4 * L;
    if constexpr (Fmt::BITS == 8) {
        for (int j = 0; j < 8; j++) w[j] = S8_ZERO ? i_xor(i_load(p + j * W), i_set_bytes(-128)) : i_load(p + j * W);
    } else if constexpr (Fmt::BITS <= 3) {
        const I mask = i_set_bytes(3);
        for (int i = 0; i < 2; i++) {
            const I v = i_load(p + i * W);
            w[4 * i] = i_and(v, mask), w[4 * i + 1] = i_and(i_srl16<2>(v), mask);
            w[4 * i + 2] = i_and(i_srl16<4>(v), mask), w[4 * i + 3] = i_and(i_srl16<6>(v), mask);
        }
    } else {
        const I mask = i_set_bytes(15);
        for (int i = 0; i < 4; i++) {
            const I v = i_load(p + i * W);
            w[i] = i_and(v, mask), w[i + 4] = i_and(i_srl16<4>(v), mask);
        }
    }
    if constexpr (Fmt::BITS == 9) {
        const I table = S8_ZERO ? i_xor(i_repeat16(IQ4_VALUES), i_set_bytes(-128)) : i_repeat16(IQ4_VALUES);
        for (int j = 0; j < 8; j++) w[j] = i_table(table, w[j]);
    } else if constexpr (Fmt::BITS == 6) {
        const I mask = i_set_bytes(0x30);
        for (int i = 0; i < 2; i++) {
            const I v = i_load(p + (4 + i) * W);
            w[4 * i] = i_and_or(shifted<4>(v), mask, w[4 * i]), w[4 * i + 1] = i_and_or(shifted<2>(v), mask, w[4 * i + 1]);
            w[4 * i + 2] = i_and_or(v, mask, w[4 * i + 2]), w[4 * i + 3] = i_and_or(shifted<-2>(v), mask, w[4 * i + 3]);
        }
    } else if constexpr (Fmt::BITS == 5 || Fmt::BITS == 3) {
        constexpr int at = Fmt::BITS - 1;  // the bit's place in the quant
        const I v = i_load(p + (Fmt::BITS == 5 ? 4 : 2) * W), mask = i_set_bytes(1 << at);
        w[0] = i_and_or(shifted<at - 0>(v), mask, w[0]), w[1] = i_and_or(shifted<at - 1>(v), mask, w[1]);
        w[2] = i_and_or(shifted<at - 2>(v), mask, w[2]), w[3] = i_and_or(shifted<at - 3>(v), mask, w[3]);
        w[4] = i_and_or(shifted<at - 4>(v), mask, w[4]), w[5] = i_and_or(shifted<at - 5>(v), mask, w[5]);
        w[6] = i_and_or(shifted<at - 6>(v), mask, w[6]), w[7] = i_and_or(shifted<at - 7>(v), mask, w[7]);
    }
}

constexpr int log2_of(int v) { return v <= 1 ? 0 : 1 + log2_of(v / 2); }

// What the quants that `expand` gives have too much.
template <class Fmt> constexpr int zero_of() { return Fmt::BITS >= 8 ? S8_ZERO : Fmt::ZERO; }

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
