// mixers_step for many sequences: the warps that stream the weights. As for few, but a slot has eight rows, which all
// warps share, and of a row as much as they can have of the operand in registers: the pieces of rows follow each other.
#pragma once

#include "quamba/mixers_step_warps.cuh"

namespace quamba {

// Whether the barrier was passed an odd number of times.
__device__ __forceinline__ bool barrier_odd(uint64_t* barrier) {
  unsigned odd;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], 0;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(odd)
      : "r"(shared_address(barrier))
      : "memory");
  return odd;
}

static __device__ __noinline__ void stream_many(const StackPlan& p, const StackBlock* blocks, const StackShare& share,
                                                char* shared, StackBarriers& barriers) {
  const int lane = threadIdx.x & 31, first = threadIdx.x / 32 % kStackStreams, own = first + kStackStreams * lane;
  const int slots = p.s.slots, slot_bytes = p.s.slot_bytes, flight = p.flight;
  int slot = 0, round = 0, late = 0, late_round = 0, under_way = 0;
  const unsigned pace = p.pace, slow_pace = p.slow_pace;
  const uint64_t policy = leaves_first();
  unsigned last = cycles() - pace;
  // Asked for half a block ahead: a constant that is read once comes from far.
  const int8_t* ahead = blocks[0].in_weight;
#pragma unroll 1
  for (int half = 0; half < 2 * p.blocks; ++half) {
    const bool second = half & 1;
    const int all = share.tiles[second].rows, columns = share.tiles[second].columns;
    const int most = p.s.piece_columns[second], pitch = many_slot_pitch(most);
    const int8_t* const weight = ahead + share.tiles[second].first_column;
    const int64_t row_bytes = share.tiles[second].pitch;
    const int following = min((half + 1) / 2, p.blocks - 1);
    ahead = second ? blocks[following].in_weight : blocks[following].out_weight;
#pragma unroll 1
    for (int column = 0; column < columns; column += most) {
      const int bytes = min(most, columns - column);
#pragma unroll 1
      for (int tile = 0; tile < all; tile += kManyTileRows) {
        const int rows = min(kManyTileRows, all - tile), mine = tile + own;
        const int row = second                   ? share.product_row + mine
                        : mine < share.channels ? share.channel + mine
                                                : p.f.inner + share.channel + mine - share.channels;
        barrier_wait(&barriers.empty[slot], (round & 1) ^ 1);
        // Requests beyond what keeps the memory busy would only delay the workers' own, which share the way to it, and
        // while they wait for other thread blocks even those would.
        while (under_way >= (barrier_odd(&barriers.quick) ? flight : 1)) {
          barrier_wait(&barriers.full[late], late_round & 1);
          if (++late == slots) late = 0, ++late_round;
          --under_way;
        }
        // In bursts they would too: a slot is asked for when the one before has had its time.
        while (cycles() - last < (barrier_odd(&barriers.quick) ? pace : slow_pace)) continue;
        last = cycles();
        if (lane == 0) barrier_expect(&barriers.full[slot], max(0, divide_up(rows - first, kStackStreams)) * bytes);
        __syncwarp();
        if (own < rows)
          copy_row(shared + slot * slot_bytes + own * pitch, weight + row * row_bytes + column, bytes,
                   &barriers.full[slot], policy);
        ++under_way;
        if (++slot == slots) slot = 0, ++round;
      }
    }
  }
}

}  // namespace quamba
