// linear of few columns for as many rows of x as a prefill has: its tiles are too few to fill the device, and each
// would fetch all of K. So the thread blocks of a cluster take a slice of K each, for the same rows of x and columns,
// and then a part of the results each: sums travel by stores that the receiver's barrier counts.
//
// The weight's columns are the matrix unit's rows here, 64 to a group of four warps, and rows of x its columns, of
// which a tensor map brings any multiple of eight: that is how finely rows are dealt out over the device. A warp
// copies. All clusters walk through the weight in the same order: beginning elsewhere, each, they took half as long
// again.
#pragma once

#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>

#include <cstring>
#include <utility>

#include "quamba/cluster.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_short.cuh"
#include "quamba/matrix_operand.cuh"

namespace quamba {

constexpr int kSliceStage = 128;  // bytes of K of a stage: a row of the widest swizzle
constexpr int kSliceGroupThreads = 128, kSliceGroupColumns = 64, kSliceMostGroups = 4;
constexpr int kSliceMostColumns = kSliceMostGroups * kSliceGroupColumns, kSliceMostRows = 96;  // of a block
constexpr int kSliceThreads = kSliceMostGroups * kSliceGroupThreads + 32;  // of a block, at most
constexpr int kSliceMostStages = 12;
constexpr int kSliceSums = 512;  // bytes: a warp's sums of eight rows of x and sixteen columns

// How a product is cut. The blocks of a cluster deal out sums by eights of rows, each warp's in turn, from another one
// on for each warp, so that at any time they send to different blocks.
struct SliceCut {
  int rows;     // of x, of a cluster: a multiple of 8, at most the kernel's
  int columns;  // of the weight, of a cluster, rounded up to a multiple of 8
  int stages;   // that shared memory holds

  __host__ __device__ constexpr int groups() const { return (columns + kSliceGroupColumns - 1) / kSliceGroupColumns; }
  __host__ __device__ constexpr int threads() const { return groups() * kSliceGroupThreads + 32; }
  __host__ __device__ constexpr int warps() const { return (columns + 15) / 16; }  // that have columns
  __host__ __device__ constexpr int stage() const { return (rows + columns) * kSliceStage; }
  // Of a warp's eights of rows, those that a block finishes, at most; and their bytes, of all warps and of all blocks.
  __host__ __device__ constexpr int shares(int slices) const { return (rows / 8 + slices - 1) / slices; }
  __host__ __device__ constexpr int handed(int slices) const { return warps() * shares(slices) * kSliceSums * slices; }
  // With what the matrix unit reads beyond the last stage: of whole groups of columns.
  __host__ __device__ constexpr int shared(int slices) const {
    constexpr int kBeyond = (kSliceGroupColumns - 8) * kSliceStage;
    const int more = handed(slices) > kBeyond ? handed(slices) : kBeyond;
    return 1024 + stages * stage() + more + 8 * (2 * kSliceMostStages + 1);
  }
};

// Four bytes of a row where a thread has two columns, eight apart, of two rows: v[0] and v[1] are those of column n,
// v[2] and v[3] of n + 8. Neighbouring columns are four lanes apart. `out`: where this thread's four bytes go.
__device__ __forceinline__ void slice_write_bytes(int8_t* out, const float (&v)[4], bool writes) {
  const int place = threadIdx.x >> 2 & 3;  // of the column among four
  const uint32_t mine = round_to_bytes(v[0], v[1], v[2], v[3]), next = __shfl_xor_sync(~0u, mine, 4);
  const uint32_t two = __byte_perm(mine, next, place & 1 ? 0x3715 : 0x6240);
  const uint32_t far = __shfl_xor_sync(~0u, two, 8);
  const uint32_t four = __byte_perm(two, far, place & 2 ? 0x3276 : 0x5410);
  if (writes) *reinterpret_cast<uint32_t*>(out) = four;
}

// The same for a float type of two bytes, by two columns.
template <typename Out>
__device__ __forceinline__ void slice_write_pairs(const LinearParams& p, const float (&v)[4], int64_t m, int64_t n,
                                                  int64_t limit) {
  const bool odd = threadIdx.x >> 2 & 1;
  const int64_t row = m + odd;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Out rounded[2] = {from_float<Out>(v[2 * h]), from_float<Out>(v[2 * h + 1])};
    uint32_t mine;
    memcpy(&mine, rounded, 4);
    const uint32_t next = __shfl_xor_sync(~0u, mine, 4);
    const int64_t column = n + 8 * h - odd;
    if (row < p.rows && column < limit)
      *reinterpret_cast<uint32_t*>(static_cast<Out*>(p.out) + row * p.columns + column) =
          odd ? __byte_perm(next, mine, 0x7632) : __byte_perm(mine, next, 0x5410);
  }
}

