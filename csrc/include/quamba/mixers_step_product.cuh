// mixers_step: the products with the two large weights, whose tiles come through the ring.
#pragma once

#include <type_traits>

#include "quamba/fragments.cuh"
#include "quamba/mixers_step_tags.cuh"

namespace quamba {

// Rows of p.bytes to the operand in shared memory.
__device__ __forceinline__ void fetch_operand(const StackPlan& p, int columns, char* act) {
  const StackDivisor over_pieces(columns / 16);
  const int pitch = operand_pitch(columns);
  const int4* from = reinterpret_cast<const int4*>(p.bytes);
  constexpr int kBatch = 4;
  const int count = p.tokens * over_pieces.by;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kStackWorkers) {
    int4 v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      v[u] = i0 + u * kStackWorkers < count ? __ldcg(from + i0 + u * kStackWorkers) : make_int4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackWorkers, m = over_pieces.of(i);
      if (i < count) *reinterpret_cast<int4*>(act + m * pitch + (i - m * over_pieces.by) * 16) = v[u];
    }
  }
}

// The columns between the last and the next multiple of 64 meet bytes of the ring that mean nothing.
__device__ __forceinline__ void clear_tail(const StackPlan& p, int columns, char* act) {
  if (columns % 64 == 0) return;
  const int m = threadIdx.x / 4, column = columns + threadIdx.x % 4 * 16;
  if (m < p.tokens && column < round_up(columns, 64))
    *reinterpret_cast<int4*>(act + m * operand_pitch(columns) + column) = make_int4(0, 0, 0, 0);
}

// Where a worker is in the ring. The teams take turns.
struct StackRing {
  char* slots;
  StackBarriers* barriers;
  int next;  // of a product's slots the team's first
  int slot, round = 0;

  __device__ StackRing(char* slots, StackBarriers* barriers, int team_warps = kTeamWarps)
      : slots(slots), barriers(barriers), next(threadIdx.x / 32 / team_warps), slot(next) {}
};

// The sums of a warp over a slot: of the `steps` times 64 columns from its first on, every kTeamWarps-th. Of the 16
// bytes that a lane has of a row, words 0 and 2 are the operand's upper rows, words 1 and 3 its lower ones: so what is
// loaded is used as it is, eight rows at a time. A sequence then takes two columns of the other operand, one for each
// pair of words, and the two sums of a row and a sequence lie in the one lane of both, at 0 and 3. FOURS: of sequences.
// CHAINS: of sums that do not wait for each other.
template <int BATCH, int FOURS, int CHAINS>
__device__ __forceinline__ void multiply_slot(const char* low, const char* high, const char* x, int next_four,
                                              int steps, int (&sum)[2][FOURS * CHAINS][4]) {
  constexpr int kStep = 64 * kTeamWarps;
  const auto batch = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    int4 a[2][kCount];
    int v[FOURS][kCount][2];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      a[0][u] = *reinterpret_cast<const int4*>(low + u * kStep);
      a[1][u] = *reinterpret_cast<const int4*>(high + u * kStep);
#pragma unroll
      for (int i = 0; i < FOURS; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          v[i][u][k] = *reinterpret_cast<const int*>(x + i * next_four + u * kStep + 8 * k);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u)
#pragma unroll
      for (int i = 0; i < FOURS; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          mma(sum[k][i * CHAINS + u % CHAINS], a[k][u].x, a[k][u].y, a[k][u].z, a[k][u].w, v[i][u][0], v[i][u][1]);
    low += kCount * kStep, high += kCount * kStep, x += kCount * kStep, steps -= kCount * kTeamWarps;
  };
#pragma unroll 1
  while (steps > (BATCH - 1) * kTeamWarps) batch(std::integral_constant<int, BATCH>());
#pragma unroll 1
  while (steps > 0) batch(std::integral_constant<int, 1>());
}

// acc[row][token] += weight[row] . operand[token] over the thread block's rows of one weight. BATCH: steps of a warp
// that it loads before it uses the first of them. FOURS: of sequences. A slot's part is hardly more than what it takes
// to get there, so that little is worked out in the loop.
template <int BATCH, int FOURS>
__device__ __forceinline__ void multiply(const StackPlan& p, const StackTiles& tiles, StackRing& ring, const char* act,
                                         int* acc) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % kTeamWarps, g = lane / 4, q = lane % 4;
  const int columns = tiles.columns, x_pitch = operand_pitch(columns), tokens = p.tokens;
  const int slots = p.s.slots, slot_bytes = p.s.slot_bytes, own = warp * 64 + q * 16;
  // Lanes beyond the sequences repeat another one: what comes of it is not used.
  const char* const x = act + (g / 2 < tokens ? g / 2 : 0) * x_pitch + own + g % 2 * 4;
  const int next_four = g / 2 + 4 < tokens ? 4 * x_pitch : 0;
  acc += g * kAccPitch + q;
  int i = ring.next;
  // The tiles of 16 rows, then the one of the rest.
#pragma unroll 1
  for (int rest = 0; rest < 2; ++rest) {
    const int pieces = rest ? tiles.rest_pieces : tiles.pieces, count = rest ? pieces : tiles.whole * pieces;
    const int rows = rest ? tiles.rest : kTileWeightRows, most = rest ? tiles.rest_columns : tiles.slot_columns;
    const int pitch = operand_pitch(most);
    // Lanes beyond the rows repeat the last one.
    const int low = min(g, rows - 1) * pitch + own, high = min(g + 8, rows - 1) * pitch + own;
    int piece = i;
    int* to = acc;
#pragma unroll 1
    for (; i < count; i += kTeams, piece += kTeams) {
#pragma unroll 1
      for (; piece >= pieces; piece -= pieces) to += kTileWeightRows * kAccPitch;
      const int column = piece * most;
      const char* const slot = ring.slots + ring.slot * slot_bytes;
      int sum[2][FOURS][4] = {};
      barrier_wait(&ring.barriers->full[ring.slot], ring.round & 1);
      multiply_slot<BATCH, FOURS, 1>(slot + low, slot + high, x + column, next_four,
                           divide_up(min(most, columns - column), 64) - warp, sum);
      __syncwarp();
      if (lane == 0) barrier_arrive(&ring.barriers->empty[ring.slot]);
      ring.slot += kTeams;
      if (ring.slot >= slots) ring.slot -= slots, ++ring.round;
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int f = 0; f < FOURS; ++f)
          if (g + 8 * k < rows && q + 4 * f < tokens)
            atomicAdd(to + 8 * k * kAccPitch + 4 * f, sum[k][f][0] + sum[k][f][3]);
    }
    i -= count;
    acc += tiles.whole * kTileWeightRows * kAccPitch;
  }
  ring.next = i;
}

// A sum, taken away so that the next product finds zero.
__device__ __forceinline__ int take(int* acc) {
  const int sum = *acc;
  *acc = 0;
  return sum;
}

}  // namespace quamba
