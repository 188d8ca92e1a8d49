// mixers_step: the workers of a cluster's thread blocks meet.
#pragma once

#include "quamba/cluster.cuh"
#include "quamba/mixers_step_warps.cuh"

namespace quamba {

__device__ __forceinline__ void barrier_arrive_remote(uint64_t* own, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_address(own, rank))
               : "memory");
}

// What this thread block's workers wrote to the others is there once they have waited for `barrier`, which counts the
// warps of all workers of the cluster.
__device__ __forceinline__ void meet_cluster(uint64_t* barrier, int cluster, int parity) {
  __syncwarp();
  const int lane = threadIdx.x & 31;
  if (lane < cluster) barrier_arrive_remote(barrier, lane);
  barrier_wait_cluster(barrier, parity);
}

}  // namespace quamba
