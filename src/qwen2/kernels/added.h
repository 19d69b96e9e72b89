// Low-rank adapters (LoRA) beside a product: the output row of a token that has one is share * (W x + scale * B (A x)) + bias, of any
// other token W x + bias as ever, with the same bits. Tokens of several adapters lie in one batch; those of one adapter go together.
// A and B are matrices of floats, so that each number is one chain of additions, whoever else is there (float_product.h).
#ifndef QWEN2_ADDED_H
#define QWEN2_ADDED_H

#include "unpack.h"

namespace qwen2 {
namespace QWEN2_ISA {

typedef bool (*Panel)(const uint8_t* packed, int64_t rows, int64_t first_row, const Activations& x, int64_t n, float* out, int thread);

static inline Panel float_panel_of(int32_t type) {  // nullptr for blocks
    return type == F32 ? float_panel<F32> : type == F16 ? float_panel<F16> : type == BF16 ? float_panel<BF16> : nullptr;
}

static inline bool floats_of(const qwen2_matrix* m, int64_t rows, int64_t columns) {
    return float_panel_of(m->type) != nullptr && m->lanes == L && (rows < 0 || m->rows == rows) && m->columns == columns;
}

// What the adapters of a step's tokens add to one product's matrices.
class Added {
  public:
    // Computes scale * A x of every token for each of `count` matrices, the first of which has the adapters' addition `first`.
    // 0, or NO_MEMORY, or NOT_SUPPORTED for additions of another shape.
    int prepare(const qwen2_additions* step, int32_t first, const Activations& x, int64_t n, const qwen2_matrix* const* matrices, int count) {
        step_ = nullptr;
        if (step == nullptr) return 0;
        first_ = first + step->first;
        const size_t lists = static_cast<size_t>(step->count + 1 + n) * sizeof(int32_t);
        starts_ = static_cast<int32_t*>(shared_scratch(ADAPTED_ROWS, lists));
        if (starts_ == nullptr) return NO_MEMORY;
        order_ = starts_ + step->count + 1;
        sort(step, n);
        total_ = starts_[step->count], rank_ = 0;
        for (int32_t g = 0; g < step->count; g++)
            for (int i = 0; i < count && starts_[g + 1] > starts_[g]; i++) {
                const qwen2_addition& one = step->adapters[g][first_ + i];
                if (one.a == nullptr) continue;
                if (!floats_of(one.a, -1, x.columns) || !floats_of(one.b, matrices[i]->rows, one.a->rows)) return NOT_SUPPORTED;
                rank_ = one.a->rows > rank_ ? one.a->rows : rank_;
            }
        if (total_ == 0 || rank_ == 0) return 0;
        inner_ = static_cast<float*>(shared_scratch(ADAPTED, static_cast<size_t>(count * total_ * rank_) * sizeof(float)));
        if (inner_ == nullptr) return NO_MEMORY;
        step_ = step;
        int64_t claims = 0;
        for (int32_t g = 0; g < step->count; g++) claims += claims_of(g);
        Failure failure;
        for_tiles(static_cast<int>(claims * count), [&](int claim, int thread) {
            int64_t left = claim / count;
            int32_t g = 0;
            for (; left >= claims_of(g); g++) left -= claims_of(g);
            if (!inner(g, claim % count, starts_[g] + left * TOGETHER, x, thread)) failure.note();
        });
        return failure.happened() ? NO_MEMORY : 0;
    }

    // Adds to a panel's product y, [token][PANEL], `rows` rows of matrix i from `row` on. False where there is no memory.
    bool to_panel(int i, int64_t row, int64_t rows, float* y, int thread) const {
        if (step_ == nullptr) return true;
        for (int32_t g = 0; g < step_->count; g++) {
            const qwen2_addition& one = step_->adapters[g][first_ + i];
            if (one.a == nullptr) continue;
            for (int64_t from = starts_[g]; from < starts_[g + 1]; from += TOGETHER) {
                alignas(64) float part[TOGETHER * PANEL];
                const int64_t m = tokens(g, from);
                const float* x = inner_ + (i * total_ + from) * rank_;
                const Activations mine = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, x, one.b->columns, rank_, nullptr};
                if (!float_panel_of(one.b->type)(static_cast<const uint8_t*>(one.b->packed), one.b->rows, row, mine, m, part, thread)) return false;
                for (int64_t t = 0; t < m; t++) add(part + t * PANEL, one.share == nullptr ? nullptr : one.share + row, rows, y + order_[from + t] * PANEL);
            }
        }
        return true;
    }

  private:
    static constexpr int64_t TOGETHER = 2 * FLOAT_TOKENS;  // tokens of one adapter, and of one claim

    const qwen2_additions* step_ = nullptr;  // null: nothing is added
    int32_t first_ = 0;
    int32_t *starts_ = nullptr, *order_ = nullptr;  // adapter g has the tokens order_[starts_[g]] .. order_[starts_[g + 1] - 1]
    float* inner_ = nullptr;                        // [matrix][place in order_][rank_]
    int64_t total_ = 0, rank_ = 0;

    int64_t tokens(int32_t g, int64_t from) const { return starts_[g + 1] - from < TOGETHER ? starts_[g + 1] - from : TOGETHER; }
    int64_t claims_of(int32_t g) const { return (starts_[g + 1] - starts_[g] + TOGETHER - 1) / TOGETHER; }

    void sort(const qwen2_additions* step, int64_t n) {
        for (int32_t g = 0; g <= step->count; g++) starts_[g] = 0;
        for (int64_t t = 0; t < n; t++)
            if (step->which[t] >= 0) starts_[step->which[t] + 1]++;
        for (int32_t g = 0; g < step->count; g++) starts_[g + 1] += starts_[g];
        for (int64_t t = 0; t < n; t++)
            if (step->which[t] >= 0) order_[starts_[step->which[t]]++] = static_cast<int32_t>(t);
        for (int32_t g = step->count; g > 0; g--) starts_[g] = starts_[g - 1];
        starts_[0] = 0;
    }

    bool inner(int32_t g, int i, int64_t from, const Activations& x, int thread) const {
        const qwen2_addition& one = step_->adapters[g][first_ + i];
        if (one.a == nullptr) return true;
        alignas(64) float part[TOGETHER * PANEL];
        const int64_t m = tokens(g, from);
        Activations mine = x;
        mine.rows = order_ + from;
        for (int64_t row = 0; row < one.a->rows; row += PANEL) {
            if (!float_panel_of(one.a->type)(static_cast<const uint8_t*>(one.a->packed), one.a->rows, row, mine, m, part, thread)) return false;
            const int64_t rows = one.a->rows - row < PANEL ? one.a->rows - row : PANEL;
            for (int64_t t = 0; t < m; t++)
                for (int64_t k = 0; k < rows; k++) inner_[(i * total_ + from + t) * rank_ + row + k] = one.scale * part[t * PANEL + k];
        }
        return true;
    }

    static void add(const float* part, const float* share, int64_t rows, float* y) {
        for (int64_t row = 0; row < rows; row += L) {
            const int lanes = static_cast<int>(rows - row < L ? rows - row : L);
            F v = f_add(f_load(y + row), f_load(part + row));
            if (share != nullptr) v = f_mul(v, lanes == L ? f_load(share + row) : f_load_first(share + row, lanes));
            f_store(y + row, v);
        }
    }
};

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
