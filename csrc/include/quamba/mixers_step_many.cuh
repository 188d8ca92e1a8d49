// mixers_step for many sequences: what is divided otherwise than for few. More workers; matrix instructions for W_x and
// W_dt, too; the norm by all thread blocks, each its rows of E, with sums of squares as what they exchange; W_out cut along
// K within a cluster, so that each thread block fetches only a part of the transformed g.
#pragma once

#include "quamba/mixers_step_hadamard.cuh"
#include "quamba/mixers_step_product.cuh"

namespace quamba {

constexpr int kManyWorkers = 512, kManyWarps = kManyWorkers / 32, kManyTeamWarps = kManyWarps / kTeams;
constexpr int kManyThreads = kManyWorkers + kStackStagers + 32 * kStackStreams;

// Where in a row of a product's sums that of sequence m is: so the lanes of a matrix instruction add to distinct banks.
__device__ __forceinline__ int sum_column(int m) { return (m & ~7) + (m & 1) * 4 + (m >> 1 & 3); }

__device__ __forceinline__ void many_sync() { asm volatile("bar.sync 2, %0;" ::"n"(kManyWorkers) : "memory"); }

// The workers of all thread blocks meet: what any wrote before arriving is there for all after waiting.
class ManyGrid {
 public:
  __device__ explicit ManyGrid(const StackPlan& p) : counter_(p.counter), grid_(p.grid) {}
  __device__ void meet() {
    goal_ += grid_;
    many_sync();
    if (threadIdx.x == 0) meet_grid(counter_, goal_);
    many_sync();
  }
  // The same without what they wrote: it is on its way. Who waits for numbers themselves waits here first, as a thread that
  // asks for one number is less in its way than all that ask for all of them.
  __device__ void meet_early() {
    early_goal_ += grid_;
    many_sync();
    if (threadIdx.x == 0) meet_grid_early(counter_ + kCounterSpread, early_goal_);
    many_sync();
  }

