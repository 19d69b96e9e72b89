// Which instruction sets may be used here: read once by the Python face, and by the dispatch of the kernels.
// Left out: cache sizes and core counts; nothing here depends on them.
#include "kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#define QWEN2_X86 1
#include <cpuid.h>
#elif defined(__aarch64__)
#define QWEN2_ARM64 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

namespace {

#if defined(QWEN2_X86)

struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

// One leaf of CPUID; zeros when the processor does not have the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Registers();
    return r;
}

// The register sets that the operating system saves (XCR0). Only called when CPUID says that XGETBV exists.
uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t detect() {
    const Registers basic = cpuid(1, 0);
    if (!bit(basic.c, 27) || !bit(basic.c, 28)) return 0;     // OSXSAVE, AVX
    const uint64_t saved = saved_registers();
    if ((saved & 0x06) != 0x06) return 0;                     // SSE and AVX registers
    const Registers extended = cpuid(7, 0), more = cpuid(7, 1);
    uint64_t found = 0;
    if (bit(extended.b, 5)) found |= QWEN2_AVX2;
    if (bit(basic.c, 12)) found |= QWEN2_FMA;
    if (bit(basic.c, 29)) found |= QWEN2_F16C;
    if (bit(more.a, 4)) found |= QWEN2_AVXVNNI;
    if ((saved & 0xe6) != 0xe6) return found;                 // opmask, upper halves, upper sixteen
    if (bit(extended.b, 16)) found |= QWEN2_AVX512F;
    if (bit(extended.b, 30)) found |= QWEN2_AVX512BW;
    if (bit(extended.b, 31)) found |= QWEN2_AVX512VL;
    if (bit(extended.c, 11)) found |= QWEN2_AVX512VNNI;
    if (bit(more.a, 5)) found |= QWEN2_AVX512BF16;
    return found;
}

#elif defined(QWEN2_ARM64)

#if defined(__APPLE__)
bool has(const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

uint64_t detect() {
    uint64_t found = QWEN2_NEON;                              // every AArch64 has it
#if defined(__linux__)
    const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
    if (one & (1ul << 20)) found |= QWEN2_DOTPROD;            // HWCAP_ASIMDDP
    if (two & (1ul << 13)) found |= QWEN2_I8MM;               // HWCAP2_I8MM
    if (two & (1ul << 14)) found |= QWEN2_BF16;               // HWCAP2_BF16
#elif defined(__APPLE__)
    if (has("hw.optional.arm.FEAT_DotProd")) found |= QWEN2_DOTPROD;
    if (has("hw.optional.arm.FEAT_I8MM")) found |= QWEN2_I8MM;
    if (has("hw.optional.arm.FEAT_BF16")) found |= QWEN2_BF16;
#elif defined(_WIN32)
    if (IsProcessorFeaturePresent(43)) found |= QWEN2_DOTPROD;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#endif
    return found;
}

#else

uint64_t detect() { return 0; }

#endif

}  // namespace

uint32_t qwen2_abi_version(void) { return QWEN2_ABI_VERSION; }

uint64_t qwen2_cpu_features(void) {
    static const uint64_t found = detect();  // CPUID leaves a virtual machine: it takes longer than a small operation
    return found;
}
