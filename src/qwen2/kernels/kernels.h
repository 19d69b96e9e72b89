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

#define QWEN2_ABI_VERSION 1

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

#ifdef __cplusplus
}
#endif
#endif
