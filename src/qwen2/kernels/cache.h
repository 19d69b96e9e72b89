// How keys and values lie in a block of the cache. A piece, one kv head of one layer in a block of 64 tokens, holds integers of 16 or
// 8 bits and one scale per token: keys as [4 times 16 tokens][d / 2][16 tokens][2], values as [32 pairs of tokens][d][2], so that
// the instruction that multiplies pairs adds over neighbouring dimensions of keys and over neighbouring tokens of values; then the
// scales of keys and of values. d is filled up with zeros to a multiple of 16. The layout is the same for every instruction set.
#ifndef QWEN2_CACHE_H
#define QWEN2_CACHE_H

#include "kernels.h"

namespace qwen2 {

constexpr int BLOCK = QWEN2_CACHE_BLOCK;

static inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

static inline int64_t cache_bytes(int32_t head_dim, int32_t bits) {
    if (head_dim < 2 || head_dim > 256 || head_dim % 2 != 0 || (bits != 16 && bits != 8)) return 0;
    return 2 * BLOCK * padded(head_dim) * (bits / 8) + 2 * BLOCK * static_cast<int64_t>(sizeof(float));
}

template <class Int>
struct Piece {
    Int *keys, *values;
    float *key_scales, *value_scales;

    Piece(uint8_t* memory, int64_t d)
        : keys(reinterpret_cast<Int*>(memory)), values(keys + BLOCK * d), key_scales(reinterpret_cast<float*>(values + BLOCK * d)),
          value_scales(key_scales + BLOCK) {}
};

static inline int64_t key_at(int64_t token, int64_t dim, int64_t d) { return ((token / 16 * (d / 2) + dim / 2) * 16 + token % 16) * 2 + dim % 2; }
static inline int64_t value_at(int64_t token, int64_t dim, int64_t d) { return (token / 2 * d + dim) * 2 + token % 2; }

}  // namespace qwen2

#endif
