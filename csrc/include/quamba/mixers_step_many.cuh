// mixers_step for many sequences: what is divided otherwise than for few. More workers; matrix instructions for W_x and
// W_dt, too; W_out cut along K within a cluster, so that each thread block fetches only a part of the transformed g; of
// u and g a warp has its columns in registers for all rows of a weight. Bytes for all come as words that are zero until
// they are there.
#pragma once

#include "quamba/mixers_step_hadamard.cuh"
#include "quamba/mixers_step_many_stream.cuh"
#include "quamba/mixers_step_product.cuh"

namespace quamba {

constexpr int kManyWorkers = kStackManyWorkers, kManyWarps = kManyWorkers / 32;
constexpr int kManyThreads = kManyWorkers + kStackStagers + 32 * kStackStreams;
constexpr int kManyTries = 20;  // of a warp to find words, before it waits for those who wrote them
constexpr int kManySteps = kManyPieceColumns / 32 / kManyWarps;  // of 32 columns, of a warp

__device__ __forceinline__ void many_sync() { team_sync<kManyWorkers>(); }

// Meetings of all thread blocks. Each of these is for the workers of a thread block.
class ManyGrid {
 public:
  __device__ explicit ManyGrid(const StackPlan& p) : counter_(p.counter), grid_(p.grid) {}

  // All arrive, without order: what they wrote is on its way. Who waits for words themselves waits here first, as one
  // thread that asks for one number is less in their way than all that ask for all.
  __device__ __forceinline__ void meet_early() {
    unsigned* const counter = counter_ + 2 * kCounterSpread;
    early_goal_ += grid_;
    many_sync();
    if (threadIdx.x == 0) {
      arrive_early(counter);
      wait_early(counter, early_goal_);
    }
    many_sync();
  }
  // This thread block has written words for all.
  __device__ __forceinline__ void tell() {
    many_sync();
    if (threadIdx.x == 0) arrive_early(counter_);
    if (threadIdx.x == kManyWorkers - 32) arrive_behind(counter_ + kCounterSpread);
  }
  // Waits for so many to have done so. Their words may still be on their way: a thread that finds none waits for those
  // with sure().
  __device__ __forceinline__ void wait(int arrivals) {
    goal_ += arrivals;
    if (threadIdx.x == 0) wait_early(counter_, goal_);
    many_sync();
  }
  __device__ __forceinline__ void sure() const {
    if ((threadIdx.x & 31) == 0) wait_behind(counter_ + kCounterSpread, goal_);
    __syncwarp();
  }

 private:
  unsigned* counter_;
  unsigned goal_ = 0, early_goal_ = 0, grid_;
};

// acc[row][sequence] += weight[row] . operand[sequence] over the slots of one weight; `words`: the operand, as words
// for all. A sequence is a row of a matrix instruction, and a row of the weight a column. A lane's 8 bytes of a row of
// the weight meet those that it has of a sequence. GROUPS: of eight sequences.
template <int GROUPS>
__device__ __forceinline__ void multiply_many(const StackPlan& p, const StackTiles& tiles, bool second, StackRing& ring,
                                              const ManyGrid& grid, const uint32_t* words, int* acc) {
  constexpr int kPitch = many_pitch(GROUPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int columns = tiles.columns, most = p.s.piece_columns[second], pitch = many_slot_pitch(most);
  const int slots = p.s.slots, slot_bytes = p.s.slot_bytes, tokens = p.tokens;
  const char* const from =
      reinterpret_cast<const char*>(words) + tiles.first_column / 32 * 256 * GROUPS + lane * 8 * GROUPS;
  acc += 2 * q * kPitch + g;
#pragma unroll 1
  for (int column = 0; column < columns; column += most) {
    const int steps = divide_up(divide_up(min(most, columns - column), 32) - warp, kManyWarps);
    uint2 x[GROUPS][kManySteps] = {};
    // What is not there at once will be soon, or is zero.
#pragma unroll 1
    for (int tries = 0; tries < kManyTries; ++tries) {
      if (tries + 1 == kManyTries) grid.sure();
      unsigned all = 0xffffffffu;
#pragma unroll
      for (int u = 0; u < kManySteps; ++u) {
        const int step = warp + u * kManyWarps, at = column + step * 32 + 8 * q;
        const char* const place = from + (column / 32 + step) * 256 * GROUPS;
        unsigned least = 0xffffffffu;
#pragma unroll
        for (int f = 0; f < GROUPS; ++f)
          if (u < steps && at < columns && g + 8 * f < tokens) least = min(least, min(x[f][u].x, x[f][u].y));
        if (least == 0) {
          if constexpr (GROUPS > 1) {
            const uint4 words = load_published(reinterpret_cast<const unsigned*>(place));
            x[0][u] = make_uint2(words.x, words.y), x[1][u] = make_uint2(words.z, words.w);
          } else {
            x[0][u] = load_published_two(place);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kManySteps; ++u)
#pragma unroll
        for (int f = 0; f < GROUPS; ++f) {
          if (u >= steps || column + (warp + u * kManyWarps) * 32 + 8 * q >= columns || g + 8 * f >= tokens)
            x[f][u] = make_uint2(kThere, kThere);
          all = min(all, min(x[f][u].x, x[f][u].y));
        }
      if (__all_sync(0xffffffffu, all != 0)) break;
    }
#pragma unroll
    for (int u = 0; u < kManySteps; ++u)
#pragma unroll
      for (int f = 0; f < GROUPS; ++f) x[f][u].x ^= kThere, x[f][u].y ^= kThere;
    int* to = acc;
#pragma unroll 1
    for (int left = tiles.rows; left > 0; left -= kManyTileRows, to += kManyTileRows * kPitch) {
      // Lanes beyond the rows repeat the last one.
      const char* const slot = ring.slots + ring.slot * slot_bytes + min(g, left - 1) * pitch + warp * 32 + 8 * q;
      int sum[2][4] = {};
      uint2 w[kManySteps];
      barrier_wait(&ring.barriers->full[ring.slot], ring.round & 1);
#pragma unroll
      for (int u = 0; u < kManySteps; ++u)
        w[u] = u < steps ? *reinterpret_cast<const uint2*>(slot + u * kManyWarps * 32) : make_uint2(0, 0);
#pragma unroll
      for (int u = 0; u < kManySteps; ++u)
        mma(sum[u % 2], x[0][u].x, GROUPS > 1 ? x[GROUPS - 1][u].x : 0, x[0][u].y, GROUPS > 1 ? x[GROUPS - 1][u].y : 0,
            w[u].x, w[u].y);
      __syncwarp();
      if (lane == 0) barrier_arrive(&ring.barriers->empty[ring.slot]);
      if (++ring.slot == slots) ring.slot = 0, ++ring.round;
#pragma unroll
      for (int f = 0; f < GROUPS; ++f)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (2 * q + k < left && 8 * f + g < tokens)
            atomicAdd(to + k * kPitch + 8 * f, sum[0][2 * f + k] + sum[1][2 * f + k]);
    }
  }
}

}  // namespace quamba
