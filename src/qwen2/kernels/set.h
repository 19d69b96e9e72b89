// The operations of one instruction set, as each isa_*.cpp exports them; api.cpp chooses a set when the library is first used.
#ifndef QWEN2_SET_H
#define QWEN2_SET_H

#include "kernels.h"

namespace qwen2 {

struct TrainSet {  // of train_*.cpp
    int (*norm_forward)(const qwen2_norm_step*);
    int (*norm_backward)(const qwen2_norm_step*);
    int (*gated_forward)(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* out);
    int (*gated_backward)(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* product, void* into, float* dscales);
    int (*gather_rows)(int32_t type, const void* x, const int64_t* places, int64_t n, int64_t active, int64_t columns, const float* base, float* out);
    int (*add)(int32_t type, const float* x, const void* y, int64_t count, float* out);
    int (*sum_rows)(int32_t type, const void* x, int64_t n, int64_t columns, int64_t stride, float* sums);
    int (*entropy_rows)(const qwen2_entropy*);
    int64_t (*attention_bytes)(const qwen2_train_attention*, bool backward);
    int (*attention)(const qwen2_train_attention*, bool backward);
};

struct KernelSet {
    const char* name;
    uint64_t needs;  // bits of qwen2_cpu_features
    int lanes;       // rows that lie interleaved in a packed matrix
    int64_t (*packed_bytes)(int32_t type, int64_t rows, int64_t columns);
    int (*pack)(int32_t type, int64_t rows, int64_t columns, const void* blocks, int64_t first, int64_t count, void* packed);
    int (*pack_file)(int32_t file, const qwen2_matrix* const* matrices, const int64_t* offsets, int64_t count);
    int (*unpack_rows)(const qwen2_matrix*, const int64_t* rows, int64_t count, float* out);
    int (*unpack_blocks)(int32_t type, int64_t columns, const void* blocks, const int64_t* rows, int64_t count, float* out);
    int (*multiply)(const qwen2_product*);
    int (*feed)(const qwen2_feed_forward*);
    int (*mix)(const qwen2_mixture*);
    int (*norm)(const float* x, int64_t n, int64_t columns, int64_t x_stride, const float* weight, float eps, float* out);
    int (*argmax)(const float* x, int64_t n, int64_t columns, int64_t x_stride, int64_t* places, float* values);
    int (*attend)(const qwen2_attention*);
    int (*search)(const qwen2_search*);
    int (*read)(const void* memory, int64_t bytes);
    int64_t (*multiply_bytes)(int64_t rounds);
    int64_t (*multiply_floats)(int64_t rounds);
    int (*run_layer)(const qwen2_layer*, const qwen2_attention*, float* x, int64_t n, float* router_logits, const int64_t* rows, int64_t count,
                     const qwen2_additions* additions);
    const TrainSet* train;
};

extern const TrainSet AVX512_TRAIN, AVX512_BF16_TRAIN, AVX2_TRAIN, NEON_TRAIN;
extern const KernelSet AVX512_SET, AVX2_SET, NEON_SET;

}  // namespace qwen2

#endif
