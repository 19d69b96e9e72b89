// Causal attention inside the sequences of a ragged batch, forward and backward (FlashAttention-2, arXiv 2307.08691): tiles of 64 queries
// by 64 keys, a running softmax forward, probabilities computed again backward. Queries and keys come unrotated; numbers that lie in
// memory as bfloat16 are multiplied as pairs where the processor can, and else in float32; sums are float32. The work is cut by shapes alone: the same bits for any number of threads.
#ifndef QWEN2_TRAIN_ATTENTION_H
#define QWEN2_TRAIN_ATTENTION_H

#include "train_rows.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int64_t TILE = 64;             // queries, and keys
constexpr int ROW_BLOCK = 6, VECTOR_BLOCK = L == 8 ? 2 : 4;  // of a micro-kernel: what the registers hold
constexpr int64_t FEW_ITEMS = 16;        // pairs of sequence and kv head below which the heads of a group are items of their own

// What operands consist of: units of 32 bits that are a float, or a pair of bfloat16.
struct Floats {
    static constexpr int64_t PER = 1;
    static inline F multiply(F a, F b, F sum) { return f_fma(a, b, sum); }
};
#ifdef QWEN2_DOT_BF16
struct Pairs {
    static constexpr int64_t PER = 2;
    static inline F multiply(F a, F b, F sum) { return f_dot_bf16(a, b, sum); }
};
template <class T> struct OperandOf { typedef Floats type; };
template <> struct OperandOf<Bf16> { typedef Pairs type; };
#else
template <class T> struct OperandOf { typedef Floats type; };
#endif

