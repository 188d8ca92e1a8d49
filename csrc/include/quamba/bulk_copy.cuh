// Hopper's bulk copies between memory and shared memory: one thread asks for them, none moves anything. Addresses and
// sizes are multiples of 16.
#pragma once

#include "quamba/barrier.cuh"
#include "quamba/leaves_first.cuh"

namespace quamba {

// What a thread wrote to shared memory (barriers, too) is there for the bulk copies that are asked for behind this.
__device__ __forceinline__ void show_to_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The barrier is passed when the bytes are there.
__device__ __forceinline__ void bulk_fetch(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                           uint64_t policy) {
  barrier_expect(barrier, static_cast<int>(bytes));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// A group of its own of this thread's.
__device__ __forceinline__ void bulk_write(void* to, const void* from, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(policy)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All of this thread's writes but the last kOpen have read shared memory.
template <int kOpen>
__device__ __forceinline__ void bulk_writes_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}

}  // namespace quamba
