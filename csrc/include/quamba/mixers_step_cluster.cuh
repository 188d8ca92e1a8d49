// mixers_step: thread blocks of a cluster write into each other's shared memory, which all divide alike: a place is
// named by its address in the own one.
#pragma once

#include "quamba/mixers_step_warps.cuh"

namespace quamba {

__device__ __forceinline__ uint32_t remote_address(const void* own, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

// Numbers for another thread block, and a barrier there that counts their bytes. Arriving at a barrier behind plain
// stores takes a fence for all memory, 500 cycles and more for each warp. Addresses as remote_address gives them.
__device__ __forceinline__ void send(uint32_t to, uint32_t v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(v),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void send(uint32_t to, uint2 v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(v.x),
               "r"(v.y), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_remote(uint64_t* own, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_address(own, rank))
               : "memory");
}

__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// All threads of a cluster meet.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
