// mixers_step: the products with the two large weights for one sequence of a shape that is known
// (mixers_step_shape.cuh).
#pragma once

#include "quamba/mixers_step_product.cuh"

namespace quamba {

// acc[row] = the parts of weight[row] . operand over the thread block's rows of a weight, whose tiles are constants.
// What a warp adds up has a place of its own for each row, so that it is stored, and whoever needs the sum adds: pieces
// of a row go from team to team, so that there are eight of them, or four where a row is one piece.
template <int BATCH, typename Tiles>
__device__ __forceinline__ void multiply_known(int slots, int slot_bytes, StackRing& ring, const char* act, int* acc) {
  constexpr StackTiles kTiles = Tiles::kTiles;
  static_assert(kTeams * kTeamWarps == kAccPitch, "a row has a place for each warp");
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % kTeamWarps, g = lane / 4, q = lane % 4;
  const int own = warp * 64 + q * 16;
  const char* const x = act + own + g % 2 * 4;
  int i = ring.next;
#pragma unroll
  for (int rest = 0; rest < 2; ++rest) {
    const int pieces = rest ? kTiles.rest_pieces : kTiles.pieces, count = rest ? pieces : kTiles.whole * pieces;
    const int rows = rest ? kTiles.rest : kTileWeightRows, most = rest ? kTiles.rest_columns : kTiles.slot_columns;
    if (count == 0) continue;
    const int pitch = operand_pitch(most);
    const int low = min(g, rows - 1) * pitch + own, high = min(g + 8, rows - 1) * pitch + own;
#pragma unroll 1
    for (; i < count; i += kTeams) {
      const int tile = i / pieces, piece = i - tile * pieces, column = piece * most;
      const char* const slot = ring.slots + ring.slot * slot_bytes;
      constexpr int kChains = BATCH < 3 ? BATCH : 3;
      int sum[2][kChains][4] = {};
      barrier_wait(&ring.barriers->full[ring.slot], ring.round & 1);
      const int here = pieces * most == kTiles.columns ? most : min(most, kTiles.columns - column);
      multiply_slot<BATCH, 1, kChains>(slot + low, slot + high, x + column, 0, divide_up(here, 64) - warp, sum);
      __syncwarp();
      if (lane == 0) barrier_arrive(&ring.barriers->empty[ring.slot]);
      ring.slot += kTeams;
      if (ring.slot >= slots) ring.slot -= slots, ++ring.round;
      int* const to =
          acc + ((rest ? kTiles.whole : tile) * kTileWeightRows + g) * kAccPitch + piece % kTeams * kTeamWarps + warp;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        int all = 0;
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) all += sum[k][chain][0] + sum[k][chain][3];
        if (q == 0 && g + 8 * k < rows) to[8 * k * kAccPitch] = piece < kTeams ? all : to[8 * k * kAccPitch] + all;
      }
    }
    i -= count;
  }
  ring.next = i;
}

// The same where each team has one slot of a product: its weights are in registers before there is anything to multiply
// them with. BATCH: steps of a warp.
template <int BATCH, typename Tiles>
struct StackHeld {
  static constexpr StackTiles kTiles = Tiles::kTiles;
  static constexpr int kColumns = 64 * kTeamWarps * BATCH;  // of a slot
  static constexpr bool kServes = kTiles.slots() == kTeams && kTiles.pieces <= kTeams && kTiles.rest_pieces <= kTeams &&
                                  (kTiles.whole == 0 || kTiles.pieces * kColumns == kTiles.columns) &&
                                  (kTiles.rest == 0 || kTiles.rest_pieces * kColumns == kTiles.columns);
  static constexpr int kPitch = operand_pitch(kColumns);
  int4 low[BATCH], high[BATCH];

  __device__ __forceinline__ static bool in_rest(int team) { return team >= kTiles.whole * kTiles.pieces; }

