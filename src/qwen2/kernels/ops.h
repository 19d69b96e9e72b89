// The operations of a layer: several products of one normed input, and the whole feed-forward part. Phases follow each other with
// nothing between them but the pool's count of finished tiles.
#ifndef QWEN2_OPS_H
#define QWEN2_OPS_H

#include "added.h"
#include "exp.h"

namespace qwen2 {
namespace QWEN2_ISA {

struct TypeKernels {
    Type type;
    int block, bytes;
    bool quantized;
    void (*pack)(const uint8_t* blocks, int64_t row_bytes, int rows, int64_t units, uint8_t* out);
    void (*unpack)(const uint8_t* packed, int64_t columns, int64_t row, float* out);
    void (*unpack_tile)(const uint8_t* packed, int64_t columns, int64_t tile, float* out);
    bool (*panel)(const uint8_t* packed, int64_t rows, int64_t first_row, const Activations& x, int64_t n, float* out, int thread);
};

template <class Fmt>
constexpr TypeKernels quantized_kernels() {
    return {Fmt::TYPE, Fmt::BLOCK, Fmt::BYTES, true, pack_tile<Fmt>, unpack_quantized<Fmt>, unpack_quantized_tile<Fmt>, quantized_panel<Fmt>};
}
template <Type TYPE>
constexpr TypeKernels float_kernels() {
    return {TYPE, 1, float_bytes<TYPE>(), false, pack_float_tile<TYPE>, unpack_floats<TYPE>, unpack_float_tile<TYPE>, float_panel<TYPE>};
}

static const TypeKernels KERNELS[] = {
    float_kernels<F32>(), float_kernels<F16>(), float_kernels<BF16>(),
    quantized_kernels<FormatQ4_0>(), quantized_kernels<FormatQ4_1>(), quantized_kernels<FormatQ5_0>(), quantized_kernels<FormatQ5_1>(),
    quantized_kernels<FormatQ8_0>(), quantized_kernels<FormatIQ4_NL>(), quantized_kernels<FormatQ2_K>(), quantized_kernels<FormatQ3_K>(),
    quantized_kernels<FormatQ4_K>(), quantized_kernels<FormatQ5_K>(), quantized_kernels<FormatQ6_K>(),
};

static const TypeKernels* kernels_of(int32_t type) {
    for (const TypeKernels& kernels : KERNELS)
        if (kernels.type == type) return &kernels;
    return nullptr;
}

static int64_t tiles_of(int64_t rows) { return (rows + L - 1) / L; }

static int64_t packed_bytes(int32_t type, int64_t rows, int64_t columns) {
    const TypeKernels* kernels = kernels_of(type);
    if (kernels == nullptr || rows < 0 || columns < 0 || columns % kernels->block != 0) return -1;
    return tiles_of(rows) * L * (columns / kernels->block) * kernels->bytes;
}

static int pack(int32_t type, int64_t rows, int64_t columns, const void* blocks, int64_t first, int64_t count, void* packed) {
    const TypeKernels* kernels = kernels_of(type);
    if (kernels == nullptr || packed_bytes(type, rows, columns) < 0 || first % L != 0 || first < 0 || count < 0 || first + count > rows) return NOT_SUPPORTED;
    const int64_t units = columns / kernels->block, row_bytes = units * kernels->bytes;
    constexpr int TILES_A_CLAIM = 4;
    for_tiles(static_cast<int>((tiles_of(count) + TILES_A_CLAIM - 1) / TILES_A_CLAIM), [&](int claim, int) {
        for (int64_t row = static_cast<int64_t>(claim) * TILES_A_CLAIM * L; row < (claim + 1) * TILES_A_CLAIM * L && row < count; row += L) {
            const int in_tile = static_cast<int>(count - row < L ? count - row : L);
            kernels->pack(static_cast<const uint8_t*>(blocks) + row * row_bytes, row_bytes, in_tile, units,
                          static_cast<uint8_t*>(packed) + (first + row) * row_bytes);
        }
    });
    return 0;
}

// Whole matrices out of a file: a claim is some tiles of one matrix, read into a thread's own memory and packed from there.
static int pack_file(int32_t file, const qwen2_matrix* const* matrices, const int64_t* offsets, int64_t count) {
    constexpr int64_t A_CLAIM = 1 << 18;  // bytes, which stay in the cache between reading and packing
    if (!POSITIONED_READS) return NOT_SUPPORTED;
    const auto row_bytes = [](const qwen2_matrix& m) { return m.columns / kernels_of(m.type)->block * kernels_of(m.type)->bytes; };
    const auto claim_tiles = [&](const qwen2_matrix& m) {
        const int64_t tiles = A_CLAIM / (L * (row_bytes(m) > 0 ? row_bytes(m) : 1));
        return tiles < 1 ? 1 : tiles;
    };
    int64_t claims = 0;
    for (int64_t i = 0; i < count; i++) {
        if (packed_bytes(matrices[i]->type, matrices[i]->rows, matrices[i]->columns) < 0 || matrices[i]->lanes != L) return NOT_SUPPORTED;
        claims += (tiles_of(matrices[i]->rows) + claim_tiles(*matrices[i]) - 1) / claim_tiles(*matrices[i]);
    }
    if (claims > MAX_TILES) return NOT_SUPPORTED;
    Failure memory, reading;
    for_tiles(static_cast<int>(claims), [&](int claim, int thread) {
        int64_t left = claim, i = 0;
        for (;; i++) {
            const int64_t own = (tiles_of(matrices[i]->rows) + claim_tiles(*matrices[i]) - 1) / claim_tiles(*matrices[i]);
            if (left < own) break;
            left -= own;
        }
        const qwen2_matrix& m = *matrices[i];
        const int64_t bytes = row_bytes(m), first = left * claim_tiles(m) * L;
        const int64_t last = first + claim_tiles(m) * L < m.rows ? first + claim_tiles(m) * L : m.rows;
        uint8_t* blocks = static_cast<uint8_t*>(scratch(thread, PRODUCT, static_cast<size_t>((last - first) * bytes)));
        if (blocks == nullptr) {
            memory.note();
            return;
        }
        if (!read_at(file, offsets[i] + first * bytes, blocks, static_cast<size_t>((last - first) * bytes))) {
            reading.note();
            return;
        }
        uint8_t* packed = static_cast<uint8_t*>(const_cast<void*>(m.packed));
        for (int64_t row = first; row < last; row += L) {
            const int in_tile = static_cast<int>(last - row < L ? last - row : L);
            kernels_of(m.type)->pack(blocks + (row - first) * bytes, bytes, in_tile, m.columns / kernels_of(m.type)->block, packed + row * bytes);
        }
    });
    return memory.happened() ? NO_MEMORY : reading.happened() ? NOT_READ : 0;
}

// Whether L named rows are those of a whole tile.
static inline bool a_tile(const int64_t* rows, const qwen2_matrix* matrix) {
    if (rows[0] % L != 0 || rows[0] + L > matrix->rows) return false;
    for (int i = 1; i < L; i++)
        if (rows[i] != rows[0] + i) return false;
    return true;
}

// On the threads that were lent: between torch's products its own spin.
static int unpack_rows(const qwen2_matrix* matrix, const int64_t* rows, int64_t count, float* out) {
    const TypeKernels* kernels = kernels_of(matrix->type);
    if (kernels == nullptr || matrix->lanes != L) return NOT_SUPPORTED;
    constexpr int64_t ROWS_A_CLAIM = 16;
    const uint8_t* packed = static_cast<const uint8_t*>(matrix->packed);
    for_lent_tiles(static_cast<int>((count + ROWS_A_CLAIM - 1) / ROWS_A_CLAIM), [&](int claim, int) {
        const int64_t end = (claim + 1) * ROWS_A_CLAIM < count ? (claim + 1) * ROWS_A_CLAIM : count;
        for (int64_t i = claim * ROWS_A_CLAIM; i < end;) {
            if (i + L <= end && a_tile(rows + i, matrix)) {
                kernels->unpack_tile(packed, matrix->columns, rows[i] / L, out + i * matrix->columns);
                i += L;
            } else {
                kernels->unpack(packed, matrix->columns, rows[i], out + i * matrix->columns);
                i++;
            }
        }
    });
    return 0;
}

// From the file's layout: a block at a time becomes a tile of one row, which is then read as any tile.
static int unpack_blocks(int32_t type, int64_t columns, const void* blocks, const int64_t* rows, int64_t count, float* out) {
    const TypeKernels* kernels = kernels_of(type);
    if (kernels == nullptr || columns % kernels->block != 0) return NOT_SUPPORTED;
    const int64_t row_bytes = columns / kernels->block * kernels->bytes;
    alignas(64) uint8_t tile[256 * L];  // of one unit: at most 210 bytes a row
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < columns; k += kernels->block) {
            const uint8_t* block = static_cast<const uint8_t*>(blocks) + rows[i] * row_bytes + k / kernels->block * kernels->bytes;
            kernels->pack(block, 0, 1, 1, tile);
            kernels->unpack(tile, kernels->block, 0, out + i * columns + k);
        }
    return 0;
}

// ---- preparing the input

// Norms and quantizes what the matrices need of x; `view` gets it. False where there is no memory.
static bool prepare(const float* x, int64_t n, int64_t columns, int64_t stride, const float* norm, float eps, bool quantized, Activations* view) {
    float* normed = nullptr;
    if (norm != nullptr) {
        normed = static_cast<float*>(shared_scratch(NORMED, static_cast<size_t>(n * columns) * sizeof(float)));
        if (normed == nullptr) return false;
    }
    const float* source = norm == nullptr ? x : normed;
    const int64_t source_stride = norm == nullptr ? stride : columns;
    void* memory = quantized ? shared_scratch(QUANTIZED, static_cast<size_t>(ActivationMemory::bytes(n, columns))) : nullptr;
    if (quantized && memory == nullptr) return false;
    const ActivationMemory place(memory, n, columns);
    const auto one = [&](int64_t t) {
        if (norm != nullptr) norm_row(x + t * stride, norm, eps, columns, normed + t * columns);
        if (quantized) quantize_row(source + t * source_stride, place, t);
    };
    constexpr int64_t A_CLAIM = 8, ALONE = 2;  // tokens; fewer are done before another thread would have begun
    if (norm != nullptr || quantized) {
        if (n <= ALONE)
            for (int64_t t = 0; t < n; t++) one(t);
        else
            for_tiles(static_cast<int>((n + A_CLAIM - 1) / A_CLAIM), [&](int claim, int) {
                for (int64_t t = claim * A_CLAIM; t < (claim + 1) * A_CLAIM && t < n; t++) one(t);
            });
    }
    *view = place.view(source, source_stride);
    return true;
}

// ---- products

// A panel's product, bias added, stored or added to `out`.
static inline void finish(const float* y, int64_t n, const float* bias, int64_t rows, float* out, int64_t stride, bool add) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t row = 0; row < rows; row += L) {
            const int lanes = static_cast<int>(rows - row < L ? rows - row : L);
            float* place = out + t * stride + row;
            F v = f_load(y + t * PANEL + row);
            if (bias != nullptr) v = f_add(v, lanes == L ? f_load(bias + row) : f_load_first(bias + row, lanes));
            if (add) v = f_add(lanes == L ? f_load(place) : f_load_first(place, lanes), v);
            if (lanes == L) f_store(place, v);
            else f_store_first(place, v, lanes);
        }
}

