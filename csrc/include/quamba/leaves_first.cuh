// What is read once a step, as a policy for loads and copies.
#pragma once

#include <cstdint>

namespace quamba {

// It leaves the second-level cache before what is read again sooner, which the states and the small tensors of a whole
// model are when a step's large weights do not fit.
__device__ __forceinline__ uint64_t leaves_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace quamba
