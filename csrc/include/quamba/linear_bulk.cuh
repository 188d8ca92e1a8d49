// linear, some rows of x, or few columns, with Hopper's copy engine and matrix unit: what linear_ring.cuh computes, and how its results
// are added up and written, but for the loop.
//
// A block takes COLUMNS rows of the weight against 64 or 128 rows of x. One thread has both copied by tensor maps, 128
// bytes of K a stage, into a ring that fills the multiprocessor's memory, so that some 100 KB of the weight are under
// way. Two teams of four warps multiply: with 64 rows of x they take stages in turn, with 128 each has half the rows.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>

#include "quamba/linear_ring.cuh"

namespace quamba {

constexpr int kBulkStage = 128;  // bytes of K: a row of the widest swizzle
constexpr int kBulkTeams = 2, kBulkTeamThreads = 128;
constexpr int kBulkThreads = kBulkTeams * kBulkTeamThreads + 32;  // and the warp that copies

template <int COLUMNS, int TOKENS>
struct Bulk {
  static_assert(TOKENS == 64 || TOKENS == 128, "the matrix unit takes 64 rows");
  static constexpr int kParts = TOKENS == 64 ? kBulkTeams : 1;  // sums of a result in a block
  static constexpr int kReaders = 4 * kBulkTeams / kParts;      // warps that read a stage
  static constexpr int kStageBytes = (COLUMNS + TOKENS) * kBulkStage;
  static constexpr int kBudget = 224 * 1024;
  static constexpr int kFit = kBudget / kStageBytes < 12 ? kBudget / kStageBytes : 12;
  // Teams that take turns have slots of their own: else one that is ahead would wait for its next filling of a slot by
  // a parity that the last but one has, too, while the other's has not landed.
  static constexpr int kStages = kFit / kParts * kParts;
  static constexpr int kPitch = COLUMNS + 8;  // of the sums of one row: a warp's pairs fall on distinct banks
  static constexpr int kAlign = 1024;         // of the swizzle
  static constexpr int kShared = kAlign + kStages * (kStageBytes + 2 * static_cast<int>(sizeof(uint64_t)));
  static_assert(COLUMNS % 16 == 0 && kPitch % 16 == 8, "see kPitch");
  static_assert(4 * kParts * TOKENS * kPitch <= kStages * kStageBytes, "the sums take the ring's place");

  using Tile = cute::Shape<cute::Int<64>, cute::Int<COLUMNS>, cute::Int<kBulkStage>>;
  using Mma = decltype(cute::make_tiled_mma(cute::SM90::GMMA::ss_op_selector<int8_t, int8_t, int32_t, Tile>()));
  static_assert(cute::size<1>(cute::tile_shape(Mma{})) == COLUMNS, "one instruction for all columns");
  template <int ROWS>
  using Slots = cute::Shape<cute::Int<ROWS>, cute::Int<kBulkStage>, cute::Int<kStages>>;
  template <int ROWS>
  using Stages = decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<int8_t>{}, Slots<ROWS>{}));
};

