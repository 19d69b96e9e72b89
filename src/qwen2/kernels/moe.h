// The feed-forward part of a mixture-of-experts layer in one operation: norm, router, the chosen experts' products over the rows
// that chose them, the shared expert, and the weighted sum. A token's result does not depend on who else chose its experts.
#ifndef QWEN2_MOE_H
#define QWEN2_MOE_H

#include "ops.h"

namespace qwen2 {
namespace QWEN2_ISA {

struct Routes {          // n tokens, A choices each
    float* logits;       // [n][E]
    float* gates;        // [n]: of the shared expert, before the sigmoid
    float* weights;      // [n][A]
    int32_t* experts;    // [n][A], the likeliest first
    int32_t* places;     // [n][A]: where a choice lies among all, sorted by expert
    int32_t* tokens;     // [n * A]: the token of each place
    int32_t* starts;     // [E + 1]: an expert's first place

    static size_t bytes(int64_t n, int64_t experts, int64_t active) {
        return static_cast<size_t>(n * experts + n + 4 * n * active + experts + 1) * 4;
    }
    Routes(void* memory, int64_t n, int64_t experts_, int64_t active)
        : logits(static_cast<float*>(memory)), gates(logits + n * experts_), weights(gates + n),
          experts(reinterpret_cast<int32_t*>(weights + n * active)), places(experts + n * active), tokens(places + n * active),
          starts(tokens + n * active) {}
};

// Softmax over all experts, then the largest: weights of one token.
static void choose(const float* logits, int64_t experts, int64_t active, bool renormalise, float* weights, int32_t* chosen) {
    float highest = -__builtin_inff(), total = 0.0f, kept = 0.0f;
    for (int64_t e = 0; e < experts; e++) highest = logits[e] > highest ? logits[e] : highest;
    for (int64_t e = 0; e < experts; e++) {
        alignas(64) float v[L];
        f_store(v, f_exp(f_set(logits[e] - highest)));
        total += v[0];
    }
    for (int64_t a = 0; a < active; a++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            bool taken = false;
            for (int64_t b = 0; b < a; b++) taken |= chosen[b] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        alignas(64) float v[L];
        f_store(v, f_exp(f_set(logits[best] - highest)));
        chosen[a] = static_cast<int32_t>(best);
        weights[a] = v[0] / total;
        kept += weights[a];
    }
    if (renormalise)
        for (int64_t a = 0; a < active; a++) weights[a] /= kept;
}

static void sort_by_expert(const Routes& routes, int64_t n, int64_t experts, int64_t active) {
    for (int64_t e = 0; e <= experts; e++) routes.starts[e] = 0;
    for (int64_t i = 0; i < n * active; i++) routes.starts[routes.experts[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) routes.starts[e + 1] += routes.starts[e];
    for (int64_t i = 0; i < n * active; i++) {
        const int32_t place = routes.starts[routes.experts[i]]++;
        routes.places[i] = place;
        routes.tokens[place] = static_cast<int32_t>(i / active);
    }
    for (int64_t e = experts; e > 0; e--) routes.starts[e] = routes.starts[e - 1];
    routes.starts[0] = 0;
}

// Which expert and which panel a tile of a grouped product is, the shared expert (number E) coming first, because it is the largest.
struct Grouped {
    const int32_t* starts;
    int64_t experts, panels, shared_panels;

    int64_t tiles() const {
        int64_t used = 0;
        for (int64_t e = 0; e < experts; e++) used += starts[e + 1] > starts[e];
        return shared_panels + used * panels;
    }
    void find(int64_t tile, int64_t* expert, int64_t* panel) const {
        if (tile < shared_panels) {
            *expert = experts, *panel = tile;
            return;
        }
        int64_t left = (tile - shared_panels) / panels;
        *panel = (tile - shared_panels) % panels;
        for (*expert = 0;; ++*expert)
            if (starts[*expert + 1] > starts[*expert] && left-- == 0) return;
    }
};

static bool fit_expert(const qwen2_matrix* gate, const qwen2_matrix* up, const qwen2_matrix* down, int64_t columns, int64_t width) {
    return fit(gate, columns) && fit(up, columns) && gate->rows == width && up->rows == width && fit(down, width) && down->rows == columns;
}

static int mix(const qwen2_mixture* p) {
    if (p->n == 0) return 0;
    if (p->experts < 1) return NOT_SUPPORTED;
    const int64_t n = p->n, columns = p->router->columns, experts = p->experts, active = p->active;
    const int64_t width = p->gates[0]->rows, shared_width = p->shared_gate->rows, chosen = n * active;
    bool ok = active >= 1 && active <= experts && p->router->rows == experts && p->shared_router->rows == 1 && fit(p->router, columns) &&
              fit(p->shared_router, columns) && fit_expert(p->shared_gate, p->shared_up, p->shared_down, columns, shared_width);
    bool int8 = ok && (takes_int8(p->router) || takes_int8(p->shared_router) || takes_int8(p->shared_gate) || takes_int8(p->shared_up));
    for (int64_t e = 0; ok && e < experts; e++) {
        ok = fit_expert(p->gates[e], p->ups[e], p->downs[e], columns, width) && takes_int8(p->downs[e]) == takes_int8(p->downs[0]);
        int8 = int8 || (ok && (takes_int8(p->gates[e]) || takes_int8(p->ups[e])));
    }
    if (!ok) return NOT_SUPPORTED;
    Activations x;
    if (!prepare(p->x, n, columns, p->x_stride, p->norm, p->eps, int8, &x)) return NO_MEMORY;
    void* memory = shared_scratch(ROUTES, Routes::bytes(n, experts, active));
    if (memory == nullptr) return NO_MEMORY;
    const Routes routes(memory, n, experts, active);

    const qwen2_matrix* const routers[] = {p->router, p->shared_router};
    float* const outs[] = {routes.logits, routes.gates};
    const int64_t strides[] = {experts, 1};
    const qwen2_product routing = {nullptr, nullptr, routers, outs, strides, n, 0, 0.0f, 2, 0, nullptr};
    Added added;
    int code = added.prepare(p->additions, QWEN2_ROUTER_ADDITION - QWEN2_FEED_ADDITION, x, n, routers, 2);
    if (!code) code = multiply_prepared(x, n, &routing, added);
    if (code) return code;
    for (int64_t t = 0; t < n; t++)
        choose(routes.logits + t * experts, experts, active, p->renormalise != 0, routes.weights + t * active, routes.experts + t * active);
    if (p->router_logits != nullptr) __builtin_memcpy(p->router_logits, routes.logits, static_cast<size_t>(n * experts) * sizeof(float));
    sort_by_expert(routes, n, experts, active);

    Hidden hidden = {ActivationMemory(nullptr, 0, 0), nullptr, 0, false}, shared = hidden;
    if (!make_hidden(chosen, p->downs[0], SECOND_QUANTIZED, false, &hidden)) return NO_MEMORY;
    if (!make_hidden(n, p->shared_down, HIDDEN, p->additions != nullptr, &shared)) return NO_MEMORY;
    const qwen2_matrix* const both[] = {p->shared_gate, p->shared_up};
    if ((code = added.prepare(p->additions, 0, x, n, both, 2))) return code;
    const Added none;
    const Grouped wide = {routes.starts, experts, panels_of(width), panels_of(shared_width)};
    Failure failure;
    for_tiles(static_cast<int>(wide.tiles()), [&](int tile, int thread) {
        int64_t e, panel;
        wide.find(tile, &e, &panel);
        if (e == experts) {
            if (!gated_panel(*p->shared_gate, *p->shared_up, panel, x, n, 0, shared, added, thread)) failure.note();
            return;
        }
        Activations mine = x;
        mine.rows = routes.tokens + routes.starts[e];
        if (!gated_panel(*p->gates[e], *p->ups[e], panel, mine, routes.starts[e + 1] - routes.starts[e], routes.starts[e], hidden, none, thread))
            failure.note();
    });
    if (failure.happened()) return NO_MEMORY;

    float* results = static_cast<float*>(shared_scratch(PARTIALS, static_cast<size_t>((chosen + n) * columns) * sizeof(float)));
    int32_t* all = static_cast<int32_t*>(shared_scratch(QUERIES, static_cast<size_t>(chosen) * sizeof(int32_t)));
    if (results == nullptr || all == nullptr) return NO_MEMORY;
    for (int64_t i = 0; i < chosen; i++) all[i] = static_cast<int32_t>(i);
    const Activations hidden_x = hidden.quantized.view(hidden.floats, width), shared_x = shared.quantized.view(shared.floats, shared_width);
    if ((code = added.prepare(p->additions, 2, shared_x, n, &p->shared_down, 1))) return code;
    const Grouped narrow = {routes.starts, experts, panels_of(columns), panels_of(columns)};
    for_tiles(static_cast<int>(narrow.tiles()), [&](int tile, int thread) {
        int64_t e, panel;
        narrow.find(tile, &e, &panel);
        const bool is_shared = e == experts;
        const qwen2_matrix& m = is_shared ? *p->shared_down : *p->downs[e];
        Activations mine = is_shared ? shared_x : hidden_x;
        const int64_t first = is_shared ? chosen : routes.starts[e], count = is_shared ? n : routes.starts[e + 1] - first, row = panel * PANEL;
        if (!is_shared) mine.rows = all + first;
        float* y = static_cast<float*>(scratch(thread, PRODUCT, static_cast<size_t>(count) * PANEL * sizeof(float)));
        const int64_t rows = columns - row < PANEL ? columns - row : PANEL;
        if (y == nullptr || !kernels_of(m.type)->panel(static_cast<const uint8_t*>(m.packed), m.rows, row, mine, count, y, thread) ||
            (is_shared && !added.to_panel(0, row, rows, y, thread))) {
            failure.note();
            return;
        }
        finish(y, count, nullptr, rows, results + first * columns + row, columns, false);
    });
    if (failure.happened()) return NO_MEMORY;

    for_tiles(static_cast<int>(n), [&](int t, int) {
        float* out = p->x + t * p->x_stride;
        alignas(64) float v[L];
        f_store(v, f_exp(f_set(-routes.gates[t])));
        const float gate = 1.0f / (1.0f + v[0]);
        for (int64_t i = 0; i < columns; i++) {
            float sum = gate * results[(chosen + t) * columns + i];
            for (int64_t a = 0; a < active; a++)
                sum += routes.weights[t * active + a] * results[static_cast<int64_t>(routes.places[t * active + a]) * columns + i];
            out[i] += sum;
        }
    });
    return 0;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