// c[r][v] (+)= sum over k < count of a[r * ar + k * ak] * b[k * bk + v], R rows and V vectors.
template <class O, int R, int V>
static inline void block_product(const float* a, int64_t ar, int64_t ak, const float* b, int64_t bk, int64_t count, float* c, int64_t cr, bool add) {
    F sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = add ? f_load(c + r * cr + v * L) : f_zero();
    for (int64_t k = 0; k < count; k++) {
        F vectors[V];
        for (int v = 0; v < V; v++) vectors[v] = f_load(b + k * bk + v * L);
        for (int r = 0; r < R; r++) {
            const F one = f_set(a[r * ar + k * ak]);
            for (int v = 0; v < V; v++) sums[r][v] = O::multiply(one, vectors[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) f_store(c + r * cr + v * L, sums[r][v]);
}

template <class O, int R, int V>
static void block_rows(int rows, const float* a, int64_t ar, int64_t ak, const float* b, int64_t bk, int64_t count, float* c, int64_t cr, bool add) {
    if (rows >= R) block_product<O, R, V>(a, ar, ak, b, bk, count, c, cr, add);
    else if constexpr (R > 1) block_rows<O, R - 1, V>(rows, a, ar, ak, b, bk, count, c, cr, add);
}

// The same for up to ROW_BLOCK rows and any number of whole vectors.
template <class O>
static void block_of_rows(int rows, int64_t width, const float* a, int64_t ar, int64_t ak, const float* b, int64_t bk, int64_t count, float* c, int64_t cr, bool add) {
    int64_t v = 0;
    for (; v + VECTOR_BLOCK * L <= width; v += VECTOR_BLOCK * L) block_rows<O, ROW_BLOCK, VECTOR_BLOCK>(rows, a, ar, ak, b + v, bk, count, c + v, cr, add);
    if constexpr (VECTOR_BLOCK == 4)
        for (; v + 2 * L <= width; v += 2 * L) block_rows<O, ROW_BLOCK, 2>(rows, a, ar, ak, b + v, bk, count, c + v, cr, add);
    for (; v < width; v += L) block_rows<O, ROW_BLOCK, 1>(rows, a, ar, ak, b + v, bk, count, c + v, cr, add);
}

static inline int64_t whole_vectors(int64_t width) { return (width + L - 1) / L * L; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the step's numbers lie: memory of the caller, for every head and token W floats (d filled up to whole vectors), or as many
// pairs, which leave half of it free. Tiles of 64 tokens follow each other. Operands that are multiplied one by one have rows (..., W);
// those that vectors are loaded from have the summed dimension first, in units: tokens (units, W), or the numbers of a head (units, 64).
struct TrainRoom {
    int64_t W, padded;               // padded: tokens, every sequence filled up to whole tiles
    float *q, *q_by_token;           // rotated, times the scale; the second is the first where units are floats
    float *k_by_token, *v_by_token, *k_by_number, *v_by_number;
    float *dout, *dout_by_token;
    float *dq, *dk, *dv;             // sums, rows (W); dk and dv of every part
    float* delta;                    // one a token

    static int64_t floats(const qwen2_train_attention& s, int64_t padded, bool backward) {
        const int64_t W = whole_vectors(s.head_dim), H = s.heads, K = s.kv_heads;
        return padded * (backward ? (7 * H + 4 * K) * W + H : (H + 3 * K) * W) + 16;
    }
    TrainRoom(const qwen2_train_attention& s, int64_t padded_, bool backward, bool pairs) : W(whole_vectors(s.head_dim)), padded(padded_) {
        float* p = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(s.workspace) + 63) / 64 * 64);
        const auto take = [&](int64_t count) { float* place = p; p += count * padded; return place; };
        const int64_t H = s.heads, K = s.kv_heads;
        q = q_by_token = take(H * W), k_by_number = take(K * W), v_by_token = take(K * W);
        k_by_token = v_by_number = dout = dout_by_token = delta = dq = dk = dv = nullptr;
        if (!backward) return;
        k_by_token = take(K * W), v_by_number = take(K * W), dout = dout_by_token = take(H * W);
        dq = take(H * W), dk = take(H * W), dv = take(H * W), delta = take(H);
        if (pairs) q_by_token = take(H * W), dout_by_token = take(H * W);
    }
    float* rows(float* base, int64_t head, int64_t token) const { return base + (head * padded + token) * W; }  // or a tile that begins there
};

// A tile of tokens of one sequence: its place among all tokens, among the padded ones, in the sequence.
struct TokenTile {
    int64_t token, padded, position, count;
};

struct TileList {  // of all sequences, in order
    const int32_t* lengths;
    int32_t sequences;
    int64_t tiles;

    TileList(const int32_t* lengths_, int32_t sequences_) : lengths(lengths_), sequences(sequences_), tiles(0) {
        for (int32_t s = 0; s < sequences; s++) tiles += (lengths[s] + TILE - 1) / TILE;
    }
    TokenTile find(int64_t tile) const {
        int64_t token = 0, padded = 0;
        for (int32_t s = 0;; s++) {
            const int64_t own = (lengths[s] + TILE - 1) / TILE;
            if (tile < own) return {token + tile * TILE, padded + tile * TILE, tile * TILE, least(TILE, lengths[s] - tile * TILE)};
            tile -= own, token += lengths[s], padded += own * TILE;
        }
    }
};

// One head's row into float32: turned by the position's angles (the other way with `back`) where cos is not null, times a factor.
template <class From, class To>
static inline void turn_row(const From* in, const float* cos, const float* sin, bool back, int64_t d, float factor, To* out) {
    const F by = f_set(factor);
    if (cos == nullptr) {
        along(d, [&](int64_t i, auto part) { part.store(out + i, f_mul(part.load(in + i), by)); });
        return;
    }
    along(d / 2, [&](int64_t i, auto part) {
        const F first = part.load(in + i), second = part.load(in + d / 2 + i), c = f_mul(part.load(cos + i), by);
        const F s = f_mul(part.load(sin + i), back ? f_sub(f_zero(), by) : by);
        part.store(out + i, f_fnma(second, s, f_mul(first, c)));
        part.store(out + d / 2 + i, f_fma(first, s, f_mul(second, c)));
    });
}

static inline void clear(float* p, int64_t count) { __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(float)); }

// A tile's rows (64, W), floats, as operands. One by one: as they are, or (64, W / 2) pairs of neighbours.
static inline void by_row(Floats, const float* rows, int64_t W, float* out) { __builtin_memcpy(out, rows, static_cast<size_t>(TILE * W) * sizeof(float)); }
// Summed over tokens: as they are, or (32, W) pairs of a token and the next.
static inline void by_token(Floats, const float* rows, int64_t W, float* out) { by_row(Floats(), rows, W, out); }
#ifdef QWEN2_DOT_BF16
static inline void by_row(Pairs, const float* rows, int64_t W, float* out) {
    for (int64_t i = 0; i < TILE * W; i += L) put(reinterpret_cast<Bf16*>(out) + i, f_load(rows + i));
}
static inline void by_token(Pairs, const float* rows, int64_t W, float* out) {
    for (int64_t pair = 0; pair < TILE / 2; pair++)
        for (int64_t i = 0; i < W; i += L) f_store(out + pair * W + i, f_pair_bf16(f_load(rows + 2 * pair * W + i), f_load(rows + (2 * pair + 1) * W + i)));
}
#endif
// Summed over a head's numbers: what `by_row` makes, the other way round, (units, 64).
template <class O>
static inline void by_number(const float* rows, int64_t W, float* memory, float* out) {
    by_row(O(), rows, W, memory);
    const int64_t units = W / O::PER;
    for (int64_t w = 0; w < units; w += 16)  // pieces that stay in the first cache
        for (int64_t key = 0; key < TILE; key++)
            for (int64_t i = w; i < w + 16 && i < units; i++) __builtin_memcpy(out + i * TILE + key, memory + key * units + i, sizeof(float));
}

// Queries, keys and values of a tile, into the workspace; backward also the output's gradient, and its products with the output.
template <class T, class O>
static void prepare_tile(const qwen2_train_attention& s, const TrainRoom& room, const TokenTile& tile, bool backward, float* memory) {
    const int64_t d = s.head_dim, W = room.W, at = tile.padded;
    float *rows = memory, *more = memory + TILE * W;
    const auto read = [&](const void* base, int64_t stride, int64_t head, bool turned, float factor) {
        clear(rows, TILE * W);
        for (int64_t i = 0; i < tile.count; i++) {
            const int64_t token = tile.token + i;
            const float *cos = turned ? s.cos + token * (d / 2) : nullptr, *sin = turned ? s.sin + token * (d / 2) : nullptr;
            turn_row(static_cast<const T*>(base) + token * stride + head * d, cos, sin, false, d, factor, rows + i * W);
        }
    };
    const bool rotated = s.cos != nullptr;
    for (int64_t head = 0; head < s.heads; head++) {
        read(s.q, s.q_stride, head, rotated, s.scale);
        by_row(O(), rows, W, room.rows(room.q, head, at));
        if (backward && room.q_by_token != room.q) by_token(O(), rows, W, room.rows(room.q_by_token, head, at));
    }
    for (int64_t head = 0; head < s.kv_heads; head++) {
        read(s.k, s.k_stride, head, rotated, 1.0f);
        by_number<O>(rows, W, more, room.rows(room.k_by_number, head, at));
        if (backward) by_token(O(), rows, W, room.rows(room.k_by_token, head, at));
        read(s.v, s.v_stride, head, false, 1.0f);
        by_token(O(), rows, W, room.rows(room.v_by_token, head, at));
        if (backward) by_number<O>(rows, W, more, room.rows(room.v_by_number, head, at));
    }
    for (int64_t head = 0; backward && head < s.heads; head++) {
        read(s.dout, s.heads * d, head, false, 1.0f);
        by_row(O(), rows, W, room.rows(room.dout, head, at));
        if (room.dout_by_token != room.dout) by_token(O(), rows, W, room.rows(room.dout_by_token, head, at));
        for (int64_t i = 0; i < tile.count; i++) {
            F sum = f_zero();
            const T* out = static_cast<const T*>(s.out) + (tile.token + i) * s.heads * d + head * d;
            along(d, [&](int64_t n, auto part) { sum = f_fma(part.load(out + n), part.load(rows + i * W + n), sum); });
            room.delta[head * room.padded + at + i] = f_sum(sum);
        }
        clear(room.rows(room.dq, head, at), TILE * W);
    }
}

// Scores of a tile of queries (rows) against a tile of keys, each row as far as it can see, filled up to whole vectors: products of
// `a` (64, units) with `b` (units, 64).
template <class O>
static inline void tile_scores(const float* a, const float* b, int64_t W, int64_t rows, bool diagonal, float* out) {
    const int64_t units = W / O::PER;
    for (int64_t r = 0; r < rows; r += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - r), width = diagonal ? whole_vectors(r + count) : TILE;
        block_of_rows<O>(static_cast<int>(count), least(width, TILE), a + r * units, units, 1, b, TILE, units, out + r * TILE, TILE, false);
    }
}