 private:
  unsigned* counter_;
  unsigned goal_ = 0, early_goal_ = 0, grid_;
};

// The sum of `count` published numbers, by a warp, in an order that does not depend on when they come.
__device__ __forceinline__ float sum_published(const unsigned* from, int count) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x & 31;
  float sum = 0.0f;
#pragma unroll 1
  for (int i0 = lane; i0 < count; i0 += 32 * kBatch) {
    unsigned words[kBatch], missing = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) words[u] = 0, missing |= i0 + 32 * u < count ? 1u << u : 0;
#pragma unroll 1
    while (missing != 0) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (missing >> u & 1) words[u] = load_published_one(from + i0 + 32 * u);
      unsigned found = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) found |= words[u] != 0 ? 1u << u : 0;
      missing &= ~found;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) sum += __uint_as_float(words[u]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Columns [first, first + columns) of the rows of p.bytes, of `width`, to the operand in shared memory.
__device__ __forceinline__ void fetch_many(const StackPlan& p, int first, int columns, int width, char* act) {
  const StackDivisor over_pieces(columns / 16);
  const int pitch = operand_pitch(columns), count = p.tokens * over_pieces.by;
  constexpr int kBatch = 5;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kManyWorkers) {
    int4 v[kBatch];
    int to[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kManyWorkers, m = over_pieces.of(i), piece = 16 * (i - m * over_pieces.by);
      to[u] = m * pitch + piece;
      v[u] = i < count ? __ldcg(reinterpret_cast<const int4*>(p.bytes + m * width + first + piece))
                       : make_int4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (i0 + u * kManyWorkers < count) *reinterpret_cast<int4*>(act + to[u]) = v[u];
  }
}

// acc[row][sequence] += weight[row] . operand[sequence] over the slots of one weight, as multiply() does for few; the
// 16 bytes that a lane has of a row meet those that it has of a sequence, so that a matrix instruction takes eight
// sequences. GROUPS: of eight.
template <int GROUPS>
__device__ __forceinline__ void multiply_many(const StackPlan& p, const StackTiles& tiles, StackRing& ring,
                                              const char* act, int* acc) {
  constexpr int kPitch = many_pitch(GROUPS), kStep = 64 * kManyTeamWarps, kBatch = GROUPS == 1 ? 3 : 2;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % kManyTeamWarps, g = lane / 4, q = lane % 4;
  const int columns = tiles.columns, x_pitch = operand_pitch(columns), tokens = p.tokens;
  const int slots = p.s.slots, slot_bytes = p.s.slot_bytes, own = warp * 64 + q * 16;
  // Lanes beyond the sequences repeat the first one: what comes of it is not used.
  const char* const x = act + (g < tokens ? g : 0) * x_pitch + own;
  const int next_group = GROUPS > 1 ? (g + 8 < tokens ? g + 8 : 0) * x_pitch - (g < tokens ? g : 0) * x_pitch : 0;
  acc += g * kPitch + q;
  int i = ring.next;
  // The tiles of 16 rows, then the one of the rest.
#pragma unroll 1
  for (int rest = 0; rest < 2; ++rest) {
    const int pieces = rest ? tiles.rest_pieces : tiles.pieces, count = rest ? pieces : tiles.whole * pieces;
    const int rows = rest ? tiles.rest : kTileWeightRows, most = rest ? tiles.rest_columns : tiles.slot_columns;
    const int pitch = operand_pitch(most);
    // Lanes beyond the rows repeat the last one.
    const int low_row = min(g, rows - 1) * pitch + own, high_row = min(g + 8, rows - 1) * pitch + own;
    int piece = i;
    int* to = acc;
#pragma unroll 1
    for (; i < count; i += kTeams, piece += kTeams) {
#pragma unroll 1
      for (; piece >= pieces; piece -= pieces) to += kTileWeightRows * kPitch;
      const int column = piece * most;
      const char* const slot = ring.slots + ring.slot * slot_bytes;
      const char *low = slot + low_row, *high = slot + high_row, *v = x + column;
      int sum[GROUPS][4] = {};
      barrier_wait(&ring.barriers->full[ring.slot], ring.round & 1);
#pragma unroll 1
      for (int left = divide_up(min(most, columns - column), 64) - warp; left > 0; left -= kBatch * kManyTeamWarps) {
        int4 a[2][kBatch], b[GROUPS][kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const bool live = left > u * kManyTeamWarps;
          const int4 none = make_int4(0, 0, 0, 0);
          a[0][u] = live ? *reinterpret_cast<const int4*>(low + u * kStep) : none;
          a[1][u] = live ? *reinterpret_cast<const int4*>(high + u * kStep) : none;
#pragma unroll
          for (int f = 0; f < GROUPS; ++f)
            b[f][u] = live ? *reinterpret_cast<const int4*>(v + f * next_group + u * kStep) : none;
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
#pragma unroll
          for (int f = 0; f < GROUPS; ++f) {
            mma(sum[f], a[0][u].x, a[1][u].x, a[0][u].y, a[1][u].y, b[f][u].x, b[f][u].y);
            mma(sum[f], a[0][u].z, a[1][u].z, a[0][u].w, a[1][u].w, b[f][u].z, b[f][u].w);
          }
        low += kBatch * kStep, high += kBatch * kStep, v += kBatch * kStep;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&ring.barriers->empty[ring.slot]);
      ring.slot += kTeams;
      if (ring.slot >= slots) ring.slot -= slots, ++ring.round;
#pragma unroll
      for (int f = 0; f < GROUPS; ++f)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (g + k / 2 * 8 < rows && 8 * f + 2 * q + k % 2 < tokens)
            atomicAdd(to + k / 2 * 8 * kPitch + 8 * f + k % 2 * 4, sum[f][k]);
    }
    i -= count;
    acc += tiles.whole * kTileWeightRows * kPitch;
  }
  ring.next = i;
}

}  // namespace quamba
