// The search for the scales of a format's groups: quant/search.py says what is searched and why, and does the same in torch. A vector
// holds one number of L groups each, so that nothing is ever summed across lanes.
#ifndef QWEN2_SEARCH_H
#define QWEN2_SEARCH_H

#include "kernels.h"
#include "pool.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int WIDEST = 32, BATCH = 32;  // weights of a group; vectors of groups that a thread claims at a time
constexpr float LEAST_GAIN = 1e-6f;  // of a group's square by which a trial must be better: less is rounding

static inline F f_inverse(F v) {  // 0 where the inverse is not finite
    alignas(64) float lanes[L];
    f_store(lanes, f_div(f_set(1), v));
    for (int i = 0; i < L; i++) lanes[i] = __builtin_fabsf(lanes[i]) <= 3.4028234e38f ? lanes[i] : 0.0f;
    return f_load(lanes);
}

static inline F f_clamp(F v, float low, float high) { return f_min(f_max(v, f_set(low)), f_set(high)); }

static inline F nearest(F v, const qwen2_search* s) {
    const F whole = f_from_i(i_from_f(f_clamp(v, s->low, s->high)));
    if (s->table == nullptr) return whole;
    alignas(64) float lanes[L];
    f_store(lanes, whole);
    for (int i = 0; i < L; i++) lanes[i] = s->table[static_cast<int>(lanes[i]) + 128];
    return f_load(lanes);
}

// L groups at a time: what they are and what was found for them so far.
struct Groups {
    F x[WIDEST], w[WIDEST], wx[WIDEST];
    alignas(64) float best[L], scale[L], minimum[L];
};

static void search_symmetric(const qwen2_search* s, Groups& g) {
    alignas(64) float most[L], least[L], gain[L], scale[L];
    F high = g.x[0], low = g.x[0];
    for (int i = 1; i < s->width; i++) high = f_max(high, g.x[i]), low = f_min(low, g.x[i]);
    f_store(most, high), f_store(least, low);
    for (int l = 0; l < L; l++) most[l] = most[l] >= -least[l] ? most[l] : least[l], g.best[l] = -1, g.scale[l] = 0;
    const F unit = f_inverse(f_load(most));
    for (int t = 0; t < s->trial_count; t++) {
        const F by = f_mul(unit, f_set(s->first + s->trials[t]));
        F along = f_zero(), norm = f_zero();
        for (int i = 0; i < s->width; i++) {
            const F q = nearest(f_mul(g.x[i], by), s);
            along = f_fma(g.wx[i], q, along);
            norm = f_fma(f_mul(g.w[i], q), q, norm);
        }
        const F found = f_mul(along, f_inverse(norm));
        f_store(scale, found), f_store(gain, f_mul(along, found));
        for (int l = 0; l < L; l++)
            if (gain[l] > g.best[l]) g.best[l] = gain[l], g.scale[l] = scale[l];
    }
}

static void search_affine(const qwen2_search* s, Groups& g) {
    F high = g.x[0], low = g.x[0], w = f_zero(), wx = f_zero(), wxx = f_zero();
    for (int i = 0; i < s->width; i++) {
        high = f_max(high, g.x[i]), low = f_min(low, g.x[i]);
        w = f_add(w, g.w[i]), wx = f_add(wx, g.wx[i]), wxx = f_fma(g.wx[i], g.x[i], wxx);
    }
    if (s->below_zero) low = f_min(low, f_zero());
    const F unit = f_inverse(f_sub(high, low)), least = f_mul(wxx, f_set(LEAST_GAIN));
    {  // the plain range, which stays where no trial has a solution: a group of one large weight and zeros, of equal weights
        const F by = f_mul(unit, f_set(s->high)), a = f_div(f_sub(high, low), f_set(s->high));
        F error = f_zero();
        for (int i = 0; i < s->width; i++) {
            const F off = f_sub(f_fma(a, nearest(f_mul(f_sub(g.x[i], low), by), s), low), g.x[i]);
            error = f_fma(g.w[i], f_mul(off, off), error);
        }
        f_store(g.scale, a), f_store(g.minimum, low), f_store(g.best, error);
    }
    alignas(64) float gain[L];
    f_store(gain, least);
    for (int t = 0; t < s->trial_count; t++) {
        const F by = f_mul(unit, f_set(s->high + s->trials[t]));
        F wq = f_zero(), wxq = f_zero(), wqq = f_zero();
        for (int i = 0; i < s->width; i++) {
            const F q = nearest(f_mul(f_sub(g.x[i], low), by), s), weighted = f_mul(g.w[i], q);
            wq = f_add(wq, weighted), wxq = f_fma(g.wx[i], q, wxq), wqq = f_fma(weighted, q, wqq);
        }
        const F divisor = f_inverse(f_sub(f_mul(w, wqq), f_mul(wq, wq)));
        alignas(64) float scale[L], minimum[L], alone[L], error[L];
        f_store(scale, f_mul(f_sub(f_mul(w, wxq), f_mul(wx, wq)), divisor));
        f_store(minimum, f_mul(f_sub(f_mul(wqq, wx), f_mul(wq, wxq)), divisor));
        if (s->below_zero) {
            f_store(alone, f_mul(wxq, f_inverse(wqq)));
            for (int l = 0; l < L; l++)
                if (minimum[l] > 0) scale[l] = alone[l], minimum[l] = 0;
        }
        const F a = f_load(scale), m = f_load(minimum), two = f_set(2);
        const F by_scale = f_mul(a, f_sub(f_mul(a, wqq), f_mul(two, wxq)));
        const F by_minimum = f_mul(m, f_add(f_mul(m, w), f_mul(two, f_sub(f_mul(a, wq), wx))));
        f_store(error, f_add(f_add(wxx, by_scale), by_minimum));
        for (int l = 0; l < L; l++)
            if (error[l] < g.best[l] - gain[l] && scale[l] > 0) g.best[l] = error[l], g.scale[l] = scale[l], g.minimum[l] = minimum[l];
    }
}

static int search(const qwen2_search* s) {
    if (s->width < 1 || s->width > WIDEST) return NOT_SUPPORTED;
    const int64_t vectors = (s->groups + L - 1) / L, tiles = (vectors + BATCH - 1) / BATCH;
    if (tiles > MAX_TILES) return NOT_SUPPORTED;
    for_tiles(static_cast<int>(tiles), [&](int tile, int) {
        for (int64_t v = int64_t(tile) * BATCH; v < vectors && v < (int64_t(tile) + 1) * BATCH; v++) {
            const int64_t at = v * L;
            const int count = s->groups - at < L ? static_cast<int>(s->groups - at) : L;
            Groups g{};
            for (int i = 0; i < s->width; i++) {
                g.x[i] = f_load_first(s->x + i * s->groups + at, count);
                g.w[i] = f_load_first(s->weights + i * s->groups + at, count);
                g.wx[i] = f_mul(g.w[i], g.x[i]);
            }
            s->minimum == nullptr ? search_symmetric(s, g) : search_affine(s, g);
            f_store_first(s->scale + at, f_load(g.scale), count);
            if (s->minimum != nullptr) f_store_first(s->minimum + at, f_load(g.minimum), count);
        }
    });
    return 0;
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