// sums (rows, W) += weights (rows, 64 in units) times values (units, W)
template <class O>
static inline void tile_values(const float* weights, const float* values, int64_t W, int64_t rows, int64_t keys, bool diagonal, float* sums) {
    for (int64_t r = 0; r < rows; r += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, rows - r), seen = diagonal ? least(r + count, keys) : keys;
        block_of_rows<O>(static_cast<int>(count), W, weights + r * (TILE / O::PER), TILE / O::PER, 1, values, W, (seen + O::PER - 1) / O::PER, sums + r * W, W, true);
    }
}

// sums (keys, W) += weights' (rows in units, 64) times values (units, W): the other way round
template <class O>
static inline void tile_back(const float* weights, const float* values, int64_t W, int64_t rows, int64_t keys, bool diagonal, float* sums) {
    for (int64_t key = 0; key < keys; key += ROW_BLOCK) {
        const int64_t count = least(ROW_BLOCK, keys - key), from = (diagonal ? key : 0) / O::PER, units = (rows + O::PER - 1) / O::PER;
        if (from < units) block_of_rows<O>(static_cast<int>(count), W, weights + from * TILE + key, 1, TILE, values + from * W, W, units - from, sums + key * W, W, true);
    }
}

// A row of scores becomes weights: exp(score - shift) of the first `visible` of 64, zeros behind them; their sum.
static inline float weigh_row(float* scores, int64_t visible, float shift) {
    F sum = f_zero();
    for (int64_t i = 0; i < TILE; i += L) {
        F p = f_zero();
        if (i < visible) {
            p = f_exp(f_sub(f_load(scores + i), f_set(shift)));
            if (visible - i < L) p = f_keep_first(p, static_cast<int>(visible - i), f_zero());
        }
        f_store(scores + i, p);
        sum = f_add(sum, p);
    }
    return f_sum(sum);
}

