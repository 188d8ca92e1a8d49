// The kernel of mixers_step by the number of sequences, one translation unit each.
#pragma once

#include <cuda_runtime.h>

#include "quamba/mixers_step.cuh"

namespace quamba {

// GROUPS * 8 sequences at most.
template <int GROUPS>
cudaError_t launch_mixers_step(const StackParams& p, cudaStream_t stream);

}  // namespace quamba
