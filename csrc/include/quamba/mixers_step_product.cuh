// mixers_step: the products with the two large weights, whose tiles come through the ring.
#pragma once

#include "quamba/linear_rows.cuh"
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
      if (i0 + u * kStackWorkers < count) v[u] = __ldcg(from + i0 + u * kStackWorkers);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackWorkers, m = over_pieces.of(i);
      if (i < count) *reinterpret_cast<int4*>(act + m * pitch + (i - m * over_pieces.by) * 16) = v[u];
    }
  }
}

// The columns between the last and the next multiple of 64 meet bytes of the ring that mean nothing.
__device__ __forceinline__ void clear_tail(const StackPlan& p, int columns, char* act) {
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

  __device__ StackRing(char* slots, StackBarriers* barriers)
      : slots(slots), barriers(barriers), next(threadIdx.x / 32 / kTeamWarps), slot(next) {}
};

// acc[row][token] += weight[row] . operand[token] over the thread block's rows of one weight. BATCH: steps of 64
// columns whose operands are loaded before the first of them is used.
template <int BATCH>
__device__ __forceinline__ void multiply(const StackPlan& p, const StackTiles& tiles, StackRing& ring, const char* act,
                                         int* acc) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, q = lane % 4;
  const int slots = tiles.slots();
  int tile = 0, piece = ring.next, i = ring.next;
#pragma unroll 1
  for (; i < slots; i += kTeams, piece += kTeams) {
    for (; piece >= tiles.pieces_of(tile); ++tile) piece -= tiles.pieces_of(tile);
    const int most = tiles.columns_of(tile), rows = tiles.rows_of(tile), pitch = operand_pitch(most);
    const int column = piece * most, slot = ring.slot, steps = divide_up(min(most, tiles.columns - column), 64);
    // Lanes beyond the rows repeat the last one: what comes of it is not used.
    const char* low = ring.slots + slot * p.s.slot_bytes + min(g, rows - 1) * pitch + q * 16;
    const int high = (min(g + 8, rows - 1) - min(g, rows - 1)) * pitch;
    // Lanes beyond the sequences repeat the first one: what comes of it is not used.
    const char* x = act + (g < p.tokens ? g : 0) * operand_pitch(tiles.columns) + column + q * 16;
    barrier_wait(&ring.barriers->full[slot], ring.round & 1);
    int sum[2][4] = {};  // two, so that additions need not wait for each other
#pragma unroll 1
    for (int s = warp % kTeamWarps; s < steps; s += BATCH * kTeamWarps) {
      const int batch = divide_up(steps - s, kTeamWarps);
      int4 a[BATCH], b[BATCH], v[BATCH];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        const int at = (s + min(u, batch - 1) * kTeamWarps) * 64;
        a[u] = *reinterpret_cast<const int4*>(low + at);
        b[u] = *reinterpret_cast<const int4*>(low + high + at);
        v[u] = *reinterpret_cast<const int4*>(x + at);
      }
#pragma unroll
      for (int u = 0; u < BATCH; ++u)
        if (u < batch) {
          mma(sum[0], a[u].x, b[u].x, a[u].y, b[u].y, v[u].x, v[u].y);
          mma(sum[1], a[u].z, b[u].z, a[u].w, b[u].w, v[u].z, v[u].w);
        }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&ring.barriers->empty[slot]);
    ring.slot += kTeams;
    if (ring.slot >= p.s.slots) ring.slot -= p.s.slots, ++ring.round;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r / 2), m = 2 * q + r % 2;
      int* const to = acc + (tile * kTileWeightRows + row) * kAccPitch + m;
      if (row < rows && m < p.tokens) atomicAdd(to, sum[0][r] + sum[1][r]);
    }
  }
  ring.next = i - slots;
}

// A sum, taken away so that the next product finds zero.
__device__ __forceinline__ int take(int* acc) {
  const int sum = *acc;
  *acc = 0;
  return sum;
}

}  // namespace quamba
