// linear, some rows of x: more than pay for a pass over the weight straight into registers, too few to fill the tiles
// of the matrix kernels.
//
// A block takes 16 * TILES rows of the weight against 16, 32 or 64 rows of x. Both come in stages of 128 bytes of K
// through a ring in shared memory; within a stage each of four warps takes 32 bytes, so that every byte is read from
// there once or twice. A cluster of blocks cuts K where the weight has few rows, and adds up through the cluster's
// memory.
#pragma once

#include "quamba/copy.cuh"
#include "quamba/four.cuh"
#include "quamba/fragments.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_rows.cuh"

namespace quamba {

constexpr int kRingStage = 128;  // bytes of K
constexpr int kRingQuarters = 4;  // warps that share a stage, 32 bytes each

template <int TILES, int TOKENS>
struct Ring {
  static_assert(TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "the warps take 16 or 32 rows of x");
  static constexpr int kColumns = 16 * TILES;
  static constexpr int kGroups = TOKENS >= 32 ? 4 : 2;  // of 8 rows of x, a warp
  static constexpr int kThreads = 32 * kRingQuarters * TOKENS / (8 * kGroups);
  static constexpr int kStageBytes = (kColumns + TOKENS) * kRingStage;
  static constexpr int kBudget = (TILES > 5 ? 144 : 96) * 1024;  // two blocks a multiprocessor, or one of many rows
  static constexpr int kStages = kBudget / kStageBytes < 8 ? kBudget / kStageBytes : 8;
  static constexpr int kPitch = kColumns + 4;  // of the sums of one row of x: fragments fall on distinct banks
  static constexpr int kSums = TOKENS * kPitch;
  static constexpr int kShared =
      kStages * kStageBytes > 4 * kRingQuarters * kSums ? kStages * kStageBytes : 4 * kRingQuarters * kSums;
};

// All threads of the cluster, and what they have written.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ const int* in_block(const int* p, int rank) {
  uint64_t address = reinterpret_cast<uint64_t>(p);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
#endif
  return reinterpret_cast<const int*>(address);
}

// Byte `piece` * 16 of row `row` of a stage: eight rows at one piece, as load_matrices reads, are on distinct banks.
__device__ __forceinline__ int ring_offset(int row, int piece) { return row * kRingStage + ((piece ^ row) & 7) * 16; }

// What belongs to four neighbouring columns of the result, and the rescaling of their sums, step by step as in
// finish().
struct RingColumns {
  float weight_scale[4], bias[4], out_scale[4];
  bool whole;  // residual and result can be read and written in fours

  __device__ __forceinline__ RingColumns(const LinearParams& p, int64_t n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t column = n + i < p.columns ? n + i : p.columns - 1;
      weight_scale[i] = p.weight_scale[column];
      bias[i] = p.bias ? p.bias[column] : 0.0f;
      out_scale[i] = p.out_scale.or_one(column);
    }
    whole = p.columns % 4 == 0 && p.residual_row % 4 == 0 && reinterpret_cast<uintptr_t>(p.residual.data) % 16 == 0;
  }

  template <typename Out>
  __device__ __forceinline__ void rescale(const LinearParams& p, const int4& sums, int64_t m, int64_t n,
                                          Out (&values)[4]) const {
    const int sum[4] = {sums.x, sums.y, sums.z, sums.w};
    const float x_scale = p.x_scale[m];
    float residual[4] = {};
    if (whole) {
      FourBits(p.residual, m * p.residual_row + n).widen(p.residual.type, residual);
    } else if (p.residual) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n + i < p.columns) residual[i] = p.residual[m * p.residual_row + n + i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v = __fmul_rn(static_cast<float>(sum[i]), __fmul_rn(x_scale, weight_scale[i]));
      if (p.bias) v = __fadd_rn(v, bias[i]);
      if (p.residual) v = __fadd_rn(v, residual[i]);
      Store<Out>::one(values + i, v, out_scale[i], reciprocal_approx(out_scale[i]));
    }
  }

  template <typename Out>
  __device__ __forceinline__ void write(const LinearParams& p, const int4& sums, int64_t m, int64_t n) const {
    Out values[4];
    rescale(p, sums, m, n, values);
    Out* const out = static_cast<Out*>(p.out) + m * p.columns + n;
    if (whole) {
      struct alignas(4 * sizeof(Out)) Four {
        Out value[4];
      };
      *reinterpret_cast<Four*>(out) = {values[0], values[1], values[2], values[3]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n + i < p.columns) out[i] = values[i];
    }
  }
};

