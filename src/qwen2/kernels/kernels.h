// The C interface of the native library: plain types only, no Python, no torch, no exceptions across the border.
// Every change of a signature or of a bit's meaning raises QWEN2_ABI_VERSION; the Python face refuses another number.
#ifndef QWEN2_KERNELS_H
#define QWEN2_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define QWEN2_API __declspec(dllexport)
#else
#define QWEN2_API __attribute__((visibility("default")))
#endif

#define QWEN2_ABI_VERSION 9

#ifdef __cplusplus
extern "C" {
#endif

// Bits of qwen2_cpu_features(). The names in FEATURES of __init__.py stand in the same order.
enum qwen2_feature {
    QWEN2_AVX2 = 1 << 0,
    QWEN2_FMA = 1 << 1,
    QWEN2_F16C = 1 << 2,
    QWEN2_AVXVNNI = 1 << 3,
    QWEN2_AVX512F = 1 << 4,
    QWEN2_AVX512BW = 1 << 5,
    QWEN2_AVX512VL = 1 << 6,
    QWEN2_AVX512VNNI = 1 << 7,
    QWEN2_AVX512BF16 = 1 << 8,
    QWEN2_NEON = 1 << 9,
    QWEN2_DOTPROD = 1 << 10,
    QWEN2_I8MM = 1 << 11,
    QWEN2_BF16 = 1 << 12,
};

QWEN2_API uint32_t qwen2_abi_version(void);

// What this processor has and this operating system lets us use (vector registers saved at a task switch).
QWEN2_API uint64_t qwen2_cpu_features(void);

// The sets of kernels, by name: "avx512", "avx2", "neon". 0, or -1 where the name is not known, -2 where this processor or this
// build lacks it. NULL chooses the best there is, "none" no set: what follows the choice then returns -4. Packing follows it, and what
// has no matrices. Products run by the set that their matrices were packed for, whatever is chosen by then.
QWEN2_API int qwen2_select_isa(const char* name);
QWEN2_API const char* qwen2_isa(void);  // the chosen set's name, or NULL where none fits this processor
QWEN2_API int qwen2_lanes(void);        // rows that lie interleaved in a packed matrix, 0 where no set fits

// Threads of the library's own pool, the caller among them; 1 to begin with.
QWEN2_API int qwen2_threads(void);
QWEN2_API void qwen2_set_threads(int count);

// ---- matrices

// A matrix of one GGUF format, (rows, columns), in the interleaved layout of the chosen set. `bias` may be NULL.
typedef struct {
    const void* packed;
    const float* bias;  // (rows)
    int64_t rows, columns;
    int32_t type;       // ggml's number
    int32_t lanes;      // qwen2_lanes() when it was packed: they name the set that computes with it, and matrices of two sets do not fit
} qwen2_matrix;

// Bytes of the packed form: as many as the blocks take, with the rows filled up to whole tiles. -1 for a type that has no kernel or
// rows that are not whole blocks.
QWEN2_API int64_t qwen2_packed_bytes(int32_t type, int64_t rows, int64_t columns);

// Rows first .. first + count of a matrix (first a multiple of qwen2_lanes) from the file's blocks, lossless. All threads.
QWEN2_API int qwen2_pack(int32_t type, int64_t rows, int64_t columns, const void* blocks, int64_t first, int64_t count, void* packed);

// The same for all rows of `count` matrices that lie in an open file (a descriptor) as blocks, each from its offset on. All threads
// read and pack. -5 where the file ends too early or cannot be read, -4 on systems without positioned reads too.
QWEN2_API int qwen2_pack_file(int32_t file, const qwen2_matrix* const* matrices, const int64_t* offsets, int64_t count);

// The named rows in fp32: (count, columns).
QWEN2_API int qwen2_unpack_rows(const qwen2_matrix* matrix, const int64_t* rows, int64_t count, float* out);

// Named rows of a matrix as it lies in a file, (rows, columns) in blocks: (count, columns) in fp32.
QWEN2_API int qwen2_unpack_blocks(int32_t type, int64_t columns, const void* blocks, const int64_t* rows, int64_t count, float* out);

// ---- adapters

// What a low-rank adapter (LoRA) adds to one matrix's product: share * (W x + scale * B (A x)) + bias. A null `a` adds nothing.
typedef struct {
    const qwen2_matrix *a, *b;  // (rank, columns) and (rows, rank), of F32, F16 or BF16, packed as the matrix beside them
    const float* share;         // (rows) or NULL: DoRA's
    float scale;
} qwen2_addition;

// Those of a step's tokens: `which` (n) is the place of a token's adapter among `count`, or -1. An adapter is an array of additions,
// the one of number `first` beside an operation's first matrix, the next beside its second. A layer has QWEN2_ADDITIONS of them: q, k,
// v, output, gate, up, down, router, shared router; those of a mixture's layer are the shared expert's, and its router's is not looked at.
enum { QWEN2_ADDITIONS = 9, QWEN2_OUTPUT_ADDITION = 3, QWEN2_FEED_ADDITION = 4, QWEN2_ROUTER_ADDITION = 7 };
typedef struct {
    const int32_t* which;
    const qwen2_addition* const* adapters;
    int32_t count, first;
} qwen2_additions;

// ---- products

// Several matrices times the same tokens: outs[i] (n, rows of i) = x W' + bias, or += where `add` is not 0. x is normed first (RMSNorm)
// where `norm` is not NULL. Quantized weights take x in int8, groups of 32; float weights take it as it is.
typedef struct {
    const float* x;          // (n, columns), rows x_stride floats apart
    const float* norm;       // (columns) or NULL
    const qwen2_matrix* const* matrices;
    float* const* outs;
    const int64_t* out_strides;
    int64_t n, x_stride;
    float eps;
    int32_t count, add;
    const qwen2_additions* additions;  // or NULL
} qwen2_product;
QWEN2_API int qwen2_multiply(const qwen2_product* product);

// The feed-forward part: x += down(silu(gate(norm(x))) * up(norm(x))).
typedef struct {
    float* x;                // (n, columns), rows x_stride floats apart
    const float* norm;       // (columns)
    const qwen2_matrix *gate, *up, *down;
    int64_t n, x_stride;
    float eps;
    const qwen2_additions* additions;  // or NULL: `first` is the gate's
} qwen2_feed_forward;
QWEN2_API int qwen2_feed(const qwen2_feed_forward* part);

// The same of a mixture-of-experts layer: the router's softmax over all experts, the largest `active` of them, and the shared expert
// times sigmoid(shared_router(x)). `router_logits` (n, experts) is filled where it is not NULL.
typedef struct {
    float* x;                // (n, columns), rows x_stride floats apart
    const float* norm;
    const qwen2_matrix *router, *shared_router, *shared_gate, *shared_up, *shared_down;
    const qwen2_matrix* const* gates;  // (experts) each
    const qwen2_matrix* const* ups;
    const qwen2_matrix* const* downs;
    float* router_logits;
    int64_t n, x_stride;
    float eps;
    int32_t experts, active, renormalise;
    const qwen2_additions* additions;  // or NULL: `first` is the shared gate's
} qwen2_mixture;
QWEN2_API int qwen2_mix(const qwen2_mixture* part);

// RMSNorm alone, the same bits as inside the operations above on matrices of so many lanes, 0 for the chosen set's: out (n, columns)
// without gaps.
QWEN2_API int qwen2_norm(const float* x, int64_t n, int64_t columns, int64_t x_stride, const float* weight, float eps, float* out, int32_t lanes);

// The largest number of each row and its place, the first of equals; a NaN counts as the largest.
QWEN2_API int qwen2_argmax(const float* x, int64_t n, int64_t columns, int64_t x_stride, int64_t* places, float* values);

// ---- attention over the cache

// The cache of a sequence is a list of blocks, each of 64 consecutive tokens, all layers and heads of them. A layer's head in a
// block is a piece of qwen2_cache_bytes(head_dim, bits) bytes; cache.h says how it is laid out.
enum { QWEN2_CACHE_BLOCK = 64 };
QWEN2_API int64_t qwen2_cache_bytes(int32_t head_dim, int32_t bits);  // bits 16 or 8; 0 for others

typedef struct {
    const float* qkv;            // (N, (H + 2K) * d): q, k and v of the step's tokens, not rotated
    float* out;                  // (N, H * d)
    const float* cos;            // (N, d / 2), with the rotary scaling's factor in it; pairs are (i, i + d / 2)
    const float* sin;
    const int32_t* counts;       // (S): new tokens of each sequence, at least one; their sum is N
    const int32_t* histories;    // (S): tokens that the cache holds already
    uint8_t* const* blocks;      // the sequences' blocks end to end, ceil((history + count) / 64) of each
    const float* key_factors;    // (K, d / 2) or NULL: what q is multiplied and k divided by, a pair by one number, so that the pairs of a
                                 // key are of one size when it is rounded
    int64_t qkv_stride, out_stride;  // floats from one token's row to the next
    int64_t offset;              // bytes from a block's beginning to this layer's first head
    int32_t sequences, heads, kv_heads, head_dim, bits;
    int32_t lanes;               // of the model's matrices, whose set attends; 0 for the chosen one. Inside a layer it is not looked at
} qwen2_attention;

// Rotates q and k, writes k and v to the cache, attends; the new tokens count to the cache for their later ones. 0, or -3 where
// there is no memory, or -4 for a shape that is not supported.
QWEN2_API int qwen2_attend(const qwen2_attention* step);

// ---- a layer

// qkv, attention, the output product added, then the feed-forward part or the mixture (the other is NULL), for x (n, D) without gaps.
// The parts' own x, n and outputs are not looked at; `attention` carries the step, its offset this layer's.
typedef struct {
    const qwen2_product *qkv, *output;
    const qwen2_feed_forward* feed;
    const qwen2_mixture* mixture;
} qwen2_layer;
QWEN2_API int qwen2_run_layer(const qwen2_layer* layer, const qwen2_attention* attention, float* x, int64_t n, float* router_logits);

// Several layers one after the other; the attention's offset is the first one's, and grows by `layer_bytes`; its
// key factors are those of all layers, one after the other. Where `rows` is not NULL only these `wanted` rows of x, in order, are
// finished: for the others the last layer stops when their keys and values are in the cache. `additions` may be NULL; its `first` is the
// first layer's.
QWEN2_API int qwen2_run_layers(const qwen2_layer* const* layers, int32_t count, const qwen2_attention* attention, int64_t layer_bytes, float* x, int64_t n,
                               const int64_t* rows, int64_t wanted, const qwen2_additions* additions);

// ---- the search for the scales of a format's groups

// `groups` groups of `width` (at most 32) weights, one group a column: x and weights are (width, groups). Trial t is a scale that puts a
// group's largest weight on `first` + t, or its range on `high` + t; its weights are rounded to whole numbers in low .. high, or to
// table[128 + whole]. Found is the best of the least-squares scales, and minima where `minimum` is not NULL. quant/search.py says more.
typedef struct {
    const float *x, *weights, *trials;
    const float* table;          // 256 numbers or NULL
    float *scale, *minimum;      // (groups)
    int64_t groups;
    float first, low, high;
    int32_t width, trial_count, below_zero;
} qwen2_search;
QWEN2_API int qwen2_search_scales(const qwen2_search* search);

// ---- training: what lies between the products of a step, forward and backward

// Numbers are float32 (type 0) or bfloat16 (type 30, ggml's numbers); `void*` below is of the type that the call names. Sums over rows
// are the same bits for any number of threads.

// The team of threads that these operations run on instead of the library's own: parallel(work, context, threads, 0) runs
// work(context) on so many threads at once, the caller among them, and returns when all have, as GOMP_parallel of the OpenMP runtimes
// does. torch's products keep theirs spinning between operations, where a second pool on the same cores would wait for them.
// NULL: the library's own pool.
typedef void (*qwen2_parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
QWEN2_API void qwen2_lend_team(qwen2_parallel parallel, int threads);

// RMSNorm: y = x * inverse * weight with inverse = 1 / sqrt(mean(x^2) + eps), kept. Backward: y comes in as its gradient and goes out as
// the norm's output again; dx = its gradient plus `residual`, where that is not NULL; dweight is overwritten.
typedef struct {
    const float *x, *weight; // (n, columns), (columns)
    void* y;                 // (n, columns)
    float* inverse;          // (n)
    const float* residual;   // (n, columns) or NULL
    float *dx, *dweight;     // (n, columns), (columns); not looked at forward
    int64_t n, columns;
    float eps;
    int32_t type;
} qwen2_norm_step;
QWEN2_API int qwen2_norm_forward(const qwen2_norm_step* step);
QWEN2_API int qwen2_norm_backward(const qwen2_norm_step* step);

// SwiGLU: out (n, f) = silu(gate) * up of gate_up (n, 2f), side by side, rows times `scales` (n) where that is not NULL. Backward:
// `product` comes in as its gradient and goes out as out again; `into` (n, 2f) is the gradient of gate_up and may be gate_up itself,
// `dscales` (n) that of the scales, or NULL.
QWEN2_API int qwen2_gated_forward(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* out);
QWEN2_API int qwen2_gated_backward(int32_t type, const void* gate_up, int64_t n, int64_t f, const float* scales, void* product, void* into, float* dscales);

// out (n, columns) = base, or zeros where that is NULL, + the rows of x of the type that `places` (n, active) names, which is not checked.
QWEN2_API int qwen2_gather_rows(int32_t type, const void* x, const int64_t* places, int64_t n, int64_t active, int64_t columns, const float* base, float* out);

// out = x + y, `count` numbers, y of the type; out may be x.
QWEN2_API int qwen2_add(int32_t type, const float* x, const void* y, int64_t count, float* out);

// sums (columns) of x (n, columns), rows `stride` numbers apart.
QWEN2_API int qwen2_sum_rows(int32_t type, const void* x, int64_t n, int64_t columns, int64_t stride, float* sums);

// Cross-entropy of logits (n, columns): losses and log-sums (n), and where `scale` is not 0 the gradient of
// scale * (loss + z_loss * log-sum^2) in the logits' place. A label below 0 is left out: zeros.
typedef struct {
    void* logits;
    const int64_t* labels;   // below `columns`, which is not checked
    float *losses, *log_sums;
    int64_t n, columns;
    float scale, z_loss;
    int32_t type;
} qwen2_entropy;
QWEN2_API int qwen2_entropy_rows(const qwen2_entropy* step);

// Causal attention inside sequences that lie end to end, q and k turned by cos and sin first where these are not NULL. Backward: the
// gradients of the unrotated q, k and v, from `out` and `log_sums` as the forward pass left them.
typedef struct {
    const void *q, *k, *v;         // (tokens, heads * d), (tokens, kv_heads * d) twice, rows q_stride, k_stride, v_stride numbers apart
    const float *cos, *sin;        // (tokens, d / 2) or NULL; pairs are (i, i + d / 2)
    const int32_t* lengths;        // (sequences), each at least 1
    void* out;                     // (tokens, heads * d) without gaps
    float* log_sums;               // (heads, tokens)
    const void* dout;              // (tokens, heads * d) without gaps; this and what follows is not looked at forward
    void *dq, *dk, *dv;
    void* workspace;               // qwen2_train_attention_bytes of it
    int64_t tokens, q_stride, k_stride, v_stride, dq_stride, dk_stride, dv_stride;
    float scale;
    int32_t sequences, heads, kv_heads, head_dim, type;
} qwen2_train_attention;
QWEN2_API int64_t qwen2_train_attention_bytes(const qwen2_train_attention* step, int backward);
QWEN2_API int qwen2_train_attention_forward(const qwen2_train_attention* step);
QWEN2_API int qwen2_train_attention_backward(const qwen2_train_attention* step);

// ---- what the machine can do at most, for the figures of speed to be held against; all threads

// Reads `bytes` bytes once.
QWEN2_API int qwen2_read(const void* memory, int64_t bytes);
// Nanoseconds that operations have taken so far, all in all; what passes between them is the caller's.
QWEN2_API uint64_t qwen2_busy(void);
// Multiplies bytes, or floats, `rounds` times on every thread and adds them up, in registers; returns the operations (two a product) done.
QWEN2_API int64_t qwen2_multiply_bytes(int64_t rounds);
QWEN2_API int64_t qwen2_multiply_floats(int64_t rounds);

#ifdef __cplusplus
}
#endif
#endif