static int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

// `panel` of several matrices laid end to end: which matrix, and its first row.
static inline int find_panel(const qwen2_matrix* const* matrices, int count, int64_t* panel) {
    for (int i = 0; i < count; i++) {
        if (*panel < panels_of(matrices[i]->rows)) return i;
        *panel -= panels_of(matrices[i]->rows);
    }
    return count;
}

static int multiply_prepared(const Activations& x, int64_t n, const qwen2_product* p, const Added& added) {
    int64_t panels = 0;
    for (int i = 0; i < p->count; i++) panels += panels_of(p->matrices[i]->rows);
    Failure failure;
    for_tiles(static_cast<int>(panels), [&](int tile, int thread) {
        int64_t panel = tile;
        const int i = find_panel(p->matrices, p->count, &panel);
        const qwen2_matrix& m = *p->matrices[i];
        const int64_t row = panel * PANEL, rows = m.rows - row < PANEL ? m.rows - row : PANEL;
        float* y = static_cast<float*>(scratch(thread, PRODUCT, static_cast<size_t>(n) * PANEL * sizeof(float)));
        if (y == nullptr || !kernels_of(m.type)->panel(static_cast<const uint8_t*>(m.packed), m.rows, row, x, n, y, thread) ||
            !added.to_panel(i, row, rows, y, thread)) {
            failure.note();
            return;
        }
        finish(y, n, m.bias == nullptr ? nullptr : m.bias + row, rows, p->outs[i] + row, p->out_strides[i], p->add != 0);
    });
    return failure.happened() ? NO_MEMORY : 0;
}

