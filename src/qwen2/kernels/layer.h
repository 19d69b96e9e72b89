// A whole layer for one step, and two small operations beside the layers: the norm alone and the largest of a row.
#ifndef QWEN2_LAYER_H
#define QWEN2_LAYER_H

#include "attend.h"
#include "moe.h"

namespace qwen2 {
namespace QWEN2_ISA {

static int norm(const float* x, int64_t n, int64_t columns, int64_t x_stride, const float* weight, float eps, float* out) {
    constexpr int64_t A_CLAIM = 8;
    for_tiles(static_cast<int>((n + A_CLAIM - 1) / A_CLAIM), [&](int claim, int) {
        for (int64_t t = claim * A_CLAIM; t < (claim + 1) * A_CLAIM && t < n; t++) norm_row(x + t * x_stride, weight, eps, columns, out + t * columns);
    });
    return 0;
}

// Block by block, so that only the block that holds the largest is searched for its place.
static inline void argmax_row(const float* x, int64_t columns, int64_t* place, float* value) {
    constexpr int64_t STEP = 64 * L;
    float highest = -__builtin_inff();
    int64_t found = 0;
    for (int64_t from = 0; from < columns; from += STEP) {
        const int64_t to = from + STEP < columns ? from + STEP : columns;
        F top = f_set(-__builtin_inff());
        I bits = i_zero();
        int64_t i = from;
        for (; i + L <= to; i += L) {
            const F v = f_load(x + i);
            top = f_max(v, top);
            bits = i_max(bits, i_and(i_bits(v), i_set(0x7fffffff)));
        }
        float block = f_highest(top);
        bool clean = i_highest(bits) <= 0x7f800000;  // above it are NaNs
        for (; i < to; i++) {
            clean = clean && x[i] == x[i];
            block = x[i] > block ? x[i] : block;
        }
        if (!clean) {
            for (i = from; x[i] == x[i];) i++;
            *place = i, *value = x[i];
            return;
        }
        if (block > highest) highest = block, found = from;
    }
    while (x[found] != highest) found++;  // a row of nothing but -inf ends at its first
    *place = found, *value = highest;
}

static int argmax(const float* x, int64_t n, int64_t columns, int64_t x_stride, int64_t* places, float* values) {
    if (columns < 1) return NOT_SUPPORTED;
    for_tiles(static_cast<int>(n), [&](int row, int) { argmax_row(x + row * x_stride, columns, places + row, values + row); });
    return 0;
}

// The same step's additions, those of a layer from `number` on.
static const qwen2_additions* from(const qwen2_additions* additions, int32_t number, qwen2_additions* place) {
    if (additions == nullptr) return nullptr;
    *place = *additions;
    place->first += number;
    return place;
}

// What follows attention, for n rows: the output product and the feed-forward part, added to x.
static int run_rest(const qwen2_layer* layer, const float* attended, float* x, int64_t n, float* router_logits, const qwen2_additions* additions) {
    qwen2_additions output, rest;
    qwen2_product second = *layer->output;
    second.x = attended, second.n = n, second.outs = &x, second.additions = from(additions, QWEN2_OUTPUT_ADDITION, &output);
    const int code = multiply(&second);
    if (code) return code;
    if (layer->feed != nullptr) {
        qwen2_feed_forward feed_forward = *layer->feed;
        feed_forward.x = x, feed_forward.n = n, feed_forward.additions = from(additions, QWEN2_FEED_ADDITION, &rest);
        return feed(&feed_forward);
    }
    qwen2_mixture mixture = *layer->mixture;
    mixture.x = x, mixture.n = n, mixture.router_logits = router_logits, mixture.additions = from(additions, QWEN2_FEED_ADDITION, &rest);
    return mix(&mixture);
}

// The same for some of the rows alone, gathered and put back.
static int run_rest_of(const qwen2_layer* layer, const float* attended, int64_t values, float* x, const int64_t* rows, int64_t count,
                       const qwen2_additions* additions) {
    if (count == 0) return 0;
    const int64_t columns = layer->qkv->matrices[0]->columns;
    float* own = static_cast<float*>(shared_scratch(CHOSEN, static_cast<size_t>(count * (columns + values + 1)) * sizeof(float)));
    if (own == nullptr) return NO_MEMORY;
    float* own_attended = own + count * columns;
    int32_t* which = reinterpret_cast<int32_t*>(own_attended + count * values);
    qwen2_additions chosen;
    if (from(additions, 0, &chosen) != nullptr) {
        for (int64_t i = 0; i < count; i++) which[i] = additions->which[rows[i]];
        chosen.which = which;
    }
    for (int64_t i = 0; i < count; i++) {
        __builtin_memcpy(own + i * columns, x + rows[i] * columns, static_cast<size_t>(columns) * sizeof(float));
        __builtin_memcpy(own_attended + i * values, attended + rows[i] * values, static_cast<size_t>(values) * sizeof(float));
    }
    const int code = run_rest(layer, own_attended, own, count, nullptr, additions == nullptr ? nullptr : &chosen);
    for (int64_t i = 0; i < count; i++) __builtin_memcpy(x + rows[i] * columns, own + i * columns, static_cast<size_t>(columns) * sizeof(float));
    return code;
}

static int run_layer(const qwen2_layer* layer, const qwen2_attention* attention, float* x, int64_t n, float* router_logits, const int64_t* rows, int64_t count,
                     const qwen2_additions* additions) {
    const int64_t width = attention->qkv_stride, values = static_cast<int64_t>(attention->heads) * attention->head_dim;
    float* qkv = static_cast<float*>(shared_scratch(HIDDEN, static_cast<size_t>(n * (width + values)) * sizeof(float)));
    if (qkv == nullptr) return NO_MEMORY;
    float* attended = qkv + n * width;

    qwen2_product first = *layer->qkv;
    float* outs[3];
    for (int64_t i = 0, at = 0; i < first.count && i < 3; at += first.matrices[i]->rows, i++) outs[i] = qkv + at;
    first.x = x, first.n = n, first.outs = outs, first.additions = additions;
    int code = multiply(&first);
    if (code) return code;

    qwen2_attention step = *attention;
    step.qkv = qkv, step.out = attended, step.out_stride = values;
    if ((code = attend(&step))) return code;
    return rows == nullptr ? run_rest(layer, attended, x, n, router_logits, additions) : run_rest_of(layer, attended, values, x, rows, count, additions);
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
