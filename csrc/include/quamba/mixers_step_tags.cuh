// mixers_step: how thread blocks wait for each other. Numbers that all need travel with a tag in the same word; what
// has no room for one takes a barrier.
#pragma once

#include "quamba/hadamard_quant.cuh"
#include "quamba/mixers_step_warps.cuh"

namespace quamba {

// The workers of a thread block meet.
__device__ __forceinline__ void team_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kStackWorkers) : "memory"); }

// The workers of all thread blocks meet: what any wrote before arriving is there for all after waiting.
class StackGrid {
 public:
  __device__ explicit StackGrid(const StackPlan& p) : counter_(p.counter), grid_(p.grid) {}
  __device__ void meet() {
    goal_ += grid_;
    team_sync();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter_) : "memory");
      } while (seen < goal_);
    }
    team_sync();
  }

 private:
  unsigned* counter_;
  unsigned goal_ = 0, grid_;
};

__device__ __forceinline__ unsigned long long load_tagged(const unsigned long long* from) {
  unsigned long long word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

__device__ __forceinline__ void store_tagged(unsigned long long* to, float v, unsigned tag) {
  const unsigned long long word = static_cast<unsigned long long>(tag) << 32 | __float_as_uint(v);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ bool arrived(unsigned long long word, unsigned tag, float* v) {
  *v = __uint_as_float(static_cast<unsigned>(word));
  return static_cast<unsigned>(word >> 32) == tag;
}

// Two neighbours at a time; each is whole, and has a tag of its own.
__device__ __forceinline__ void load_tagged2(const unsigned long long* from, unsigned long long* words) {
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(from) : "memory");
}

// `count` tagged numbers, a multiple of 4, to padded_index of `to`: four neighbours at a time, worker by worker, so
// that a worker can read what it fetched. While some are missing, only those are asked for again: waiting burdens the
// memory.
template <int BATCH>
__device__ __forceinline__ void fetch_tagged(const unsigned long long* from, int count, unsigned tag, float* to) {
  constexpr int kNext = 4 * kStackWorkers, kNextPadded = kNext + kNext / 16;
  static_assert(kNext % 16 == 0, "kNextPadded is what padded_index adds for kNext");
  from += 4 * threadIdx.x, to += padded_index(4 * threadIdx.x);
  int left = count - 4 * static_cast<int>(threadIdx.x);
  // A warp's lanes stay together, also those that have nothing.
#pragma unroll 1
  for (; __any_sync(0xffffffffu, left > 0); left -= BATCH * kNext) {
    unsigned missing = (1u << max(0, min(BATCH, divide_up(left, kNext)))) - 1;
    do {
      unsigned long long words[BATCH][4];
#pragma unroll
      for (int u = 0; u < BATCH; ++u)
        if (missing >> u & 1) {
          load_tagged2(from + u * kNext, words[u]);
          load_tagged2(from + u * kNext + 2, words[u] + 2);
        }
#pragma unroll
      for (int u = 0; u < BATCH; ++u)
        if (missing >> u & 1) {
          float v[4];
          bool there = true;
#pragma unroll
          for (int k = 0; k < 4; ++k) there &= arrived(words[u][k], tag, &v[k]);
          if (there) {
#pragma unroll
            for (int k = 0; k < 4; ++k) to[u * kNextPadded + k] = v[k];
            missing ^= 1u << u;
          }
        }
    } while (__any_sync(0xffffffffu, missing != 0));
    from += BATCH * kNext, to += BATCH * kNextPadded;
  }
}

// A sum over thread blocks: the upper bits count them, the lower ones hold what they added, each shifted to be
// positive. At most 255 thread blocks.
constexpr int kSumBits = 40;
constexpr long long kSumShift = 1LL << 31;

__device__ __forceinline__ void add_counted(unsigned long long* to, int v) {
  atomicAdd(to, (1ULL << kSumBits) + static_cast<unsigned long long>(v + kSumShift));
}

__device__ __forceinline__ bool complete(unsigned long long word, int grid, int* sum) {
  *sum = static_cast<int>(static_cast<long long>(word & ((1ULL << kSumBits) - 1)) - grid * kSumShift);
  return static_cast<int>(word >> kSumBits) == grid;
}

}  // namespace quamba
