// The steps of training of one instruction set, each for the types of numbers there are.
#ifndef QWEN2_TRAIN_SET_H
#define QWEN2_TRAIN_SET_H

#include "set.h"
#include "train_attention.h"

namespace qwen2 {
namespace QWEN2_ISA {

constexpr int32_t FLOAT_NUMBERS = 0, BF16_NUMBERS = 30;

// work(a number of the type): a code, or NOT_SUPPORTED for other types.
template <class Work>
static inline int of_type(int32_t type, Work&& work) {
    return type == FLOAT_NUMBERS ? work(float()) : type == BF16_NUMBERS ? work(Bf16()) : NOT_SUPPORTED;
}

static bool fits(const qwen2_train_attention* s) {
    return s->head_dim > 0 && s->head_dim % 2 == 0 && s->kv_heads > 0 && s->heads % s->kv_heads == 0;
}

constexpr TrainSet train_set() {
    return {
        [](const qwen2_norm_step* s) { return of_type(s->type, [&](auto t) { return norm_forward<decltype(t)>(*s); }); },
        [](const qwen2_norm_step* s) { return of_type(s->type, [&](auto t) { return norm_backward<decltype(t)>(*s); }); },
        [](int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* out) {
            return of_type(type, [&](auto t) { return gated_forward<decltype(t)>(gate_up, n, f, scales, out); });
        },
        [](int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* product, void* into, float* dscales) {
            return of_type(type, [&](auto t) { return gated_backward<decltype(t)>(gate_up, n, f, scales, product, into, dscales); });
        },
        [](int32_t type, const void* x, const int64_t* places, int64_t n, int64_t active, int64_t columns, const float* base, float* out) {
            return of_type(type, [&](auto t) { return gather_rows<decltype(t)>(x, places, n, active, columns, base, out); });
        },
        [](int32_t type, const float* x, const void* y, int64_t count, float* out) {
            return of_type(type, [&](auto t) { return add_rows<decltype(t)>(x, y, count, out); });
        },
        [](int32_t type, const void* x, int64_t n, int64_t columns, int64_t stride, float* sums) {
            return of_type(type, [&](auto t) { return sum_rows<decltype(t)>(x, n, columns, stride, sums); });
        },
        [](const qwen2_entropy* s) { return of_type(s->type, [&](auto t) { return entropy_rows<decltype(t)>(*s); }); },
        [](const qwen2_train_attention* s, bool backward) { return fits(s) ? train_attention_bytes(*s, backward) : NOT_SUPPORTED; },
        [](const qwen2_train_attention* s, bool backward) {
            return !fits(s) ? NOT_SUPPORTED : of_type(s->type, [&](auto t) { return train_attention<decltype(t)>(*s, backward); });
        },
    };
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
