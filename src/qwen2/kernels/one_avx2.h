// One token times several tiles at once, for AVX2: two loads a cycle are what such a product is short of, and the tiles share those of
// the token's bytes. Quants are taken from their planes two steps at a time, and used before the next are taken. The results are those
// of `few_tokens`.
#ifndef QWEN2_ONE_AVX2_H
#define QWEN2_ONE_AVX2_H

#include "micro_avx2.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int ONE_TILES = 4;
constexpr int ONE_AHEAD = 16384;  // bytes of each tile between what is computed with and what is fetched into the second cache

// Whether that is faster. Formats of six and eight bits are short of nothing but memory, and that reads one tile after the other best.
template <class Fmt> constexpr bool tiles_together() { return Fmt::BITS != 6 && Fmt::BITS != 8; }

// A group's quants of one tile, two steps at a time.
template <class Fmt>
struct Pairs {
    static constexpr bool NIBBLES = Fmt::BITS >= 4, FIFTH = Fmt::BITS == 5 || Fmt::BITS == 3;  // or third: bits in a plane of their own
    static constexpr int W = 4 * L;
    static constexpr int first(int i) { return NIBBLES ? i : 2 * i; }  // steps of pair i
    static constexpr int second(int i) { return NIBBLES ? i + 4 : 2 * i + 1; }

    const uint8_t* p;
    I low, high;

    void begin(const uint8_t* quants) {
        p = quants;
        if (FIFTH) high = i_load(p + (NIBBLES ? 4 : 2) * W), keep(high);
    }
    template <int step> I whole(I quant) const {
        if constexpr (FIFTH) return i_and_or(shifted<Fmt::BITS - 1 - step>(high), i_set_bytes(1 << (Fmt::BITS - 1)), quant);
        else if constexpr (Fmt::BITS == 9) return i_table(i_repeat16(IQ4_VALUES), quant);
        else return quant;
    }
    template <int i> void take(I& a, I& b) {
        if constexpr (NIBBLES || i % 2 == 0) low = i_load(p + (NIBBLES ? i : i / 2) * W), keep(low);  // one load, not one for each use
        const I mask = i_set_bytes(NIBBLES ? 15 : 3);
        constexpr int at = NIBBLES ? 0 : i % 2 * 4, next = NIBBLES ? 4 : at + 2;  // bits
        a = whole<first(i)>(i_and(i_srl16<at>(low), mask)), b = whole<second(i)>(i_and(i_srl16<next>(low), mask));
    }
};

// The exact sums of P tiles' groups, where there are two scales of halves times these: pairs i .. 3 are added.
template <class Fmt, int P, int i>
static inline void add_pairs(Pairs<Fmt>* quants, const GroupScales<Fmt>* scales, const int8_t* q, I* run, I* sum) {
    constexpr int S = Fmt::SUBS, HALF = i / 2, STEPS = steps_in_16<Fmt>() < 8 / S ? steps_in_16<Fmt>() : 8 / S;
    const I xa = i_broadcast4(q + 4 * Pairs<Fmt>::first(i)), xb = i_broadcast4(q + 4 * Pairs<Fmt>::second(i));
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        I a, b;
        quants[p].template take<i>(a, b);
        if constexpr (Fmt::BITS >= 8) {
            const I both = i_add(widen(pairs(_mm256_abs_epi8(a), _mm256_sign_epi8(xa, a))), widen(pairs(_mm256_abs_epi8(b), _mm256_sign_epi8(xb, b))));
            sum[p] = i == 0 ? both : i_add(sum[p], both);
            keep(sum[p]);
        } else {
            run[p] = 2 * i % STEPS == 0 ? pairs(a, xa) : add16(run[p], pairs(a, xa));
            run[p] = add16(run[p], pairs(b, xb));
            keep(run[p]);
            if constexpr ((2 * i + 2) % STEPS == 0) {
                const I four = S == 2 ? weigh16(run[p], scales[p].by[HALF]) : widen(run[p]);
                sum[p] = 2 * i + 2 == STEPS ? four : i_add(sum[p], four);
            }
        }
    }
    if constexpr (i < 3) add_pairs<Fmt, P, i + 1>(quants, scales, q, run, sum);
}