static inline float highest_of(const float* scores, int64_t visible) {
    F top = f_set(-__builtin_inff());
    for (int64_t i = 0; i < visible; i += L) {
        const F v = f_load(scores + i);
        top = f_max(visible - i < L ? f_keep_first(v, static_cast<int>(visible - i), top) : v, top);
    }
    return f_highest(top);
}

// A tile of queries of one head against all keys that it sees.
template <class T, class O>
static void attend_forward(const qwen2_train_attention& s, const TrainRoom& room, const TokenTile& tile, int64_t head, float* memory) {
    const int64_t W = room.W, d = s.head_dim, kv = head / (s.heads / s.kv_heads), begin = tile.padded - tile.position;
    float *scores = memory, *sums = scores + TILE * TILE, *highest = sums + TILE * W, *total = highest + TILE, *units = O::PER == 1 ? scores : total + TILE;
    clear(sums, TILE * W);
    for (int64_t r = 0; r < TILE; r++) highest[r] = -__builtin_inff(), total[r] = 0.0f;
    for (int64_t key = 0; key <= tile.position; key += TILE) {
        const bool diagonal = key == tile.position;
        tile_scores<O>(room.rows(room.q, head, tile.padded), room.rows(room.k_by_number, kv, begin + key), W, tile.count, diagonal, scores);
        for (int64_t r = 0; r < tile.count; r++) {
            const int64_t visible = diagonal ? r + 1 : TILE;
            const float top = highest_of(scores + r * TILE, visible);
            if (!(top <= highest[r])) {  // a NaN stays one
                const float kept = key == 0 ? 0.0f : exp_of(highest[r] - top);
                highest[r] = top, total[r] *= kept;
                for (int64_t i = 0; i < W; i += L) f_store(sums + r * W + i, f_mul(f_load(sums + r * W + i), f_set(kept)));
            }
            total[r] += weigh_row(scores + r * TILE, visible, highest[r]);
        }
        if (units != scores) by_row(O(), scores, TILE, units);
        tile_values<O>(units, room.rows(room.v_by_token, kv, begin + key), W, tile.count, diagonal ? tile.count : TILE, diagonal, sums);
    }
    for (int64_t r = 0; r < tile.count; r++) {
        s.log_sums[head * s.tokens + tile.token + r] = highest[r] + __builtin_logf(total[r]);
        turn_row(sums + r * W, nullptr, nullptr, false, d, 1.0f / total[r], static_cast<T*>(s.out) + (tile.token + r) * s.heads * d + head * d);
    }
}

