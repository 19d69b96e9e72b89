// The steps of training for AVX-512 with VNNI; as for isa_avx512.cpp, nothing of the standard library's inline code may be used.
#define QWEN2_ISA avx512
#include "simd_avx512.h"

#include "train_set.h"

namespace qwen2 {

extern const TrainSet AVX512_TRAIN = QWEN2_ISA::train_set();

}  // namespace qwen2
