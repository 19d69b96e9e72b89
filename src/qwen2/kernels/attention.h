// Attention over the cache: rows of queries (the tokens of a block and the heads that share a kv head) against tiles of 64 keys, in
// one pass with a running softmax. The inner products are sums of integers, exact in any order. What is rounded happens in one order
// for every row, whatever is computed beside it: tiles begin at multiples of 64 from position 0, every 1,024 keys form a span with a
// softmax of its own, and spans are merged in order. So whether spans run one after the other or on several threads, a token's bits
// are the same alone, in any batch, and after any split of its prompt.
#ifndef QWEN2_ATTENTION_H
#define QWEN2_ATTENTION_H

#include "rotate.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int SPAN = 16 * BLOCK;    // keys
constexpr int MAX_ROWS = 64;        // of a work item
constexpr int ROW_TILE = L == 16 ? 8 : 4, VECTORS = L == 4 ? 4 : 2;  // of the registers
constexpr int SPLIT = 4;            // new tokens up to which a sequence's spans are work items of their own

struct State {                      // rows of one work item: running maximum, sum and weighted values
    float *highest, *sum, *values;  // [row], [row], [row][d]
};

struct Room {                       // a thread's memory
    State span, all;
    float* scores;                  // [row][64]
    int16_t* weights;               // [row][64]
    float *kept, *factor;           // [row]: what the values so far are multiplied by, and the new ones

    static size_t bytes(int64_t d) { return static_cast<size_t>(MAX_ROWS) * (2 * (2 + d) + BLOCK + BLOCK / 2 + 2) * sizeof(float); }
    Room(void* memory, int64_t d) {
        float* p = static_cast<float*>(memory);
        const auto take = [&](int64_t count) { float* place = p; p += count; return place; };
        span = {take(MAX_ROWS), take(MAX_ROWS), take(MAX_ROWS * d)}, all = {take(MAX_ROWS), take(MAX_ROWS), take(MAX_ROWS * d)};
        scores = take(MAX_ROWS * BLOCK), kept = take(MAX_ROWS), factor = take(MAX_ROWS);
        weights = reinterpret_cast<int16_t*>(take(MAX_ROWS * BLOCK / 2));
    }
};

struct Item {
    int32_t sequence, kv_head, token, tokens;  // the first new token, of the whole step, and how many
    int32_t position;                          // of the first
    int32_t span, spans;                       // the first span, and how many
    int32_t partial;                           // where the state goes when spans are merged later, or -1
    int64_t block;                             // the sequence's first in `blocks`
};

template <class Int> static inline I load_pairs(const Int* p);
template <> inline I load_pairs<int16_t>(const int16_t* p) { return i_load(p); }
template <> inline I load_pairs<int8_t>(const int8_t* p) { return i_widen_s8(p); }

// What is fetched while something else is computed: the next piece of the cache, two lines with every pair of numbers, because more
// at once would wait for the memory and few rows compute as fast as it delivers.
struct Ahead {
    const uint8_t *from, *to;

    void fetch() {
        if (from >= to) return;
        prefetch_second(from), prefetch_second(from + 64);
        from += 128;
    }
};

// sums[r][v] = sum over pairs of a[r][pair] * b[pair][v], R rows by V vectors.
template <class Int, int R, int V>
static inline void pair_products(const int16_t* a, int64_t a_stride, const Int* b, int64_t b_stride, int64_t vector_stride, int64_t pairs, I (*sums)[V],
                                 Ahead& ahead) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = i_zero();
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < pairs; pair++) {
        I vector[V];
        ahead.fetch();
        for (int v = 0; v < V; v++) vector[v] = load_pairs<Int>(b + pair * b_stride + v * vector_stride);
        arrange_pairs<V>(vector);
        for (int r = 0; r < R; r++) dot_pairs<V>(sums[r], vector, a + r * a_stride + 2 * pair);
    }
}

// Scores of R rows against the tile's 64 keys.
template <class Int, int R>
static void score_rows(const int16_t* q, const float* scales, const int64_t* rows, int64_t d, const Piece<Int>& piece, float* out, Ahead& ahead) {
    alignas(64) int16_t gathered[R][MAX_DIM];
    for (int r = 0; r < R; r++) __builtin_memcpy(gathered[r], q + rows[r] * d, static_cast<size_t>(d) * 2);
    for (int key = 0; key < BLOCK; key += VECTORS * L) {
        I sums[R][VECTORS];
        const Int* k = piece.keys + key / 16 * d * 16 + key % 16 * 2;
        pair_products<Int, R, VECTORS>(gathered[0], MAX_DIM, k, 32, L == 16 ? d * 16 : 2 * L, d / 2, sums, ahead);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < VECTORS; v++) {
                const F scale = f_mul(f_load(piece.key_scales + key + v * L), f_set(scales[rows[r]]));
                f_store(out + r * BLOCK + key + v * L, f_mul(f_from_i(sums[r][v]), scale));
            }
    }
}

