// The C interface: which set of kernels runs here, and the way into it.
#include <atomic>
#include <cstring>

#include "cache.h"
#include "pool.h"
#include "set.h"

namespace {

using qwen2::KernelSet;
using qwen2::TrainSet;

const KernelSet* const SETS[] = {  // the best first
#if defined(__x86_64__)
    &qwen2::AVX512_SET, &qwen2::AVX2_SET,
#elif defined(__aarch64__)
    &qwen2::NEON_SET,
#endif
    nullptr,
};

bool fits(const KernelSet* set) { return (set->needs & ~qwen2_cpu_features()) == 0; }

const KernelSet* best() {
    for (const KernelSet* set : SETS)
        if (set != nullptr && fits(set)) return set;
    return nullptr;
}

std::atomic<const KernelSet*>& chosen() {  // written by whoever has the turn, read by anyone
    static std::atomic<const KernelSet*> set{best()};
    return set;
}

// The set that matrices of so many lanes were packed for, which each set has a number of its own of; the chosen one for 0.
const KernelSet* set_of(int32_t lanes) {
    if (lanes == 0) return chosen();
    for (const KernelSet* set : SETS)
        if (set != nullptr && set->lanes == lanes && fits(set)) return set;
    return nullptr;
}

// One operation of the set that the lanes name; what belongs to no set is refused.
template <class Function, class... Arguments>
auto run_on(int32_t lanes, Function KernelSet::*function, Arguments... arguments)
    -> decltype((static_cast<const KernelSet*>(nullptr)->*function)(arguments...)) {
    qwen2::Turn turn;
    const KernelSet* set = set_of(lanes);
    if (set == nullptr) return qwen2::NOT_SUPPORTED;
    return (set->*function)(arguments...);
}

// The same of the chosen set.
template <class Function, class... Arguments>
auto run(Function KernelSet::*function, Arguments... arguments) -> decltype((static_cast<const KernelSet*>(nullptr)->*function)(arguments...)) {
    return run_on(0, function, arguments...);
}

const TrainSet* train_set_of(const KernelSet* set) {
#if defined(__x86_64__)
    if (set == &qwen2::AVX512_SET && (qwen2_cpu_features() & QWEN2_AVX512BF16)) return &qwen2::AVX512_BF16_TRAIN;
#endif
    return set->train;
}

// The same of the steps of training.
template <class Function, class... Arguments>
auto run_train(Function TrainSet::*function, Arguments... arguments) -> decltype((static_cast<const TrainSet*>(nullptr)->*function)(arguments...)) {
    qwen2::Turn turn;
    const KernelSet* set = chosen();
    if (set == nullptr) return qwen2::NOT_SUPPORTED;
    return (train_set_of(set)->*function)(arguments...);
}

}  // namespace

int qwen2_select_isa(const char* name) {
    qwen2::Turn turn;
    if (name == nullptr) {
        chosen() = best();
        return best() == nullptr ? -2 : 0;
    }
    if (std::strcmp(name, "none") == 0) {
        chosen() = nullptr;
        return 0;
    }
    for (const KernelSet* set : SETS) {
        if (set == nullptr || std::strcmp(set->name, name) != 0) continue;
        if (!fits(set)) return -2;
        chosen() = set;
        return 0;
    }
    return std::strcmp(name, "avx512") == 0 || std::strcmp(name, "avx2") == 0 || std::strcmp(name, "neon") == 0 ? -2 : -1;
}

const char* qwen2_isa(void) {
    const KernelSet* set = chosen();
    return set == nullptr ? nullptr : set->name;
}

int qwen2_lanes(void) {
    const KernelSet* set = chosen();
    return set == nullptr ? 0 : set->lanes;
}

uint64_t qwen2_busy(void) { return qwen2::busy_nanoseconds(); }
int qwen2_threads(void) { return qwen2::threads(); }
void qwen2_set_threads(int count) { qwen2::set_threads(count); }

int64_t qwen2_cache_bytes(int32_t head_dim, int32_t bits) { return qwen2::cache_bytes(head_dim, bits); }

int qwen2_attend(const qwen2_attention* step) {
    return run_on(step->lanes, &KernelSet::attend, step);
}

int64_t qwen2_packed_bytes(int32_t type, int64_t rows, int64_t columns) {
    const KernelSet* set = chosen();
    return set == nullptr ? -1 : set->packed_bytes(type, rows, columns);
}

int qwen2_pack(int32_t type, int64_t rows, int64_t columns, const void* blocks, int64_t first, int64_t count, void* packed) {
    return run(&KernelSet::pack, type, rows, columns, blocks, first, count, packed);
}

int qwen2_pack_file(int32_t file, const qwen2_matrix* const* matrices, const int64_t* offsets, int64_t count) {
    return count == 0 ? 0 : run_on(matrices[0]->lanes, &KernelSet::pack_file, file, matrices, offsets, count);
}

int qwen2_unpack_rows(const qwen2_matrix* matrix, const int64_t* rows, int64_t count, float* out) {
    return run_on(matrix->lanes, &KernelSet::unpack_rows, matrix, rows, count, out);
}

