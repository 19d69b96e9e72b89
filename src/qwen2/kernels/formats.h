// The block formats of GGUF as the kernels see them: what a block holds in the file, and how the tile of L rows that replaces it
// is laid out. A tile's unit is one block of each of its rows; it takes the same bytes and holds the same numbers, interleaved:
//
//   d of every row (fp16), min of every row (fp16) where there is one, the scales inside the block as planes, then for each group
//   of 32 weights the quants as planes of 4L bytes: byte (row, k) of step j is weight 4j + k of the row's group, k = 0..3.
//   nibbles: 4 vectors, vector i has step i in its low and step i + 4 in its high halves
//   twos:    2 vectors, vector i has steps 4i .. 4i + 3, two bits each
//   bits:    1 vector, bit j of a byte belongs to step j
//   bytes:   8 vectors
//
// Float formats have no groups: a tile is [column][row].
#ifndef QWEN2_FORMATS_H
#define QWEN2_FORMATS_H

#include <stdint.h>

namespace qwen2 {

enum Type { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
            IQ4_NL = 20, BF16 = 30 };  // ggml's numbers

// The head of a block. `scales` and `mins` are as the file means them: 4 or 6 bits, or signed bytes.
struct Parts {
    uint16_t d, m;
    uint8_t scales[16], mins[16];
};

// Widest scale inside a block: none, 6 bits for each 32 weights with a min each, and so on.
enum Scales { NONE, SIX_WITH_MINS, SIX_OF_16, FOUR_WITH_MINS_OF_16, BYTES_OF_16 };

// BLOCK weights in BYTES; BITS of a quant (8: signed bytes, 9: four bits through a table of signed bytes); ZERO is what the
// unsigned quant has too much; SUBS scales for 32 weights.
template <Type TYPE_, int BLOCK_, int BYTES_, int BITS_, int ZERO_, bool MIN_, Scales SCALES_>
struct Format {
    static constexpr Type TYPE = TYPE_;
    static constexpr int BLOCK = BLOCK_, BYTES = BYTES_, BITS = BITS_, ZERO = ZERO_, GROUPS = BLOCK_ / 32;
    static constexpr bool MIN = MIN_;
    static constexpr Scales SCALES = SCALES_;
    static constexpr int SUBS = SCALES_ >= SIX_OF_16 ? 2 : 1;
    // bytes a row: what precedes the quants, and the quants of a group
    static constexpr int SCALE_BYTES = SCALES_ == NONE ? 0 : SCALES_ == SIX_WITH_MINS || SCALES_ == SIX_OF_16 ? 12 : 16;
    static constexpr int HEAD = (MIN_ ? 4 : 2) + SCALE_BYTES;
    static constexpr int QUANTS = BITS_ >= 9 ? 16 : BITS_ * 4;
    static_assert(HEAD + GROUPS * QUANTS == BYTES_, "a tile takes as many bytes as its blocks");
};

typedef Format<Q4_0, 32, 18, 4, 8, false, NONE> FormatQ4_0;
typedef Format<Q4_1, 32, 20, 4, 0, true, NONE> FormatQ4_1;
typedef Format<Q5_0, 32, 22, 5, 16, false, NONE> FormatQ5_0;
typedef Format<Q5_1, 32, 24, 5, 0, true, NONE> FormatQ5_1;
typedef Format<Q8_0, 32, 34, 8, 0, false, NONE> FormatQ8_0;
typedef Format<IQ4_NL, 32, 18, 9, 0, false, NONE> FormatIQ4_NL;
typedef Format<Q2_K, 256, 84, 2, 0, true, FOUR_WITH_MINS_OF_16> FormatQ2_K;
typedef Format<Q3_K, 256, 110, 3, 4, false, SIX_OF_16> FormatQ3_K;
typedef Format<Q4_K, 256, 144, 4, 0, true, SIX_WITH_MINS> FormatQ4_K;
typedef Format<Q5_K, 256, 176, 5, 0, true, SIX_WITH_MINS> FormatQ5_K;
typedef Format<Q6_K, 256, 210, 6, 32, false, BYTES_OF_16> FormatQ6_K;

// The values of IQ4_NL's sixteen quants.
static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline uint16_t word(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

constexpr uint64_t every_byte(uint8_t value) { return 0x0101010101010101u * value; }

// 16 bytes: low halves are weights 0..15, high halves 16..31
static inline void read_nibbles(const uint8_t* p, uint8_t* q) {
    for (int half = 0; half < 2; half++) {
        uint64_t eight;
        __builtin_memcpy(&eight, p + 8 * half, 8);
        const uint64_t low = eight & every_byte(15), high = eight >> 4 & every_byte(15);
        __builtin_memcpy(q + 8 * half, &low, 8);
        __builtin_memcpy(q + 16 + 8 * half, &high, 8);
    }
}
// 4 bytes: one bit for each weight in order, worth 16
static inline void add_fifth_bits(const uint8_t* p, uint8_t* q) {
    for (int byte = 0; byte < 4; byte++) {
        const uint64_t own = every_byte(p[byte]) & 0x8040201008040201u;       // bit i alone in byte i
        const uint64_t set = (own + every_byte(0x7f)) >> 3 & every_byte(16);  // 16 where it is set
        uint64_t eight;
        __builtin_memcpy(&eight, q + 8 * byte, 8);
        eight |= set;
        __builtin_memcpy(q + 8 * byte, &eight, 8);
    }
}
// 12 bytes hold eight scales and eight mins of six bits
static inline void read_six_with_mins(const uint8_t* p, Parts& out) {
    for (int i = 0; i < 4; i++) {
        out.scales[i] = p[i] & 63, out.mins[i] = p[i + 4] & 63;
        out.scales[i + 4] = static_cast<uint8_t>((p[i + 8] & 15) | (p[i] >> 6) << 4);
        out.mins[i + 4] = static_cast<uint8_t>(p[i + 8] >> 4 | (p[i + 4] >> 6) << 4);
    }
}
// 12 bytes hold sixteen scales of six bits: low halves in the first eight, upper two bits in the last four
static inline void read_sixteen_of_six(const uint8_t* p, Parts& out) {
    for (int i = 0; i < 16; i++) {
        const int low = i < 8 ? p[i] & 15 : p[i - 8] >> 4, high = p[8 + i % 4] >> (i / 4 * 2) & 3;
        out.scales[i] = static_cast<uint8_t>(low | high << 4);
    }
}
// 64 bytes hold 256 quants of two bits: 32 bytes for each 128, whose bit pairs are four times 32
static inline void read_twos(const uint8_t* p, uint8_t* q) {
    for (int half = 0; half < 2; half++)
        for (int pair = 0; pair < 4; pair++)
            for (int i = 0; i < 32; i++) q[half * 128 + pair * 32 + i] = p[half * 32 + i] >> (2 * pair) & 3;
}

// A block of the file, taken apart: its head, and its quants one a byte.
template <class Fmt>
static inline void read_block(const uint8_t* p, Parts& out, uint8_t* q) {
    constexpr Type type = Fmt::TYPE;
    if constexpr (type == Q4_0 || type == IQ4_NL) {
        out.d = word(p), read_nibbles(p + 2, q);
    } else if constexpr (type == Q4_1) {
        out.d = word(p), out.m = word(p + 2), read_nibbles(p + 4, q);
    } else if constexpr (type == Q5_0) {
        out.d = word(p), read_nibbles(p + 6, q), add_fifth_bits(p + 2, q);
    } else if constexpr (type == Q5_1) {
        out.d = word(p), out.m = word(p + 2), read_nibbles(p + 8, q), add_fifth_bits(p + 4, q);
    } else if constexpr (type == Q8_0) {
        out.d = word(p), __builtin_memcpy(q, p + 2, 32);
    } else if constexpr (type == Q4_K || type == Q5_K) {
        out.d = word(p), out.m = word(p + 2), read_six_with_mins(p + 4, out);
        const uint8_t* low = p + (type == Q4_K ? 16 : 48);
        for (int pair = 0; pair < 4; pair++)
            for (int i = 0; i < 32; i++) {
                q[pair * 64 + i] = low[pair * 32 + i] & 15;
                q[pair * 64 + 32 + i] = low[pair * 32 + i] >> 4;
            }
        if constexpr (type == Q5_K)
            for (int group = 0; group < 8; group++)
                for (int i = 0; i < 32; i++) q[group * 32 + i] = static_cast<uint8_t>(q[group * 32 + i] | (p[16 + i] >> group & 1) << 4);
    } else if constexpr (type == Q6_K) {
        for (int half = 0; half < 2; half++) {
            const uint8_t *low = p + half * 64, *high = p + 128 + half * 32;
            for (int quarter = 0; quarter < 4; quarter++)
                for (int i = 0; i < 32; i++) {
                    const int four = low[quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
                    q[half * 128 + quarter * 32 + i] = static_cast<uint8_t>(four | (high[i] >> (2 * quarter) & 3) << 4);
                }
        }
        __builtin_memcpy(out.scales, p + 192, 16);
        out.d = word(p + 208);
    } else if constexpr (type == Q3_K) {
        read_twos(p + 32, q);
        for (int group = 0; group < 8; group++)
            for (int i = 0; i < 32; i++) q[group * 32 + i] = static_cast<uint8_t>(q[group * 32 + i] | (p[i] >> group & 1) << 2);
        read_sixteen_of_six(p + 96, out);
        out.d = word(p + 108);
    } else {
        static_assert(type == Q2_K, "every format is read");
        for (int i = 0; i < 16; i++) out.scales[i] = p[i] & 15, out.mins[i] = p[i] >> 4;
        read_twos(p + 16, q);
        out.d = word(p + 80), out.m = word(p + 82);
    }
}

}  // namespace qwen2

#endif