// The running softmax takes a tile: `visible` keys of 64 count. Leaves the row's integer weights and its two factors.
static inline void weigh(const float* value_scales, int visible, float* scores, float* highest, float* sum, int16_t* weights, float* kept, float* factor) {
    constexpr int V = BLOCK / L;
    F s[V], top = f_set(-__builtin_inff());
    for (int v = 0; v < V; v++) {
        s[v] = f_load(scores + v * L);
        if (visible < BLOCK) s[v] = f_keep_first(s[v], visible - v * L, f_set(-__builtin_inff()));
        top = f_max(s[v], top);
    }
    const float before = *highest, tile = f_highest(top), now = tile > before ? tile : before;
    *highest = now;
    *kept = now == before ? 1.0f : exp_of(before - now);
    F total = f_zero(), weighted = f_zero(), w[V];
    for (int v = 0; v < V; v++) {
        F p = f_exp(f_sub(s[v], f_set(now)));
        w[v] = f_mul(p, f_load(value_scales + v * L));
        if (visible < BLOCK) p = f_keep_first(p, visible - v * L, f_zero()), w[v] = f_keep_first(w[v], visible - v * L, f_zero());
        total = f_add(total, p), weighted = f_add(weighted, w[v]);
    }
    *sum = *sum * *kept + f_sum(total);
    const float all = f_sum(weighted);
    const bool some = !(all < 1e-30f);  // also where it is NaN
    const F up = f_set(some ? SHORT / all : 0.0f);
    *factor = some ? all * (1.0f / SHORT) : 0.0f;
    for (int v = 0; v < V; v++) i_store_s16(weights + v * L, i_from_f(f_mul(w[v], up)));
}

// values = values * kept + weights times the tile's values, R rows.
template <class Int, int R, int V>
static inline void add_values_of(const Room& room, int64_t row, int64_t dim, int64_t d, const Piece<Int>& piece, Ahead& ahead) {
    I sums[R][V];
    pair_products<Int, R, V>(room.weights + row * BLOCK, BLOCK, piece.values + 2 * dim, 2 * d, 2 * L, BLOCK / 2, sums, ahead);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float* place = room.span.values + (row + r) * d + dim + v * L;
            const F old = f_mul(f_load(place), f_set(room.kept[row + r]));
            f_store(place, f_fma(f_from_i(sums[r][v]), f_set(room.factor[row + r]), old));
        }
}

template <class Int, int R>
static void add_values(const Room& room, int64_t row, int64_t d, const Piece<Int>& piece, Ahead& ahead) {
    int64_t dim = 0;
    for (; dim + VECTORS * L <= d; dim += VECTORS * L) add_values_of<Int, R, VECTORS>(room, row, dim, d, piece, ahead);
    for (; dim < d; dim += L) add_values_of<Int, R, 1>(room, row, dim, d, piece, ahead);
}

template <class Int, int R>
static void rows_of_tile(int64_t left, const Queries& queries, const int64_t* rows, int64_t row, int64_t d, const Piece<Int>& piece, const Room& room, bool scores, Ahead& ahead) {
    if (left >= R) {
        if (scores) score_rows<Int, R>(queries.q, queries.scales, rows + row, d, piece, room.scores + row * BLOCK, ahead);
        else add_values<Int, R>(room, row, d, piece, ahead);
    } else if constexpr (R > 1) {
        rows_of_tile<Int, R - 1>(left, queries, rows, row, d, piece, room, scores, ahead);
    }
}

// A tile of keys against all rows of an item whose tokens reach it; `next` is the piece that comes after it, or null.
template <class Int>
static void attend_tile(const uint8_t* next, int64_t bytes, const Queries& queries, const int64_t* rows, int64_t first, int64_t count, int group, int64_t position, int64_t tile,
                        int64_t d, const Piece<Int>& piece, const Room& room) {
    Ahead ahead = {next, next == nullptr ? nullptr : next + bytes};
    for (int64_t row = first; row < count; row += ROW_TILE) rows_of_tile<Int, ROW_TILE>(count - row, queries, rows, row, d, piece, room, true, ahead);
    for (int64_t row = first; row < count; row++) {
        const int64_t visible = position + row / group - tile + 1;
        weigh(piece.value_scales, visible < BLOCK ? static_cast<int>(visible) : BLOCK, room.scores + row * BLOCK, room.span.highest + row,
              room.span.sum + row, room.weights + row * BLOCK, room.kept + row, room.factor + row);
    }
    for (int64_t row = first; row < count; row += ROW_TILE) rows_of_tile<Int, ROW_TILE>(count - row, queries, rows, row, d, piece, room, false, ahead);
}

