// mixers_step: shapes whose plan is part of the code. One sequence goes through a block of the stack as one long chain
// of instructions: where sizes are constants, there are fewer of them.
#pragma once

#include "quamba/mixers_step_list.cuh"
#include "quamba/mixers_step_product.cuh"

namespace quamba {

// All from the launch's arguments.
struct StackAnyShape {
  static constexpr bool kKnown = false;
  static constexpr int kNormFours = 0, kSumBatch = 3;
  static constexpr int kCluster = 1;
};

// One sequence of blocks with these sizes, 16 states, a convolution of four taps, and a residual stream in float32,
// divided so that each thread block has CHANNELS of D. SLOT_COLUMNS: what plan_ring makes of it.
template <int MODEL, int INNER, int RANK, int BASE, int CHANNELS, int SLOT_COLUMNS, int CLUSTER>
struct StackKnownShape {
  static constexpr bool kKnown = true;
  static constexpr int kCluster = CLUSTER, kGrid = INNER / CHANNELS, kRows = MODEL / kGrid;
  static constexpr int kStates = 16, kPower = INNER / BASE;
  static_assert(kGrid * CHANNELS == INNER && kGrid * kRows == MODEL && kRows % 2 == 0 && CHANNELS % 4 == 0,
                "thread blocks have equal shares");
  static_assert(kPower * BASE == INNER && (kPower & (kPower - 1)) == 0, "the transform's order is D");

  static constexpr int log2_of(int power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }
  static constexpr int slot_bytes() {
    const int in = operand_pitch(slot_columns(MODEL, SLOT_COLUMNS));
    const int out = operand_pitch(slot_columns(INNER, SLOT_COLUMNS));
    return kTileWeightRows * (in > out ? in : out);
  }

  static constexpr int kNormFours = divide_up(MODEL, 4 * kStackWorkers);
  static constexpr int kSumBatch = divide_up(RANK + 2 * kStates, kStackWorkers);

  template <int ROWS, int COLUMNS>
  static constexpr StackTiles tiles() {
    StackShared shared{};
    shared.slot_columns = SLOT_COLUMNS, shared.slot_bytes = slot_bytes();
    return StackTiles(ROWS, COLUMNS, shared);
  }
  struct In {
    static constexpr StackTiles kTiles = tiles<2 * CHANNELS, MODEL>();
  };
  struct Out {
    static constexpr StackTiles kTiles = tiles<kRows, INNER>();
  };

  // What a plan has to be, and what the code then takes for granted.
  __host__ __device__ static void set(StackPlan* p) {
    p->f.model = MODEL, p->f.inner = INNER, p->f.states = kStates, p->f.width = 4, p->f.rank = RANK;
    p->f.norm_dbc = false, p->f.rotate = true, p->f.residual = true;
    p->tokens = 1, p->grid = kGrid, p->channels = CHANNELS, p->rows = kRows;
    p->cluster = CLUSTER, p->parts = 1;
    p->power = kPower, p->log_power = log2_of(kPower), p->base = BASE;
    p->over_sums.by = RANK + 2 * kStates;
    p->out_type = Type::kFloat;
    p->s.slot_columns = SLOT_COLUMNS, p->s.slot_bytes = slot_bytes();
  }

  // A plan that fits, and a thread block's share of it, as constants where they are.
  __device__ static StackPlan plan(const StackPlan& given) {
    StackPlan p = given;
    set(&p);
    p.over_sums = StackDivisor::of_smaller(RANK + 2 * kStates);
    return p;
  }

  __device__ static StackShare share(const StackPlan& p) {
    StackShare share;
    int block = blockIdx.x;
    asm volatile("" : "+r"(block));  // or the compiler would read it from a special register at every use
    share.channel = block * CHANNELS, share.channels = CHANNELS;
    share.row = share.product_row = block * kRows, share.rows = kRows;
    share.over_channels = StackDivisor::of_smaller(CHANNELS), share.over_rows = StackDivisor::of_smaller(kRows);
    return share;
  }
};

// The shapes that the kernel with a base matrix of this order knows: of mamba-130m, of mamba-2.8b.
template <int BASE>
struct StackShapes {
  using List = StackShapeList<>;
};
template <>
struct StackShapes<12> {
  using List = StackShapeList<StackKnownShape<768, 1536, 48, 12, 16, 2560, 1>>;
};
template <>
struct StackShapes<20> {
  using List = StackShapeList<StackKnownShape<2560, 5120, 160, 20, 40, 1280, 4>>;
};

}  // namespace quamba
