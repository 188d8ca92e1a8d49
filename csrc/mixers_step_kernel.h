// The kernel of mixers_step by the transform of g, one translation unit each.
#pragma once

#include <cuda_runtime.h>

#include "quamba/mixers_step.cuh"

namespace quamba {

// BASE: one of kStackHadamards, or 0 where there is no transform. Makes p->plan.cluster smaller where the device
// has no room for such clusters.
template <int BASE>
cudaError_t launch_mixers_step(StackParams* p, cudaStream_t stream);

}  // namespace quamba
