// mixers_step: the products with the two large weights, whose tiles come through the ring.
#pragma once

#include "quamba/linear_rows.cuh"
#include "quamba/mixers_step_tags.cuh"

namespace quamba {

// Rows of p.bytes to the operand in shared memory.
__device__ __forceinline__ void fetch_operand(const StackPlan& p, int columns, char* act) {
  const int pieces = columns / 16, pitch = operand_pitch(columns);
  const int4* from = reinterpret_cast<const int4*>(p.bytes);
  constexpr int kBatch = 4;
  const int count = p.tokens * pieces;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < count; i0 += kBatch * kStackWorkers) {
    int4 v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (i0 + u * kStackWorkers < count) v[u] = __ldcg(from + i0 + u * kStackWorkers);
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackWorkers;
      if (i < count) *reinterpret_cast<int4*>(act + i / pieces * pitch + i % pieces * 16) = v[u];
    }
  }
}

// The columns between the last and the next multiple of 64 meet bytes of the ring that mean nothing.
__device__ __forceinline__ void clear_tail(const StackPlan& p, int columns, char* act) {
  const int tail = (round_up(columns, 64) - columns) / 4;
  for (int i = threadIdx.x; i < p.tokens * tail; i += kStackWorkers)
    *reinterpret_cast<int*>(act + i / tail * operand_pitch(columns) + columns + i % tail * 4) = 0;
}

// Where a worker is in the ring. A slot is always the same team's: one that is a round ahead of the others finds its own
// rounds in order.
struct StackRing {
  char* slots;
  StackBarriers* barriers;
  int next;  // of a product's slots the team's first
  int slot, round = 0;

  __device__ StackRing(char* slots, StackBarriers* barriers)
      : slots(slots), barriers(barriers), next(threadIdx.x / 32 / kTeamWarps), slot(next) {}
};

// acc[row][token] += weight[row] . operand[token] over the thread block's rows of one weight.
template <int GROUPS>
__device__ __forceinline__ void multiply(const StackPlan& p, const StackTiles& tiles, StackRing& ring,
                                         const char* act, int* acc) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, q = lane % 4;
  const int act_pitch = operand_pitch(tiles.columns), pitch = operand_pitch(tiles.slot_columns);
  const int4 zero = make_int4(0, 0, 0, 0);
  int tile = 0, piece = ring.next, i = ring.next;
#pragma unroll 1
  for (; i < tiles.slots(); i += kTeams, piece += kTeams) {
    for (; piece >= tiles.pieces; piece -= tiles.pieces) ++tile;
    const int column = piece * tiles.slot_columns, slot = ring.slot;
    const int steps = divide_up(min(tiles.slot_columns, tiles.columns - column), 64);
    const char* low = ring.slots + slot * p.s.slot_bytes + g * pitch + q * 16;
    const char* x = act + g * act_pitch + column + q * 16;
    barrier_wait(&ring.barriers->full[slot], ring.round & 1);
    int sum[GROUPS][4] = {};
#pragma unroll 4
    for (int s = warp % kTeamWarps; s < steps; s += kTeamWarps) {
      const int4 a = *reinterpret_cast<const int4*>(low + s * 64);
      const int4 b = *reinterpret_cast<const int4*>(low + 8 * pitch + s * 64);
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int4 v = 8 * j + g < p.tokens ? *reinterpret_cast<const int4*>(x + 8 * j * act_pitch + s * 64) : zero;
        mma(sum[j], a.x, b.x, a.y, b.y, v.x, v.y);
        mma(sum[j], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&ring.barriers->empty[slot]);
    ring.slot += kTeams;
    if (ring.slot >= p.s.slots) ring.slot -= p.s.slots, ++ring.round;
    const int first = tile * tiles.tile_rows, rows = min(tiles.tile_rows, tiles.rows - first);
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r / 2), m = 8 * j + 2 * q + r % 2;
        if (row < rows && m < p.tokens) atomicAdd(acc + (first + row) * 8 * GROUPS + m, sum[j][r]);
      }
  }
  ring.next = i - tiles.slots();
}

// A sum, taken away so that the next product finds zero.
__device__ __forceinline__ int take(int* acc) {
  const int sum = *acc;
  *acc = 0;
  return sum;
}

}  // namespace quamba