static bool fit(const qwen2_matrix* m, int64_t columns) { return kernels_of(m->type) != nullptr && m->columns == columns && m->lanes == L; }
static bool takes_int8(const qwen2_matrix* m) { return kernels_of(m->type)->quantized; }

static int multiply(const qwen2_product* p) {
    if (p->n == 0 || p->count == 0) return 0;
    const int64_t columns = p->matrices[0]->columns;
    bool quantized = false;
    for (int i = 0; i < p->count; i++) {
        if (!fit(p->matrices[i], columns)) return NOT_SUPPORTED;
        quantized |= takes_int8(p->matrices[i]);
    }
    Activations x;
    if (!prepare(p->x, p->n, columns, p->x_stride, p->norm, p->eps, quantized, &x)) return NO_MEMORY;
    Added added;
    const int code = added.prepare(p->additions, 0, x, p->n, p->matrices, p->count);
    return code ? code : multiply_prepared(x, p->n, p, added);
}

// ---- the feed-forward part

static inline F silu(F v) { return f_div(v, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), v)))); }

struct Hidden {  // silu(gate) * up of every token, as `down` takes it
    ActivationMemory quantized;
    float* floats;
    int64_t width;
    bool as_int8;

    void put(int64_t t, int64_t row, int64_t rows, const float* gate, const float* up) const {
        alignas(64) float h[PANEL];
        for (int i = 0; i < PANEL; i += L) f_store(h + i, f_mul(silu(f_load(gate + i)), f_load(up + i)));
        if (as_int8) quantize_group(h, quantized, t, row / 32);
        if (floats != nullptr) __builtin_memcpy(floats + t * width + row, h, static_cast<size_t>(rows) * sizeof(float));
    }
};

