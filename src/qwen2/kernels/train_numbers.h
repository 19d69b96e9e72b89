// Numbers of training as they lie in memory, float32 or bfloat16, to and from vectors; rows of any width.
#ifndef QWEN2_TRAIN_NUMBERS_H
#define QWEN2_TRAIN_NUMBERS_H

#include <stdint.h>

namespace qwen2 {
namespace QWEN2_ISA {

struct Bf16 {
    uint16_t bits;
};

static inline F get(const float* p) { return f_load(p); }
static inline F get(const Bf16* p) { return f_load_bf16(reinterpret_cast<const uint16_t*>(p)); }
static inline void put(float* p, F v) { f_store(p, v); }
static inline void put(Bf16* p, F v) {  // to nearest, ties to even; what is left has 16 bits, so that nothing is cut
    const I bits = i_bits(v), odd = i_and(i_sra<16>(bits), i_set(1));
    i_store_s16(reinterpret_cast<int16_t*>(p), i_sra<16>(i_add(bits, i_add(odd, i_set(0x7fff)))));
}

// The first n numbers, n < L; zeros in the other lanes.
static inline F get_first(const float* p, int n) { return f_load_first(p, n); }
static inline F get_first(const Bf16* p, int n) {
    Bf16 lanes[L] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return get(lanes);
}
static inline void put_first(float* p, F v, int n) { f_store_first(p, v, n); }
static inline void put_first(Bf16* p, F v, int n) {
    Bf16 lanes[L];
    put(lanes, v);
    for (int i = 0; i < n; i++) p[i] = lanes[i];
}

// work(get, put) for every vector of a row: `at` is its place, and what is read and written are the numbers there are.
struct Whole {
    template <class T> static F load(const T* p) { return get(p); }
    template <class T> static void store(T* p, F v) { put(p, v); }
};
struct Part {
    int n;
    template <class T> F load(const T* p) const { return get_first(p, n); }
    template <class T> void store(T* p, F v) const { put_first(p, v, n); }
};
template <class Work>
static inline void along(int64_t columns, Work&& work) {
    int64_t at = 0;
    for (; at + L <= columns; at += L) work(at, Whole());
    if (at < columns) work(at, Part{static_cast<int>(columns - at)});
}

}  // namespace QWEN2_ISA
}  // namespace qwen2

#endif
