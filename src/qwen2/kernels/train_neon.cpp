// The steps of training for Arm's 64-bit processors with the dot product; as for isa_neon.cpp, nothing of the standard library's inline code may be used.
#define QWEN2_ISA neon
#include "simd_neon.h"

#include "train_set.h"

namespace qwen2 {

extern const TrainSet NEON_TRAIN = QWEN2_ISA::train_set();

}  // namespace qwen2