// Memory for the hidden numbers of `n` rows; `adapted`: as floats too. False where there is none.
static bool make_hidden(int64_t n, const qwen2_matrix* down, Shared use, bool adapted, Hidden* hidden) {
    const int64_t width = down->columns;
    const bool as_int8 = takes_int8(down);
    const size_t floats = static_cast<size_t>(n * width) * sizeof(float);
    void* memory = shared_scratch(use, as_int8 ? static_cast<size_t>(ActivationMemory::bytes(n, width)) : floats);
    void* beside = as_int8 && adapted ? shared_scratch(HIDDEN_FLOATS, floats) : memory;
    if (memory == nullptr || beside == nullptr) return false;
    *hidden = {ActivationMemory(as_int8 ? memory : nullptr, n, width), as_int8 && !adapted ? nullptr : static_cast<float*>(beside), width, as_int8};
    return true;
}

// One panel of gate and up for n tokens into rows `first` .. of the hidden numbers.
static bool gated_panel(const qwen2_matrix& gate, const qwen2_matrix& up, int64_t panel, const Activations& x, int64_t n, int64_t first,
                        const Hidden& hidden, const Added& added, int thread) {
    const size_t bytes = static_cast<size_t>(n) * PANEL * sizeof(float);
    const int64_t row = panel * PANEL, rows = gate.rows - row < PANEL ? gate.rows - row : PANEL;
    float* g = static_cast<float*>(scratch(thread, PRODUCT, bytes));
    float* u = static_cast<float*>(scratch(thread, SECOND_PRODUCT, bytes));
    if (g == nullptr || u == nullptr) return false;
    if (rows < PANEL) __builtin_memset(g, 0, bytes), __builtin_memset(u, 0, bytes);
    if (!kernels_of(gate.type)->panel(static_cast<const uint8_t*>(gate.packed), gate.rows, row, x, n, g, thread)) return false;
    if (!kernels_of(up.type)->panel(static_cast<const uint8_t*>(up.packed), up.rows, row, x, n, u, thread)) return false;
    if (!added.to_panel(0, row, rows, g, thread) || !added.to_panel(1, row, rows, u, thread)) return false;
    for (int64_t t = 0; t < n; t++) hidden.put(first + t, row, rows, g + t * PANEL, u + t * PANEL);
    return true;
}

static int feed(const qwen2_feed_forward* p) {
    if (p->n == 0) return 0;
    const int64_t columns = p->gate->columns;
    if (!fit(p->gate, columns) || !fit(p->up, columns) || !fit(p->down, p->gate->rows) || p->up->rows != p->gate->rows || p->down->rows != columns)
        return NOT_SUPPORTED;
    Activations x;
    if (!prepare(p->x, p->n, columns, p->x_stride, p->norm, p->eps, takes_int8(p->gate) || takes_int8(p->up), &x)) return NO_MEMORY;
    Hidden hidden = {ActivationMemory(nullptr, 0, 0), nullptr, 0, false};
    if (!make_hidden(p->n, p->down, SECOND_QUANTIZED, p->additions != nullptr, &hidden)) return NO_MEMORY;
    Added added;
    const qwen2_matrix* const both[] = {p->gate, p->up};
    int code = added.prepare(p->additions, 0, x, p->n, both, 2);
    if (code) return code;
    Failure failure;
    for_tiles(static_cast<int>(panels_of(p->gate->rows)), [&](int panel, int thread) {
        if (!gated_panel(*p->gate, *p->up, panel, x, p->n, 0, hidden, added, thread)) failure.note();
    });
    if (failure.happened()) return NO_MEMORY;
    const int64_t stride = p->x_stride;
    const qwen2_product down = {nullptr, nullptr, &p->down, &p->x, &stride, p->n, 0, 0.0f, 1, 1, nullptr};
    const Activations hidden_x = hidden.quantized.view(hidden.floats, hidden.width);
    code = added.prepare(p->additions, 2, hidden_x, p->n, &p->down, 1);
    return code ? code : multiply_prepared(hidden_x, p->n, &down, added);
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
