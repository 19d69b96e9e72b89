// The kernels for Arm's 64-bit processors with the dot product. Nothing of the standard library's inline code may be used in what this
// file includes: the linker would keep one copy of it, perhaps this one, for older processors.
#define QWEN2_ISA neon
#include "simd_neon.h"

#include "pairs.h"
#include "ceilings.h"
#include "layer.h"
#include "search.h"
#include "set.h"

namespace qwen2 {

extern const KernelSet NEON_SET = {
    "neon", QWEN2_NEON | QWEN2_DOTPROD,
    QWEN2_ISA::L, QWEN2_ISA::packed_bytes, QWEN2_ISA::pack, QWEN2_ISA::pack_file, QWEN2_ISA::unpack_rows, QWEN2_ISA::unpack_blocks,
    QWEN2_ISA::multiply, QWEN2_ISA::feed, QWEN2_ISA::mix, QWEN2_ISA::norm, QWEN2_ISA::argmax, QWEN2_ISA::attend, QWEN2_ISA::search,
    QWEN2_ISA::read, QWEN2_ISA::multiply_bytes, QWEN2_ISA::multiply_floats, QWEN2_ISA::run_layer,
    &NEON_TRAIN,
};

}  // namespace qwen2
