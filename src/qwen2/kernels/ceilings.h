// How fast this machine reads memory and multiplies bytes or floats, with the instructions of this set: what speeds are held against.
#ifndef QWEN2_CEILINGS_H
#define QWEN2_CEILINGS_H

#include "kernels.h"
#include "pool.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int64_t STRETCH = 1 << 18;  // bytes that a thread claims at a time
constexpr int CHAINS = 8;             // of vectors, so that no instruction waits for the one before

static int read(const void* memory, int64_t bytes) {
    const uint8_t* from = static_cast<const uint8_t*>(memory);
    const int64_t stretches = (bytes + STRETCH - 1) / STRETCH;
    if (stretches > MAX_TILES) return NOT_SUPPORTED;
    for_tiles(static_cast<int>(stretches), [&](int tile, int) {
        const int64_t begin = tile * STRETCH, end = begin + STRETCH < bytes ? begin + STRETCH : bytes;
        I sums[CHAINS];
        for (int c = 0; c < CHAINS; c++) sums[c] = i_zero();
        int64_t at = begin;
        for (; at + CHAINS * 4 * L <= end; at += CHAINS * 4 * L)
            for (int c = 0; c < CHAINS; c++) {
                if (c * 4 * L % 64 == 0) prefetch(from + at + c * 4 * L + 4096);
                sums[c] = i_xor(sums[c], i_load(from + at + c * 4 * L));
            }
        for (int c = 1; c < CHAINS; c++) sums[0] = i_xor(sums[0], sums[c]);
        int32_t rest = i_sum(sums[0]);
        for (; at < end; at++) rest ^= from[at];
        __asm__ volatile("" : : "r"(rest));  // used, so that nothing may be left out
    });
    return 0;
}

static int64_t multiply_bytes(int64_t rounds) {
    constexpr int A = L == 8 ? 2 : 4, B = 4;  // as many sums as registers hold
    const int tiles = threads();
    for_tiles(tiles, [&](int, int) {
        alignas(64) int8_t bytes[A + B][4 * L];
        for (int i = 0; i < A + B; i++) i_store(bytes[i], i_set_bytes(static_cast<int8_t>(i + 1)));
        I sums[A][B], a[A], b[B];
#pragma GCC unroll 4
        for (int i = 0; i < A; i++)
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) sums[i][j] = i_zero();
        for (int64_t round = 0; round < rounds; round++) {
            __asm__ volatile("" : : "r"(bytes) : "memory");  // the bytes may be others now: no product may be carried over
#pragma GCC unroll 4
            for (int i = 0; i < A; i++) a[i] = i_load(bytes[i]);
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) b[j] = i_load(bytes[A + j]);
#pragma GCC unroll 4
            for (int i = 0; i < A; i++)
#pragma GCC unroll 4
                for (int j = 0; j < B; j++) sums[i][j] = multiply_add_bytes(sums[i][j], a[i], b[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < A; i++)
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) sums[0][0] = i_xor(sums[0][0], sums[i][j]);
        __asm__ volatile("" : : "r"(i_sum(sums[0][0])));
    });
    return rounds * tiles * A * B * 4 * L * 2;
}

// The same with what products of weights that are floats are made of.
static int64_t multiply_floats(int64_t rounds) {
    constexpr int A = L == 8 ? 2 : 4, B = 4;
    const int tiles = threads();
    for_tiles(tiles, [&](int, int) {
        alignas(64) float numbers[A + B][L];
        for (int i = 0; i < A + B; i++) f_store(numbers[i], f_set(static_cast<float>(i + 1) * 0.125f));
        F sums[A][B], a[A], b[B];
#pragma GCC unroll 4
        for (int i = 0; i < A; i++)
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) sums[i][j] = f_zero();
        for (int64_t round = 0; round < rounds; round++) {
            __asm__ volatile("" : : "r"(numbers) : "memory");
#pragma GCC unroll 4
            for (int i = 0; i < A; i++) a[i] = f_load(numbers[i]);
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) b[j] = f_load(numbers[A + j]);
#pragma GCC unroll 4
            for (int i = 0; i < A; i++)
#pragma GCC unroll 4
                for (int j = 0; j < B; j++) sums[i][j] = f_fma(a[i], b[j], sums[i][j]);
        }
        F all = f_zero();
#pragma GCC unroll 4
        for (int i = 0; i < A; i++)
#pragma GCC unroll 4
            for (int j = 0; j < B; j++) all = f_add(all, sums[i][j]);
        f_store(numbers[0], all);
        __asm__ volatile("" : : "r"(numbers) : "memory");
    });
    return rounds * tiles * A * B * L * 2;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