// Adds a span's state of one row to that of the spans before it.
static inline void merge(int64_t d, float highest, float sum, const float* values, float* all_highest, float* all_sum, float* all_values) {
    const float now = highest > *all_highest ? highest : *all_highest;
    const float old = exp_of(*all_highest - now), fresh = exp_of(highest - now);
    *all_sum = *all_sum * old + sum * fresh;
    *all_highest = now;
    for (int64_t i = 0; i < d; i += L)
        f_store(all_values + i, f_fma(f_load(values + i), f_set(fresh), f_mul(f_load(all_values + i), f_set(old))));
}

static inline void put_row(const float* values, float sum, int64_t head_dim, float* out) {
    const float inverse = 1.0f / sum;
    for (int64_t i = 0; i < head_dim; i++) out[i] = values[i] * inverse;
}

template <class Int>
static void attend_item(const qwen2_attention& a, const Queries& queries, const Item& item, float* partials, const Room& room) {
    const int64_t d = padded(a.head_dim), bytes = cache_bytes(a.head_dim, a.bits);
    const int group = a.heads / a.kv_heads;
    const int64_t count = static_cast<int64_t>(item.tokens) * group;
    int64_t rows[MAX_ROWS];
    for (int64_t row = 0; row < count; row++) rows[row] = (item.token + row / group) * a.heads + item.kv_head * group + row % group;
    for (int64_t span = item.span; span < item.span + item.spans; span++) {
        const int64_t begin = span * SPAN, last = item.position + item.tokens - 1;
        const int64_t reached = begin > item.position ? (begin - item.position) * group : 0;  // rows before do not see this span
        for (int64_t row = 0; row < count; row++) room.span.highest[row] = -__builtin_inff(), room.span.sum[row] = 0.0f;
        for (int64_t i = 0; i < count * d; i++) room.span.values[i] = 0.0f;
        for (int64_t tile = begin; tile < begin + SPAN && tile <= last; tile += BLOCK) {
            const int64_t first = tile > item.position ? (tile - item.position) * group : 0;
            const int64_t head = a.offset + item.kv_head * bytes, block = item.block + tile / BLOCK;
            const Piece<Int> piece(a.blocks[block] + head, d);
            const bool ahead = tile + BLOCK <= last && tile + BLOCK < (item.span + item.spans) * SPAN;
            attend_tile<Int>(ahead ? a.blocks[block + 1] + head : nullptr, bytes, queries, rows, first, count, group, item.position, tile, d, piece, room);
        }
        if (item.partial >= 0) {
            for (int64_t row = 0; row < count; row++) {
                float* place = partials + (item.partial + row) * (d + 2);
                place[0] = room.span.highest[row], place[1] = room.span.sum[row];
                __builtin_memcpy(place + 2, room.span.values + row * d, static_cast<size_t>(d) * sizeof(float));
            }
            return;
        }
        for (int64_t row = reached; row < count; row++) {
            float* all = room.all.values + row * d;
            if (span == 0) {
                room.all.highest[row] = room.span.highest[row], room.all.sum[row] = room.span.sum[row];
                __builtin_memcpy(all, room.span.values + row * d, static_cast<size_t>(d) * sizeof(float));
            } else {
                merge(d, room.span.highest[row], room.span.sum[row], room.span.values + row * d, room.all.highest + row, room.all.sum + row, all);
            }
        }
    }
    for (int64_t row = 0; row < count; row++)
        put_row(room.all.values + row * d, room.all.sum[row], a.head_dim,
                a.out + (item.token + row / group) * a.out_stride + (item.kv_head * group + row % group) * static_cast<int64_t>(a.head_dim));
}

// The spans of tokens whose spans were items of their own: `first` is the item of span 0, the others follow it.
static void merge_item(const qwen2_attention& a, const Item* first, int64_t spans, const float* partials) {
    const int64_t d = padded(a.head_dim);
    const int group = a.heads / a.kv_heads;
    alignas(64) float values[MAX_DIM];
    for (int64_t row = 0; row < static_cast<int64_t>(first->tokens) * group; row++) {
        const float* place = partials + (first->partial + row) * (d + 2);
        float highest = place[0], sum = place[1];
        __builtin_memcpy(values, place + 2, static_cast<size_t>(d) * sizeof(float));
        for (int64_t span = 1; span < spans && span * SPAN <= first->position + row / group; span++) {
            place = partials + (first[span].partial + row) * (d + 2);
            merge(d, place[0], place[1], place + 2, &highest, &sum, values);
        }
        put_row(values, sum, a.head_dim, a.out + (first->token + row / group) * a.out_stride + (first->kv_head * group + row % group) * static_cast<int64_t>(a.head_dim));
    }
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
