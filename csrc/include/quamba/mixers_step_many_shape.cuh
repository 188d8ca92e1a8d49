// mixers_step for many sequences: shapes whose plan is part of the code, as mixers_step_shape.cuh has them for one.
#pragma once

#include "quamba/mixers_step_list.cuh"
#include "quamba/mixers_step_warps.cuh"

namespace quamba {

// All from the launch's arguments.
struct StackAnyMany {
  static constexpr bool kKnown = false;
  static constexpr int kCluster = 1;
};

// So many sequences, whose states follow each other, through blocks with these sizes, 16 states, a convolution of four
// taps, and a residual stream in float32, divided so that each thread block has CHANNELS of D.
template <int MODEL, int INNER, int RANK, int BASE, int CHANNELS, int TOKENS, int CLUSTER>
struct StackKnownMany {
  static constexpr bool kKnown = true;
  static constexpr int kCluster = CLUSTER;
  static constexpr int kGrid = INNER / CHANNELS, kRows = MODEL / kGrid, kGroups = divide_up(TOKENS, 8);
  static constexpr int kStates = 16, kPower = INNER / BASE, kSums = RANK + 2 * kStates;
  static_assert(kGrid * CHANNELS == INNER && kGrid * kRows == MODEL && kRows % 2 == 0 && CHANNELS % 4 == 0,
                "thread blocks have equal shares");
  static_assert(kPower * BASE == INNER && (kPower & (kPower - 1)) == 0, "the transform's order is D");

  static constexpr int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }
  static constexpr int log2_up(int n) { return n > 1 ? 1 + log2_up((n + 1) / 2) : 0; }
  // As plan_ring_many cuts rows where there is room for the longest pieces.
  static constexpr int piece(int columns) {
    return round_up(divide_up(columns, divide_up(columns, kManyPieceColumns)), 32);
  }
  static constexpr int slot_bytes() {
    const int in = piece(MODEL), out = piece(INNER / CLUSTER);
    return kManyTileRows * many_slot_pitch(in > out ? in : out);
  }

  // What a plan has to be, and what the code then takes for granted.
  __host__ __device__ static void set(StackPlan* p) {
    p->f.model = MODEL, p->f.inner = INNER, p->f.states = kStates, p->f.width = 4, p->f.rank = RANK;
    p->f.conv_batch = INNER * 4, p->f.ssm_batch = INNER * kStates;
    p->f.norm_dbc = false, p->f.rotate = true, p->f.residual = true;
    p->tokens = TOKENS, p->grid = kGrid, p->channels = CHANNELS, p->rows = kRows;
    p->cluster = p->parts = CLUSTER;
    p->power = kPower, p->log_power = log2_of(kPower), p->base = BASE;
    p->over_sums = StackDivisor(kSums);
    p->over_quads = StackDivisor(1 << log2_up(divide_up(kSums / 4 * 8 * kGroups, kGrid)));
    p->out_type = Type::kFloat;
    p->s.piece_columns[0] = piece(MODEL), p->s.piece_columns[1] = piece(INNER / CLUSTER);
    p->s.slot_bytes = slot_bytes();
    p->s.x_pitch = round_up(CHANNELS, 32) + 16, p->s.d_pitch = round_up(RANK, 32) + 16;
  }

  // A plan that fits, and a thread block's share of it, as constants where they are.
  __device__ static StackPlan plan(const StackPlan& given) {
    StackPlan p = given;
    set(&p);
    return p;
  }

  __device__ static StackShare share(const StackPlan& p) {
    StackShare share;
    int block = blockIdx.x;
    asm volatile("" : "+r"(block));  // or the compiler would read it from a special register at every use
    share.channel = block * CHANNELS, share.channels = CHANNELS;
    share.row = block * kRows, share.rows = kRows;
    share.product_row = block / CLUSTER * CLUSTER * kRows;
    share.over_channels = StackDivisor(CHANNELS), share.over_rows = StackDivisor(kRows);
    share.at_once = kStackManyWorkers / 4 / CHANNELS;
    share.tiles[0] = StackTiles(2 * CHANNELS, MODEL, p.s);
    share.tiles[1] = StackTiles(CLUSTER * kRows, INNER, p.s, CLUSTER, block % CLUSTER);
    return share;
  }
};

// The shapes that the kernel with a base matrix of this order knows: of mamba-2.8b.
template <int BASE>
struct StackManyShapes {
  using List = StackShapeList<>;
};
template <>
struct StackManyShapes<20> {
  using List = StackShapeList<StackKnownMany<2560, 5120, 160, 20, 40, 16, 2>>;
};

}  // namespace quamba
