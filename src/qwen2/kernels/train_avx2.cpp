// The steps of training for AVX2; as for isa_avx2.cpp, nothing of the standard library's inline code may be used.
#define QWEN2_ISA avx2
#include "simd_avx2.h"

#include "train_set.h"

namespace qwen2 {

extern const TrainSet AVX2_TRAIN = QWEN2_ISA::train_set();

}  // namespace qwen2
