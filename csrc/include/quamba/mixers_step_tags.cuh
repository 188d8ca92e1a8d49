// mixers_step: how thread blocks wait for each other: for the numbers themselves, which come into places that were
// zero, or for sums that count what was added; bytes take a barrier.
#pragma once

#include "quamba/hadamard_quant.cuh"
#include "quamba/mixers_step_warps.cuh"

namespace quamba {

// In every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The workers of a thread block, so many, meet.
template <int WORKERS = kStackWorkers>
__device__ __forceinline__ void team_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
}

// One word that others write.
__device__ __forceinline__ unsigned load_published_one(const unsigned* from) {
  unsigned word;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

// One thread's part of a meeting of all thread blocks, as the `goal`-th to arrive or before.
__device__ __forceinline__ void meet_grid(unsigned* counter, unsigned goal) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < goal);
}

// Arrives without order: what was written before may be seen later.
__device__ __forceinline__ void arrive_early(unsigned* counter) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits for `goal` to have arrived, without order.
__device__ __forceinline__ void wait_early(const unsigned* counter, unsigned goal) {
  while (load_published_one(counter) < goal) continue;
}

// The same with order: what was written before arriving is there after waiting.
__device__ __forceinline__ void arrive_behind(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void wait_behind(const unsigned* counter, unsigned goal) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < goal);
}

// The workers of all thread blocks meet: what any wrote before arriving is there for all after waiting.
class StackGrid {
 public:
  __device__ explicit StackGrid(const StackPlan& p) : counter_(p.counter), grid_(p.grid) {}
  __device__ void meet() {
    goal_ += grid_;
    team_sync();
    if (threadIdx.x == 0) meet_grid(counter_, goal_);
    team_sync();
  }

 private:
  unsigned* counter_;
  unsigned goal_ = 0, grid_;
};

__device__ __forceinline__ unsigned long long load_counted(const unsigned long long* from) {
  unsigned long long word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

// A number for all thread blocks, which wait for its word to be another one than zero. Zero itself goes as the negative
// one, of which the same bytes come.
__device__ __forceinline__ void publish(unsigned* to, float v) {
  const unsigned bits = __float_as_uint(v);
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(bits == 0 ? 0x80000000u : bits) : "memory");
}

__device__ __forceinline__ void publish_word(unsigned* to, unsigned word) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// Four neighbours; each of them is there or zero.
__device__ __forceinline__ uint4 load_published(const unsigned* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

__device__ __forceinline__ uint2 load_published_two(const void* from) {
  uint2 words;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from) : "memory");
  return words;
}

// What words of bytes for all are turned with, so that they are hardly ever zero: no pattern that bytes often have.
constexpr uint32_t kThere = 0x35ca6b92;

__device__ __forceinline__ void publish_two(void* to, uint2 words) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words.x), "r"(words.y) : "memory");
}

__device__ __forceinline__ bool arrived(uint4 words) { return min(min(words.x, words.y), min(words.z, words.w)) != 0; }

__device__ __forceinline__ void put(float* to, uint4 words) {
  to[0] = __uint_as_float(words.x), to[1] = __uint_as_float(words.y);
  to[2] = __uint_as_float(words.z), to[3] = __uint_as_float(words.w);
}

// BATCH times four published numbers of a worker, of which it has `fours`, STEP numbers apart. While some are missing,
// only those are asked for again: waiting burdens the memory.
template <int BATCH>
__device__ __forceinline__ void await(const unsigned* from, int step, int fours, uint4 (&words)[BATCH]) {
  unsigned missing = (1u << max(0, min(BATCH, fours))) - 1;
  // Without this the registers would have to keep what they held before, all the time.
#pragma unroll
  for (int u = 0; u < BATCH; ++u) words[u] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  while (missing != 0) {
#pragma unroll
    for (int u = 0; u < BATCH; ++u)
      if (missing >> u & 1) words[u] = load_published(from + u * step);
    // All are looked at, whatever is missing: conditions here would put each load behind the one before.
    unsigned found = 0;
#pragma unroll
    for (int u = 0; u < BATCH; ++u) found |= arrived(words[u]) ? 1u << u : 0;
    missing &= ~found;
  }
}

// `count` published numbers, a multiple of 4, to padded_index of `to`: four neighbours at a time.
template <int BATCH, int WORKERS = kStackWorkers>
__device__ __forceinline__ void fetch_row(const unsigned* from, int count, float* to) {
  constexpr int kNext = 4 * WORKERS, kNextPadded = kNext + kNext / 16;
  static_assert(kNext % 16 == 0, "kNextPadded is what padded_index adds for kNext");
  from += 4 * threadIdx.x, to += padded_index(4 * threadIdx.x);
#pragma unroll 1
  for (int left = count - 4 * static_cast<int>(threadIdx.x); left > 0; left -= BATCH * kNext) {
    const int fours = divide_up(left, kNext);
    uint4 words[BATCH];
    await<BATCH>(from, kNext, fours, words);
#pragma unroll
    for (int u = 0; u < BATCH; ++u)
      if (u < fours) put(to + u * kNextPadded, words[u]);
    from += BATCH * kNext, to += BATCH * kNextPadded;
  }
}

// A sum over thread blocks: the upper bits count them, the lower ones hold what they added, each shifted to be
// positive. At most 255 thread blocks.
constexpr int kSumBits = 40;
constexpr long long kSumShift = 1LL << 31;

__device__ __forceinline__ void add_counted(unsigned long long* to, int v) {
  // Not atomicAdd, which waits for an answer although nobody reads it.
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to),
               "l"((1ULL << kSumBits) + static_cast<unsigned long long>(v + kSumShift))
               : "memory");
}

__device__ __forceinline__ bool complete(unsigned long long word, int grid) {
  return static_cast<int>(word >> kSumBits) == grid;
}

__device__ __forceinline__ int sum_of(unsigned long long word, int grid) {
  return static_cast<int>(static_cast<long long>(word & ((1ULL << kSumBits) - 1)) - grid * kSumShift);
}

}  // namespace quamba