// As the ring does it (whose code this is not: shared, it spilled there): adds up the sums that a block has in shared
// memory, (PARTS, TOKENS, PITCH) with COLUMNS of a row in use, and those of the other blocks of its cluster, and hands
// them to the tail. A thread takes four columns, of every kStep-th row of x.
template <int PARTS, int TOKENS, int COLUMNS, int PITCH, int THREADS, typename Tail>
__device__ __forceinline__ void finish_sums(const LinearParams& p, int thread, int* sums, int cluster, int rank,
                                            int64_t m0, int64_t n0, const Tail& tail) {
  constexpr int kQuads = COLUMNS / 4, kStep = THREADS / kQuads;
  const int quad = thread % kQuads * 4, first = thread / kQuads;
  const auto at = [&](int m) { return reinterpret_cast<int4*>(sums + m * PITCH + quad); };
  const auto add = [](int4 a, const int4& b) { return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
  const auto of_block = [&](int m) {
    int4 total = *at(m);
#pragma unroll
    for (int i = 1; i < PARTS; ++i) total = add(total, *at(i * TOKENS + m));
    return total;
  };
  if (cluster > 1) {
    if (PARTS > 1 && first < kStep)
      for (int m = first; m < TOKENS; m += kStep) *at(m) = of_block(m);
    cluster_meet();
  }
  const auto of_cluster = [&](int m) {
    int4 total = make_int4(0, 0, 0, 0);
#pragma unroll 4
    for (int i = 0; i < cluster; ++i)
      total = add(total, *reinterpret_cast<const int4*>(in_block(reinterpret_cast<const int*>(at(m)), i)));
    return total;
  };
  if (first < kStep && n0 + quad < p.columns) {
    constexpr int kAtOnce = TOKENS == 64 ? 64 : 32, kRounds = (kAtOnce + kStep - 1) / kStep;
    const int share = TOKENS / cluster, row0 = rank * share;
    const auto sums_of = [&](int m) { return cluster > 1 ? of_cluster(m) : of_block(m); };
    if constexpr (TOKENS == kAtOnce) {
      tail.template operator()<kRounds>(p, sums_of, row0 + first, kStep, row0 + share, m0, n0 + quad);
    } else {  // a tail may keep something in registers for every row that it is given
#pragma unroll 1
      for (int row = row0; row < row0 + share; row += kAtOnce) {
        const int end = row + kAtOnce < row0 + share ? row + kAtOnce : row0 + share;
        tail.template operator()<kRounds>(p, sums_of, row + first, kStep, end, m0, n0 + quad);
      }
    }
  }
  if (cluster > 1) cluster_meet();  // no block may go while another reads its sums
}

// blockIdx.x: cluster-many blocks in a row share a tile of columns, each with its part of K. blockIdx.y: rows of x.
// ahead: stages of the weight to prefetch while the kernel before runs. The maps: of the weight, in boxes of COLUMNS
// rows, and of x, in boxes of TOKENS rows.
template <int COLUMNS, int TOKENS, typename Tail>
__global__ void __launch_bounds__(kBulkThreads, 1)
    linear_bulk_kernel(const LinearParams p, int cluster, int ahead, const Tail tail,
                       const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map) {
  using namespace cute;
  using B = Bulk<COLUMNS, TOKENS>;
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;
  extern __shared__ char raw[];
  char* const shared = raw + (B::kAlign - cast_smem_ptr_to_uint(raw) % B::kAlign) % B::kAlign;
  int8_t* const weights = reinterpret_cast<int8_t*>(shared);  // (kStages, COLUMNS, kBulkStage)
  int8_t* const xs = weights + B::kStages * COLUMNS * kBulkStage;  // (kStages, TOKENS, kBulkStage)
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + B::kStages * B::kStageBytes);
  uint64_t* const empty = full + B::kStages;

  const int thread = threadIdx.x, lane = thread & 31, team = thread / kBulkTeamThreads;
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / cluster) * COLUMNS;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * TOKENS;
  const int all = static_cast<int>((p.inner + kBulkStage - 1) / kBulkStage);
  const int begin = all * rank / cluster, count = all * (rank + 1) / cluster - begin;
  let_next_start();
  // Blocks of other rows take the same weights.
  if (blockIdx.y == 0 && thread < COLUMNS && n0 + thread < p.columns && count > 0 && ahead > 0 && in_first_wave(1)) {
    const int64_t from = static_cast<int64_t>(begin) * kBulkStage;
    const int64_t to = static_cast<int64_t>(begin + (ahead < count ? ahead : count)) * kBulkStage;
    prefetch(p.weight + (n0 + thread) * p.weight_row + from,
             static_cast<uint32_t>((to < p.inner ? to : p.inner) - from));
    if (rank == 0) prefetch_epilogue(p, n0 + thread, p.rows);
  }
  if (thread < TOKENS) tail.near(p, m0 + thread, n0, COLUMNS);
  if (thread == 0) {
    for (int i = 0; i < B::kStages; ++i) {
      Full::init(full + i, 1);
      Empty::init(empty + i, B::kReaders);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous();

  if (team == kBulkTeams) {
    if (lane == 0) {
      for (int i = 0; i < count; ++i) {
        const int slot = i % B::kStages, k = (begin + i) * kBulkStage;
        if (i >= B::kStages) Empty::wait(empty + slot, (i / B::kStages - 1) & 1);
        // Zeros beyond the tensors' ends count as bytes, too.
        Full::arrive_and_expect_tx(full + slot, B::kStageBytes);
        constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
        SM90_TMA_LOAD_2D::copy(&weight_map, full + slot, kHint, weights + slot * COLUMNS * kBulkStage, k,
                               static_cast<int>(n0));
        SM90_TMA_LOAD_2D::copy(&x_map, full + slot, kHint, xs + slot * TOKENS * kBulkStage, k, static_cast<int>(m0));
      }
    }
    __syncwarp();
  } else {
    typename B::Mma multiply;
    const auto slice = multiply.get_thread_slice(thread % kBulkTeamThreads);
    const Tensor left = make_tensor(make_smem_ptr(xs), typename B::template Stages<TOKENS>{});
    const Tensor right = make_tensor(make_smem_ptr(weights), typename B::template Stages<COLUMNS>{});
    const Tensor a = slice.make_fragment_A(slice.partition_A(left));   // (instruction, 64 rows, K, stage)
    const Tensor b = slice.make_fragment_B(slice.partition_B(right));  // (instruction, all columns, K, stage)
    constexpr auto kResult = Shape<Int<64>, Int<COLUMNS>>{};
    Tensor sum = partition_fragment_C(multiply, kResult);
    clear(sum);
    const int rows = B::kParts == 1 ? team : 0;
    for (int i = B::kParts == 1 ? 0 : team; i < count; i += B::kParts) {
      const int slot = i % B::kStages;
      Full::wait(full + slot, (i / B::kStages) & 1);
      warpgroup_fence_operand(sum);
      warpgroup_arrive();
      CUTE_UNROLL
      for (int k = 0; k < size<2>(a); ++k)
        gemm(multiply, a(_, rows, k, slot), b(_, 0, k, slot), sum(_, 0, 0));
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(sum);
      if (lane == 0) Empty::arrive(empty + slot);
    }
    // The sums take the ring's place, whose last copies have landed where all who wait for them have met.
    cutlass::arch::NamedBarrier::sync(kBulkTeams * kBulkTeamThreads, 0);

    int* const mine = reinterpret_cast<int*>(shared) + team * 64 * B::kPitch;
    const Tensor places = slice.partition_C(make_identity_tensor(kResult));
    CUTE_UNROLL
    for (int i = 0; i < size(sum); i += 2) {  // neighbouring columns
      int* const at = mine + get<0>(places(i)) * B::kPitch + get<1>(places(i));
      *reinterpret_cast<int2*>(at) = make_int2(sum(i), sum(i + 1));
    }
  }
  __syncthreads();
  finish_sums<B::kParts, TOKENS, COLUMNS, B::kPitch, kBulkThreads>(p, thread, reinterpret_cast<int*>(shared), cluster,
                                                                   rank, m0, n0, tail);
}

}  // namespace quamba