// What a block does with sums(m), those of row m of its x at a thread's four columns from n on: it writes them to p.out,
// which is aligned to four elements.
struct RingWrite {
  // Called before the kernel before has ended, by one thread a row of x.
  __device__ __forceinline__ void near(const LinearParams&, int64_t, int64_t, int) const {}

  template <int ROUNDS, typename Sums>
  __device__ __forceinline__ void operator()(const LinearParams& p, Sums&& sums, int first, int step, int end,
                                             int64_t m0, int64_t n) const {
    const RingColumns columns(p, n);
    for (int m = first; m < end && m0 + m < p.rows; m += step) {
      const int4 total = sums(m);
      switch (p.out_type) {
        case Type::kInt8:
          columns.write<int8_t>(p, total, m0 + m, n);
          break;
        case Type::kHalf:
          columns.write<__half>(p, total, m0 + m, n);
          break;
        case Type::kBFloat16:
          columns.write<__nv_bfloat16>(p, total, m0 + m, n);
          break;
        default:
          columns.write<float>(p, total, m0 + m, n);
      }
    }
  }
};

// blockIdx.x: cluster-many blocks in a row share a tile of columns, each with its part of K. blockIdx.y: rows of x.
// ahead: stages of the weight to prefetch while the kernel before runs.
template <int TILES, int TOKENS, typename Tail>
__global__ void __launch_bounds__(Ring<TILES, TOKENS>::kThreads, TILES > 5 ? 1 : 2)
    linear_ring_kernel(const LinearParams p, int cluster, int ahead, const Tail tail) {
  using R = Ring<TILES, TOKENS>;
  extern __shared__ __align__(128) char shared[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int quarter = warp % kRingQuarters, half = warp / kRingQuarters;
  const int rank = static_cast<int>(blockIdx.x) % cluster;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / cluster) * R::kColumns;
  const int64_t m0 = static_cast<int64_t>(blockIdx.y) * TOKENS;
  const int all = static_cast<int>((p.inner + kRingStage - 1) / kRingStage);
  const int begin = all * rank / cluster, end = all * (rank + 1) / cluster;
  let_next_start();
  if (thread < R::kColumns && n0 + thread < p.columns && begin < end && ahead > 0 &&
      in_first_wave(TILES > 5 ? 1 : 2)) {
    const int64_t from = static_cast<int64_t>(begin) * kRingStage;
    const int64_t to = static_cast<int64_t>(begin + ahead < end ? begin + ahead : end) * kRingStage;
    prefetch(p.weight + (n0 + thread) * p.weight_row + from,
             static_cast<uint32_t>((to < p.inner ? to : p.inner) - from));
    if (rank == 0) prefetch_epilogue(p, n0 + thread, p.rows);
  }
  if (thread < TOKENS) tail.near(p, m0 + thread, n0, R::kColumns);
  wait_for_previous();

  // A thread copies one piece of every kRows-th row of a stage: of the weight, then of x.
  constexpr int kRows = R::kThreads / 8, kWeightCopies = (R::kColumns + kRows - 1) / kRows, kCopies = TOKENS / kRows;
  const int row = thread / 8, piece = thread % 8;
  const int8_t* weight[kWeightCopies];
  const int8_t* x[kCopies];
#pragma unroll
  for (int i = 0; i < kWeightCopies; ++i) {
    const int64_t n = n0 + row + kRows * i;
    weight[i] = p.weight + (n < p.columns ? n : n0) * p.weight_row;
  }
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t m = m0 + row + kRows * i;
    x[i] = p.x + (m < p.rows ? m : m0) * p.x_row;
  }
  const auto copy_stage = [&](int stage) {
    char* const slot = shared + stage % R::kStages * R::kStageBytes + ring_offset(row, piece);
    const int64_t k = static_cast<int64_t>(stage) * kRingStage + 16 * piece;
    const bool inside = k < p.inner;
    const int64_t from = inside ? k : 0;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i)
      if (row + kRows * i < R::kColumns) copy_piece(slot + i * kRows * kRingStage, weight[i] + from, inside);
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_piece(slot + (R::kColumns + i * kRows) * kRingStage, x[i] + from, inside);
  };