// blockIdx.x: slices; blockIdx.y: cut.rows rows of x; blockIdx.z: cut.columns columns. Maps: of x and of the weight, in
// boxes of so many rows. N is a multiple of 4, p.out aligned to 16 bytes. No bias, no residual. kBytes: an int8 result.
// kPerRow: of the scale of x.
template <int ROWS, int SLICES, bool kBytes, bool kPerRow>
__global__ void __launch_bounds__(kSliceThreads, 1)
    linear_slices_kernel(const LinearParams p, const SliceCut cut, const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ CUtensorMap weight_map) {
  extern __shared__ char raw[];
  char* const shared = raw + (1024 - __cvta_generic_to_shared(raw) % 1024) % 1024;
  char* const handed = shared + cut.stages * cut.stage();  // (SLICES, warps, shares, 32, 4) sums
  const int of_warp = cut.shares(SLICES) * kSliceSums, of_block = cut.warps() * of_warp, eights = cut.rows / 8;
  uint64_t* const full = reinterpret_cast<uint64_t*>(handed + SLICES * of_block);
  uint64_t *const empty = full + kSliceMostStages, *const given = empty + kSliceMostStages;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, rank = blockIdx.x;
  const int groups = cut.groups(), workers = groups * kSliceGroupThreads, group = warp >> 2;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * cut.rows, n0 = static_cast<int64_t>(blockIdx.z) * cut.columns;
  const int all = static_cast<int>((p.inner + kSliceStage - 1) / kSliceStage);
  const int begin = all * rank / SLICES, own = all * (rank + 1) / SLICES - begin;
  // Of a warp's eights of rows, the first that this block finishes; then every SLICES-th.
  const auto first_share = [&](int of) { return (rank - of) & (SLICES - 1); };

  if (thread == workers) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&x_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&weight_map));
    for (int i = 0; i < cut.stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, groups);
    }
    barrier_init(given, 1);
    cutlass::arch::fence_barrier_init();
    int shares = 0;
    for (int i = 0; i < cut.warps(); ++i) shares += (eights - first_share(i) + SLICES - 1) / SLICES;
    barrier_expect(given, (SLICES - 1) * shares * kSliceSums);
    for (int i = blockIdx.y; i < own; i += gridDim.y)
      cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&weight_map, kSliceStage * (begin + i), static_cast<int>(n0));
  }
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();
  wait_for_previous();

  if (thread >= workers) {
    if (thread == workers) {
      constexpr auto kStays = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
      int stage = 0, parity = 1;
      for (int i = 0; i < own; ++i) {
        if (i >= cut.stages) barrier_wait(empty + stage, parity);
        char* const to = shared + stage * cut.stage();
        const int k = kSliceStage * (begin + i);
        barrier_expect(full + stage, cut.stage());
        cute::SM90_TMA_LOAD_2D::copy(&weight_map, full + stage, kStays, to, k, static_cast<int>(n0));
        cute::SM90_TMA_LOAD_2D::copy(&x_map, full + stage, kStays, to + cut.columns * kSliceStage, k,
                                     static_cast<int>(m0));
        if (++stage == cut.stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  const int64_t n = n0 + 16 * warp + lane / 4;  // a thread's columns: this one and eight further
  const int64_t limit = n0 + cut.columns < p.columns ? n0 + cut.columns : p.columns;
  float weight_scale[2], out_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool inside = n + 8 * h < limit;
    weight_scale[h] = inside ? p.weight_scale[n + 8 * h] : 0.0f;
    out_scale[h] = kBytes && inside ? p.out_scale[n + 8 * h] : 1.0f;
  }
  const float one_scale = kPerRow ? 1.0f : p.x_scale[0];

  constexpr int kSums = ROWS / 2;  // of a thread
  uint32_t sum[kSums];
  {
    int stage = 0, parity = 0, before = 0;
#pragma unroll 1
    for (int i = 0; i < own; ++i) {
      barrier_wait(full + stage, parity);
      const uint32_t place = (shared_address(shared) + stage * cut.stage()) / 16;
      const uint32_t weight = place + group * kSliceGroupColumns * kSliceStage / 16;
      const uint32_t x = place + cut.columns * kSliceStage / 16;
#pragma unroll
      for (int e = 0; e < kSums; ++e) cute::warpgroup_fence_operand(sum[e]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kSliceStage / 32; ++k)
        matrix_multiply<ROWS>(swizzled_operand(weight + 2 * k), swizzled_operand(x + 2 * k), sum, i == 0 && k == 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (i > 0 && thread % kSliceGroupThreads == 0) barrier_arrive(empty + before);
      before = stage;
      if (++stage == cut.stages) stage = 0, parity ^= 1;
    }
  }
  cute::warpgroup_wait<0>();
  let_next_start();  // not before: the first of its blocks would gather where this kernel leaves multiprocessors free
#pragma unroll
  for (int e = 0; e < kSums; ++e) cute::warpgroup_fence_operand(sum[e]);
  if (warp >= cut.warps()) return;

  char* const mine = handed + warp * of_warp + lane * 16;
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) {
    if (j >= eights) break;
    const int to = (j + warp) & (SLICES - 1);
    const uint4 v = make_uint4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    if (to == rank) {
      *reinterpret_cast<uint4*>(mine + rank * of_block + j / SLICES * kSliceSums) = v;
    } else {
      send(remote_address(mine + rank * of_block, to) + j / SLICES * kSliceSums, v, remote_address(given, to));
    }
  }
  // Rescaled as in finish(), of an int8 result as ShortColumn has it.
  ShortColumn<kPerRow> columns[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float scale = weight_scale[h];
    if (!kPerRow) {
      scale = __fmul_rn(one_scale, scale);
      if (kBytes) scale = fminf(scale, 256.0f * out_scale[h]);
    }
    columns[h] = {scale, out_scale[h], reciprocal_approx(out_scale[h])};
  }
  int64_t m = m0 + 8 * first_share(warp) + 2 * (lane & 3);  // this row and the next
  // The four bytes that the thread writes are of columns from `column` on.
  const int64_t column = n - (lane >> 2 & 3) + (lane >> 3 & 1) * 8;
  int8_t* out = static_cast<int8_t*>(p.out) + (m + (lane >> 2 & 1)) * p.columns + column;
  const char* from = mine;
  barrier_wait_cluster(given, 0);

#pragma unroll 1
  for (int j = first_share(warp); j < eights; j += SLICES, m += 8 * SLICES, from += kSliceSums) {
    uint4 exact = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int s = 1; s < SLICES; ++s) {
      const uint4 part = *reinterpret_cast<const uint4*>(from + s * of_block);
      exact.x += part.x, exact.y += part.y, exact.z += part.z, exact.w += part.w;
    }
    float x_scale[2] = {1.0f, 1.0f};
    if constexpr (kPerRow) {
#pragma unroll
      for (int i = 0; i < 2; ++i) x_scale[i] = p.x_scale[m + i < p.rows ? m + i : 0];
    }
    const auto result = [&](uint32_t sums, int i, int h) {
      const float v = static_cast<float>(static_cast<int>(sums));
      if constexpr (kBytes) return columns[h].steps(v, x_scale[i]);
      return __fmul_rn(v, kPerRow ? __fmul_rn(x_scale[i], columns[h].weight_scale) : columns[h].weight_scale);
    };
    const float v[4] = {result(exact.x, 0, 0), result(exact.y, 1, 0), result(exact.z, 0, 1), result(exact.w, 1, 1)};
    if constexpr (kBytes) {
      slice_write_bytes(out, v, m + (lane >> 2 & 1) < p.rows && column < limit);
      out += 8 * SLICES * p.columns;
    } else if (p.out_type == Type::kHalf) {
      slice_write_pairs<__half>(p, v, m, n, limit);
    } else if (p.out_type == Type::kBFloat16) {
      slice_write_pairs<__nv_bfloat16>(p, v, m, n, limit);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = m + i % 2, at = n + i / 2 * 8;
        if (row < p.rows && at < limit) static_cast<float*>(p.out)[row * p.columns + at] = v[i];
      }
    }
  }
}

}  // namespace quamba