// One tile of keys against one tile of queries of one head: adds to the gradients of all three.
template <class O>
static void attend_backward(const qwen2_train_attention& s, const TrainRoom& room, const TokenTile& tile, int64_t head, int64_t kv, int64_t part, int64_t key, float* memory) {
    const int64_t W = room.W, begin = tile.padded - tile.position;
    float *weights = memory, *slopes = weights + TILE * TILE, *units = O::PER == 1 ? nullptr : slopes + TILE * TILE;
    const bool diagonal = key == tile.position;
    const int64_t keys = diagonal ? tile.count : TILE;
    tile_scores<O>(room.rows(room.q, head, tile.padded), room.rows(room.k_by_number, kv, begin + key), W, tile.count, diagonal, weights);
    tile_scores<O>(room.rows(room.dout, head, tile.padded), room.rows(room.v_by_number, kv, begin + key), W, tile.count, diagonal, slopes);
    for (int64_t r = 0; r < tile.count; r++) {
        float *p = weights + r * TILE, *ds = slopes + r * TILE;
        const int64_t visible = diagonal ? r + 1 : TILE;
        weigh_row(p, visible, s.log_sums[head * s.tokens + tile.token + r]);
        const F delta = f_set(room.delta[head * room.padded + tile.padded + r]);
        for (int64_t i = 0; i < TILE; i += L) f_store(ds + i, i < visible ? f_mul(f_load(p + i), f_sub(f_load(ds + i), delta)) : f_zero());
    }
    if (O::PER == 2 && tile.count % 2) clear(weights + tile.count * TILE, TILE), clear(slopes + tile.count * TILE, TILE);  // the last one's partner
    float *q = room.rows(room.q_by_token, head, tile.padded), *dout = room.rows(room.dout_by_token, head, tile.padded), *back = weights;
    if (units != nullptr) by_token(O(), weights, TILE, back = units);
    tile_back<O>(back, dout, W, tile.count, keys, diagonal, room.rows(room.dv, part, begin + key));
    if (units != nullptr) by_token(O(), slopes, TILE, units);
    tile_back<O>(units != nullptr ? units : slopes, q, W, tile.count, keys, diagonal, room.rows(room.dk, part, begin + key));
    if (units != nullptr) by_row(O(), slopes, TILE, units);
    tile_values<O>(units != nullptr ? units : slopes, room.rows(room.k_by_token, kv, begin + key), W, tile.count, keys, diagonal, room.rows(room.dq, head, tile.padded));
}

