// The kernel of mixers_step by the transform of g, one translation unit each.
#pragma once

#include <cuda_runtime.h>

#include "quamba/mixers_step.cuh"

namespace quamba {

// BASE: one of kStackHadamards, or 0 where there is no transform. Makes p->plan.cluster smaller where the device
// has no room for such clusters.
template <int BASE>
cudaError_t launch_mixers_step(StackParams* p, cudaStream_t stream);

// The same for many sequences, with the plan's cluster.
template <int BASE>
cudaError_t launch_mixers_step_many(const StackParams& p, cudaStream_t stream);

// How many clusters of p.plan.cluster thread blocks the device takes at a time.
template <int BASE>
cudaError_t mixers_step_many_room(const StackParams& p, int* room);

}  // namespace quamba
