// Hopper's bulk copies between memory and shared memory: one thread asks for them, none moves anything. Addresses and
// sizes are multiples of 16.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace quamba {

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// What a thread wrote to shared memory (barriers, too) is there for the bulk copies that are asked for behind this.
__device__ __forceinline__ void show_to_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier that a bulk copy into shared memory passes when its bytes are there.
__device__ __forceinline__ void bulk_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void bulk_fetch(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  const unsigned at = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(at)
               : "memory");
}

// Until the barrier was passed for the first time (parity 0), the second (1), the third (0)...
__device__ __forceinline__ void bulk_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred there;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
      "@!there bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A group of its own of this thread's.
__device__ __forceinline__ void bulk_write(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All of this thread's writes but the last kOpen have read shared memory.
template <int kOpen>
__device__ __forceinline__ void bulk_writes_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}

}  // namespace quamba