  __device__ __forceinline__ void load(const StackRing& ring, int slot_bytes) {
    const int lane = threadIdx.x & 31, team = threadIdx.x / 32 / kTeamWarps, warp = threadIdx.x / 32 % kTeamWarps;
    const int last = (in_rest(team) ? kTiles.rest : kTileWeightRows) - 1;
    const char* const slot = ring.slots + ring.slot * slot_bytes + warp * 64 + lane % 4 * 16;
    barrier_wait(&ring.barriers->full[ring.slot], ring.round & 1);
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      low[u] = *reinterpret_cast<const int4*>(slot + min(lane / 4, last) * kPitch + u * 64 * kTeamWarps);
      high[u] = *reinterpret_cast<const int4*>(slot + min(lane / 4 + 8, last) * kPitch + u * 64 * kTeamWarps);
    }
  }

  __device__ __forceinline__ void multiply(int slots, StackRing& ring, const char* act, int* acc) const {
    const int lane = threadIdx.x & 31, team = threadIdx.x / 32 / kTeamWarps, warp = threadIdx.x / 32 % kTeamWarps;
    const bool rest = in_rest(team);
    const int rows = rest ? kTiles.rest : kTileWeightRows, pieces = rest ? kTiles.rest_pieces : kTiles.pieces;
    const int i = rest ? team - kTiles.whole * kTiles.pieces : team, piece = pieces > 1 ? i % pieces : 0;
    const int tile = rest ? kTiles.whole : pieces > 1 ? i / pieces : i, g = lane / 4, q = lane % 4;
    const char* const x = act + piece * kColumns + warp * 64 + q * 16 + g % 2 * 4;
    int v[BATCH][2], sum[2][BATCH][4] = {};
#pragma unroll
    for (int u = 0; u < BATCH; ++u)
#pragma unroll
      for (int k = 0; k < 2; ++k) v[u][k] = *reinterpret_cast<const int*>(x + u * 64 * kTeamWarps + 8 * k);
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      mma(sum[0][u], low[u].x, low[u].y, low[u].z, low[u].w, v[u][0], v[u][1]);
      mma(sum[1][u], high[u].x, high[u].y, high[u].z, high[u].w, v[u][0], v[u][1]);
    }
    int* const to = acc + (tile * kTileWeightRows + g) * kAccPitch + piece * kTeamWarps + warp;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int all = 0;
#pragma unroll
      for (int u = 0; u < BATCH; ++u) all += sum[k][u][0] + sum[k][u][3];
      if (q == 0 && g + 8 * k < rows) to[8 * k * kAccPitch] = all;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&ring.barriers->empty[ring.slot]);
    ring.slot += kTeams;
    if (ring.slot >= slots) ring.slot -= slots, ++ring.round;
  }
};

// The sum of a row that multiply_known left.
template <typename Tiles>
__device__ __forceinline__ int sum_known(const int* acc, int row) {
  constexpr StackTiles kTiles = Tiles::kTiles;
  const int4* const four = reinterpret_cast<const int4*>(acc + row * kAccPitch);
  int4 sum = four[0];
  const int pieces = row < kTiles.whole * kTileWeightRows ? kTiles.pieces : kTiles.rest_pieces;
  if (pieces > 1) {
    const int4 more = four[1];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return sum.x + sum.y + (sum.z + sum.w);
}

// The weights of a half that the workers hold, where a shape is known and small enough.
template <int BATCH, typename Shape, bool KNOWN = Shape::kKnown>
struct StackHeldPair {
  static constexpr bool kServes = false;
  struct In {};
  struct Out {};
};
template <int BATCH, typename Shape>
struct StackHeldPair<BATCH, Shape, true> {
  using In = StackHeld<BATCH, typename Shape::In>;
  using Out = StackHeld<BATCH, typename Shape::Out>;
  static constexpr bool kServes = In::kServes && Out::kServes;
};

}  // namespace quamba