#pragma unroll
  for (int i = 0; i < R::kStages - 1; ++i) {
    if (begin + i < end) copy_stage(begin + i);
    copies_committed();
  }

  // Where this lane's rows are: of the weight, the left operand, rows i % 16 at the warp's first 16 bytes and then at
  // its second; of x, the right one, rows i % 8 and i % 8 + 8 of two groups at both.
  const int left = lane % 16, left_piece = 2 * quarter + lane / 16;
  const int right = R::kColumns + half * 8 * R::kGroups + lane % 8 + lane / 16 * 8;
  const int right_piece = 2 * quarter + lane / 8 % 2;
  int sum[TILES][R::kGroups][4] = {};
  for (int stage = begin; stage < end; ++stage) {
    copies_landed<R::kStages - 2>();
    __syncthreads();
    if (stage + R::kStages - 1 < end) copy_stage(stage + R::kStages - 1);
    copies_committed();
    const char* const slot = shared + stage % R::kStages * R::kStageBytes;
    int b[R::kGroups / 2][4];
#pragma unroll
    for (int i = 0; i < R::kGroups / 2; ++i) load_matrices(b[i], slot + ring_offset(right + 16 * i, right_piece));
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      int a[4];
      load_matrices(a, slot + ring_offset(left + 16 * t, left_piece));
#pragma unroll
      for (int i = 0; i < R::kGroups; ++i)
        mma(sum[t][i], a[0], a[1], a[2], a[3], b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
    }
  }
  __syncthreads();  // the sums take the ring's place

  int* const sums = reinterpret_cast<int*>(shared);  // (kRingQuarters, TOKENS, kPitch)
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < R::kGroups; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int m = (half * R::kGroups + i) * 8 + lane % 4 * 2 + r % 2, n = 16 * t + lane / 4 + r / 2 * 8;
        sums[quarter * R::kSums + m * R::kPitch + n] = sum[t][i][r];
      }
  __syncthreads();

  // A thread takes four columns, of every kStep-th row of x.
  constexpr int kQuads = R::kColumns / 4, kStep = R::kThreads / kQuads;
  const int quad = thread % kQuads * 4, first = thread / kQuads;
  const auto at = [&](int m) { return reinterpret_cast<int4*>(sums + m * R::kPitch + quad); };
  const auto add = [](int4 a, const int4& b) { return make_int4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
  const auto of_quarters = [&](int m) {
    int4 total = *at(m);
#pragma unroll
    for (int i = 1; i < kRingQuarters; ++i) total = add(total, *at(i * TOKENS + m));
    return total;
  };
  if (cluster > 1) {
    if (first < kStep)
      for (int m = first; m < TOKENS; m += kStep) *at(m) = of_quarters(m);
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
    constexpr int kRounds = (TOKENS + kStep - 1) / kStep;
    const int share = TOKENS / cluster, row0 = rank * share;
    const auto sums_of = [&](int m) { return cluster > 1 ? of_cluster(m) : of_quarters(m); };
    tail.template operator()<kRounds>(p, sums_of, row0 + first, kStep, row0 + share, m0, n0 + quad);
  }
  if (cluster > 1) cluster_meet();  // no block may go while another reads its sums
}

}  // namespace quamba
