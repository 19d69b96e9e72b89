// The kernels for AVX-512 with VNNI. Nothing of the standard library's inline code may be used in what this file includes: the
// linker would keep one copy of it, perhaps this one, for processors without AVX-512.
#define QWEN2_ISA avx512
#include "simd_avx512.h"

#include "pairs.h"
#include "ceilings.h"
#include "layer.h"
#include "search.h"
#include "set.h"

namespace qwen2 {

extern const KernelSet AVX512_SET = {
    "avx512", QWEN2_AVX2 | QWEN2_FMA | QWEN2_F16C | QWEN2_AVX512F | QWEN2_AVX512BW | QWEN2_AVX512VL | QWEN2_AVX512VNNI,
    QWEN2_ISA::L, QWEN2_ISA::packed_bytes, QWEN2_ISA::pack, QWEN2_ISA::pack_file, QWEN2_ISA::unpack_rows, QWEN2_ISA::unpack_blocks,
    QWEN2_ISA::multiply, QWEN2_ISA::feed, QWEN2_ISA::mix, QWEN2_ISA::norm, QWEN2_ISA::argmax, QWEN2_ISA::attend, QWEN2_ISA::search,
    QWEN2_ISA::read, QWEN2_ISA::multiply_bytes, QWEN2_ISA::multiply_floats, QWEN2_ISA::run_layer,
    &AVX512_TRAIN,
};

}  // namespace qwen2
