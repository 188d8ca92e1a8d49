// Copies of 16 bytes from memory to shared memory that need no registers while they are under way.
#pragma once

#include <cuda_runtime.h>

namespace quamba {

// 16 bytes, or zeros. Past the first-level cache.
__device__ __forceinline__ void copy_piece(void* to, const void* from, bool inside = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copies_committed() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All of this thread's groups but the last kOpen are there.
template <int kOpen>
__device__ __forceinline__ void copies_landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace quamba