// P neighbouring tiles times one token: out[P][L].
template <class Fmt, int P>
static void one_token(const uint8_t* tile, const Activations& x, int64_t token, float* out) {
    constexpr int S = Fmt::SUBS, Z = zero_of<Fmt>();
    const int64_t units = x.columns / Fmt::BLOCK, tile_bytes = units * Unit<Fmt>::BYTES, groups = x.columns / 32, row = x.row(token);
    const int8_t* q = x.q + row * x.columns;
    const float* sx = x.scales + row * groups;
    const int32_t *sums = x.sums + row * groups, *halves = x.halves + row * groups;
    const float* lows = S == 2 ? x.half_lows + 2 * row * groups : x.lows + row * groups;
    // What is fetched: ONE_AHEAD bytes further on, the same in every tile, then in those of the next panels.
    constexpr int SHARE = Unit<Fmt>::BYTES / Fmt::GROUPS;
    const uint8_t *fetched = tile + ONE_AHEAD + ONE_AHEAD / tile_bytes * (P - 1) * tile_bytes;
    const uint8_t* fetched_end = tile + ONE_AHEAD / tile_bytes * P * tile_bytes + tile_bytes;
    F y[P];
    for (int p = 0; p < P; p++) y[p] = f_zero();
    for (int64_t unit = 0; unit < units; unit++, tile += Unit<Fmt>::BYTES) {
        Scaling<Fmt> scaling[P];
        for (int p = 0; p < P; p++) scaling[p].read(tile + p * tile_bytes);
        for (int group = 0; group < Fmt::GROUPS; group++, q += 32, sx++, sums++, halves++, lows += S) {
            const uint8_t* at = tile + Unit<Fmt>::QUANTS + group * Unit<Fmt>::GROUP;
            for (int p = 0; p < P; p++)
                for (int line = 0; line < SHARE; line += 64) prefetch_second(fetched + p * tile_bytes + line);
            fetched += SHARE;
            if (fetched >= fetched_end) fetched += (P - 1) * tile_bytes, fetched_end += P * tile_bytes;
            Pairs<Fmt> quants[P];
            for (int p = 0; p < P; p++) quants[p].begin(at + p * tile_bytes);
            GroupScales<Fmt> scales[P];
            for (int p = 0; p < P; p++) scales[p].read(scaling[p], group);
            I run[P], sum[P];
            add_pairs<Fmt, P, 0>(quants, scales, q, run, sum);
            const F scale_x = f_set(*sx);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                if constexpr (Z != 0 && S == 1) sum[p] = i_sub(sum[p], i_sll<log2_of(Z)>(i_broadcast4(sums)));
                if constexpr (Z != 0 && S == 2) sum[p] = i_sub(sum[p], weigh16(scales[p].zero, i_broadcast4(halves)));
                y[p] = f_fma(f_mul(f_from_i(sum[p]), scales[p].scale), scale_x, y[p]);
                if (Fmt::MIN)
                    for (int s = 0; s < S; s++) y[p] = f_fnma(scaling[p].min(group, s), f_set(lows[s]), y[p]);
            }
        }
    }
    for (int p = 0; p < P; p++) f_store(out + p * L, y[p]);
}

// The tiles of a panel that were multiplied so: all of them, or none.
template <class Fmt>
static int several_tiles(const uint8_t* first, int tiles, const Activations& x, int n, float* out, int, int) {
    if constexpr (tiles_together<Fmt>())
        if (n == 1 && tiles == ONE_TILES && x.columns > 0) return one_token<Fmt, ONE_TILES>(first, x, 0, out), tiles;
    return 0;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