// The gradients of a tile's tokens as the caller takes them: turned back, the parts of a kv head added up.
template <class T>
static void finish_tile(const qwen2_train_attention& s, const TrainRoom& room, const TokenTile& tile, int64_t parts) {
    const int64_t d = s.head_dim, W = room.W;
    for (int64_t i = 0; i < tile.count; i++) {
        const int64_t token = tile.token + i, at = tile.padded + i;
        const float *cos = s.cos == nullptr ? nullptr : s.cos + token * (d / 2), *sin = s.cos == nullptr ? nullptr : s.sin + token * (d / 2);
        for (int64_t head = 0; head < s.heads; head++)
            turn_row(room.rows(room.dq, head, at), cos, sin, true, d, s.scale, static_cast<T*>(s.dq) + token * s.dq_stride + head * d);
        for (int64_t head = 0; head < s.kv_heads; head++) {
            float *dk = room.rows(room.dk, head * parts, at), *dv = room.rows(room.dv, head * parts, at);
            for (int64_t part = 1; part < parts; part++)
                for (int64_t w = 0; w < W; w += L) {
                    f_store(dk + w, f_add(f_load(dk + w), f_load(room.rows(room.dk, head * parts + part, at) + w)));
                    f_store(dv + w, f_add(f_load(dv + w), f_load(room.rows(room.dv, head * parts + part, at) + w)));
                }
            turn_row(dk, cos, sin, true, d, 1.0f, static_cast<T*>(s.dk) + token * s.dk_stride + head * d);
            turn_row(dv, nullptr, nullptr, true, d, 1.0f, static_cast<T*>(s.dv) + token * s.dv_stride + head * d);
        }
    }
}

template <class T>
static int train_attention(const qwen2_train_attention& s, bool backward) {
    typedef typename OperandOf<T>::type O;
    const TileList list(s.lengths, s.sequences);
    const int64_t H = s.heads, group = s.heads / s.kv_heads;
    const TrainRoom room(s, list.tiles * TILE, backward, O::PER == 2);
    const size_t bytes = static_cast<size_t>(TILE * (3 * TILE + 2 * room.W + 2)) * sizeof(float);
    Failure failure;
    const auto with_memory = [&](int tiles, auto&& work) {
        for_lent_tiles(tiles, [&](int tile, int thread) {
            float* memory = static_cast<float*>(scratch(thread, PRODUCT, bytes));
            if (memory == nullptr) failure.note();
            else work(tile, memory);
        });
        return failure.happened() ? NO_MEMORY : 0;
    };
    int code = with_memory(static_cast<int>(list.tiles), [&](int tile, float* memory) { prepare_tile<T, O>(s, room, list.find(tile), backward, memory); });
    if (code != 0) return code;
    if (!backward)  // the longest first, so that the threads end together
        return with_memory(static_cast<int>(list.tiles * H), [&](int item, float* memory) { attend_forward<T, O>(s, room, list.find(list.tiles - 1 - item / H), item % H, memory); });
    const int64_t parts = s.sequences * s.kv_heads >= FEW_ITEMS ? 1 : group, heads = group / parts, items = s.kv_heads * parts;
    code = with_memory(static_cast<int>(s.sequences * items), [&](int item, float* memory) {
        int64_t first = 0;
        for (int64_t sequence = 0; sequence < item / items; sequence++) first += (s.lengths[sequence] + TILE - 1) / TILE;
        const int64_t tiles = (s.lengths[item / items] + TILE - 1) / TILE, part = item % items;
        for (int64_t key = 0; key < tiles; key++) {
            clear(room.rows(room.dk, part, (first + key) * TILE), TILE * room.W), clear(room.rows(room.dv, part, (first + key) * TILE), TILE * room.W);
            for (int64_t head = part * heads; head < (part + 1) * heads; head++)
                for (int64_t tile = key; tile < tiles; tile++) attend_backward<O>(s, room, list.find(first + tile), head, part / parts, part, key * TILE, memory);
        }
    });
    if (code != 0) return code;
    for_lent_tiles(static_cast<int>(list.tiles), [&](int tile, int) { finish_tile<T>(s, room, list.find(tile), parts); });
    return 0;
}

static int64_t train_attention_bytes(const qwen2_train_attention& s, bool backward) {
    return TrainRoom::floats(s, TileList(s.lengths, s.sequences).tiles * TILE, backward) * static_cast<int64_t>(sizeof(float));
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