int qwen2_multiply(const qwen2_product* product) {
    return product->count == 0 ? 0 : run_on(product->matrices[0]->lanes, &KernelSet::multiply, product);
}

int qwen2_feed(const qwen2_feed_forward* part) {
    return run_on(part->gate->lanes, &KernelSet::feed, part);
}

int qwen2_mix(const qwen2_mixture* part) {
    return run_on(part->router->lanes, &KernelSet::mix, part);
}

int qwen2_norm(const float* x, int64_t n, int64_t columns, int64_t x_stride, const float* weight, float eps, float* out, int32_t lanes) {
    return run_on(lanes, &KernelSet::norm, x, n, columns, x_stride, weight, eps, out);
}

int qwen2_argmax(const float* x, int64_t n, int64_t columns, int64_t x_stride, int64_t* places, float* values) {
    return run(&KernelSet::argmax, x, n, columns, x_stride, places, values);
}

int qwen2_search_scales(const qwen2_search* search) {
    return run(&KernelSet::search, search);
}

int qwen2_read(const void* memory, int64_t bytes) {
    return run(&KernelSet::read, memory, bytes);
}

int64_t qwen2_multiply_bytes(int64_t rounds) {
    return run(&KernelSet::multiply_bytes, rounds);
}

int64_t qwen2_multiply_floats(int64_t rounds) {
    return run(&KernelSet::multiply_floats, rounds);
}

int qwen2_run_layer(const qwen2_layer* layer, const qwen2_attention* attention, float* x, int64_t n, float* router_logits) {
    return run_on(layer->qkv->matrices[0]->lanes, &KernelSet::run_layer, layer, attention, x, n, router_logits, nullptr, 0, nullptr);
}

int qwen2_run_layers(const qwen2_layer* const* layers, int32_t count, const qwen2_attention* attention, int64_t layer_bytes, float* x, int64_t n,
                     const int64_t* rows, int64_t wanted, const qwen2_additions* additions) {
    if (count == 0) return 0;
    qwen2::Turn turn;
    const KernelSet* set = set_of(layers[0]->qkv->matrices[0]->lanes);
    if (set == nullptr) return qwen2::NOT_SUPPORTED;
    qwen2_attention step = *attention;
    qwen2_additions added = {nullptr, nullptr, 0, 0};
    if (additions != nullptr) added = *additions;
    for (int32_t i = 0; i < count; i++) {
        const bool last = i + 1 == count;
        const int code = set->run_layer(layers[i], &step, x, n, nullptr, last ? rows : nullptr, wanted, additions == nullptr ? nullptr : &added);
        if (code) return code;
        step.offset += layer_bytes;
        added.first += QWEN2_ADDITIONS;
        if (step.key_factors != nullptr) step.key_factors += static_cast<int64_t>(step.kv_heads) * (step.head_dim / 2);
    }
    return 0;
}

int qwen2_unpack_blocks(int32_t type, int64_t columns, const void* blocks, const int64_t* rows, int64_t count, float* out) {
    return run(&KernelSet::unpack_blocks, type, columns, blocks, rows, count, out);
}

void qwen2_lend_team(qwen2_parallel parallel, int threads) { qwen2::lend_team(parallel, threads); }

int qwen2_norm_forward(const qwen2_norm_step* step) {
    return run_train(&TrainSet::norm_forward, step);
}

int qwen2_norm_backward(const qwen2_norm_step* step) {
    return run_train(&TrainSet::norm_backward, step);
}

int qwen2_gated_forward(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* out) {
    return run_train(&TrainSet::gated_forward, type, gate_up, n, f, scales, out);
}

int qwen2_gated_backward(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* product, void* into, float* dscales) {
    return run_train(&TrainSet::gated_backward, type, gate_up, n, f, scales, product, into, dscales);
}

int qwen2_gather_rows(int32_t type, const void* x, const int64_t* places, int64_t n, int64_t active, int64_t columns, const float* base, float* out) {
    return run_train(&TrainSet::gather_rows, type, x, places, n, active, columns, base, out);
}

int qwen2_add(int32_t type, const float* x, const void* y, int64_t count, float* out) {
    return run_train(&TrainSet::add, type, x, y, count, out);
}

int qwen2_sum_rows(int32_t type, const void* x, int64_t n, int64_t columns, int64_t stride, float* sums) {
    return run_train(&TrainSet::sum_rows, type, x, n, columns, stride, sums);
}

int qwen2_entropy_rows(const qwen2_entropy* step) {
    return run_train(&TrainSet::entropy_rows, step);
}

int64_t qwen2_train_attention_bytes(const qwen2_train_attention* step, int backward) {
    return run_train(&TrainSet::attention_bytes, step, backward != 0);
}

int qwen2_train_attention_forward(const qwen2_train_attention* step) {
    return run_train(&TrainSet::attention, step, false);
}

int qwen2_train_attention_backward(const qwen2_train_attention* step) {
    return run_train(&TrainSet::attention, step, true);
}
