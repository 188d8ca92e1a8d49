// mixers_step: one token per sequence through a stack of blocks, in one launch. What the launch is given, and how a
// thread block divides its shared memory; the kernel is in mixers_step_kernel.cuh.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kStackBlocks = 100;       // blocks a launch: a kernel's arguments end at 32764 bytes
constexpr int kStackTokens = 8;         // sequences a launch
constexpr int kStackMany = 9;           // from so many on, the kernel for many sequences
constexpr int kStackManyWide = 3;       // the same for blocks that are wide
constexpr int kManyTokens = 16;         // sequences a launch of that one
constexpr int kStackDistributed = 3;    // from so many on, a token's norm and transform are one thread block's work
constexpr int kStackTurns = 4;
constexpr int kStackSlots = 24;         // of the ring, at most
constexpr int kStackWidth = 8192;       // of the model, at most
constexpr int kStackSharedWidth = 4096;  // of D: from it on sharing the transform of g costs less than it saves
constexpr int kStackBytesACycle = 12;    // of weights that a multiprocessor asks for: what it needs, and no bursts
// The same for many sequences, whose ring is shorter; and while thread blocks wait for each other, with one slot
// under way: a memory that is busy makes them wait three times as long.
constexpr int kManyBytesACycle = 20, kManyBytesACycleSlow = 10;
constexpr int kStackHadamards[] = {1, 12, 20};  // orders of the base matrix that the kernel has

// What is copied to shared memory for each block. First what has one number a channel of D: these lie together, channel
// by channel; a scale that is one number is there for every channel, and a bias that is missing is zero. Vectors are
// float32, but for the norm's weight.
enum StackField {
  kInX, kInZ, kBiasX, kBiasZ, kScaleX, kScaleZ, kConvScale, kConvBias, kXScale, kScanScale, kDtWeightScale, kDtScale,
  kDtBias, kSkip, kChannelFields,
  // one number a sum of W_x, three of these together
  kXSumScale = kChannelFields, kDbcScale, kDNorm, kBNorm, kCNorm,
  // one number a row of W_out, two of these together
  kOutScale, kOutBias,
  kUScale, kXInScale, kGScale,
  kA, kTaps, kDtWeight, kStagedFields,
  kNormWeight = kStagedFields, kStackFields  // the workers load this one
};

// Words from one channel's numbers to the next one's, and so for sums and rows: the first two are odd, for the banks.
constexpr int kChannelWords = 15, kSumWords = 3, kRowWords = 2;
constexpr int kStackFixedBytes = 4096;  // of shared memory, in front of the ring: StackFixed
constexpr int kManyFixedBytes = 3392;   // the same for many sequences, where 700 bytes more would be a slot less
constexpr int kStackOnes = 16;  // bytes: the fields that are one number

__host__ __device__ constexpr bool in_head(int field) { return field >= kOutScale && field <= kGScale; }

struct StackBlock {
  const void* field[kStackFields];  // null where there is none
  const int8_t* in_weight;
  const int8_t* x_weight;
  const int8_t* out_weight;
  int8_t* conv_state;
  float* ssm_state;
  float norm_eps, dbc_eps;
};

// How a field is copied, in pieces, the same for all blocks of a launch.
struct StackCopy {
  int to, step;          // offset in head or body, and from piece to piece
  int width, from_step;  // of a piece: 16, 8 or 4 bytes; from piece to piece of the field
  int count;             // pieces, at most
  int stride, total;     // bytes from one thread block's to the next one's, and of the field; 0: all is everybody's
};

// What the blocks of a launch have in common.
struct StackFormat {
  int64_t conv_batch, ssm_batch;  // strides of the states
  int model, inner, states, width, rank;  // E, D, N, K, R
  int in_weight_scale, conv_weight_scale, x_scale, x_weight_scale, x_scan_scale, dt_weight_scale, dt_scale,
      out_weight_scale;  // strides of scales: 0 or 1
  Type norm_weight;
  bool norm_dbc, rotate, residual, has_dt_scale, has_norms;
  bool has_in_bias, has_conv_bias, has_out_bias;  // only so that blocks with and without one have different formats
};

// Offsets in a thread block's shared memory behind the first kStackFixedBytes, in bytes; the total has these, too. What
// the staging warps prepare for one block of the stack: the head, what is needed from its norm to its end, of which
// there are two, and the body, what only its middle needs, from the convolution to the gate.
struct StackShared {
  int act, acc, kept, raw, scratch, head[2], body, total;
  int slots, slot_bytes, slot_columns;  // the ring of weight tiles, at offset 0
  int block, row_numbers;               // within the head, behind the fields that are one number
  // within the body, behind the channels' numbers:
  int sum_numbers, A, taps, dt_weight;
  int x_weight, x_weight_pitch, x_weight_width;  // the pitch in words; bytes a copy
  StackCopy copy[kStagedFields];
  // Of the kernel for many sequences (mixers_step_many.cuh):
  int items, x, d, bc, gathered;
  int piece_columns[2];  // of the pieces that rows of W_in and of W_out's part are cut into, but the last
  int x_pitch, d_pitch;  // bytes from a sequence's row to the next one's
};

// n / by for n and `by` below 2^16, by a multiplication.
struct StackDivisor {
  int by;
  unsigned reciprocal;  // 0: by is 1

  StackDivisor() = default;
  __host__ __device__ explicit StackDivisor(int by) : by(by), reciprocal(by > 1 ? 0xffffffffu / by + 1 : 0) {}
  // Of numbers below `by` alone, which code finds to be zero where it can.
  __device__ static StackDivisor of_smaller(int by) {
    StackDivisor divisor;
    divisor.by = by, divisor.reciprocal = 1;
    return divisor;
  }
  __device__ int of(int n) const { return reciprocal ? static_cast<int>(__umulhi(n, reciprocal)) : n; }
};

// All of a launch but the blocks.
struct StackPlan {
  StackFormat f;
  StackShared s;
  int blocks, tokens, grid;
  int channels, rows;  // of D, of E, a thread block
  int flight;          // slots of the ring that are under way at a time, at most
  unsigned pace;       // cycles from one slot's request to the next one's, at least
  unsigned slow_pace;  // the same for many sequences, while thread blocks wait for each other
  int cluster;         // thread blocks that share a transform of g: 1, 2 or 4
  int parts;           // of W_out along K, one for each thread block of a cluster
  // The transform of g: order = power * base.
  int power, log_power, base;  // base 0: none
  float factor;
  StackDivisor over_sums;   // R + 2 N
  StackDivisor over_quads;  // for many sequences: fours of W_x's sums that a thread block adds up
  const void* hidden;
  int64_t hidden_row;
  void* out;
  Type hidden_type, out_type;
  // Between thread blocks, zero at the launch. A reader waits for the number itself, which costs one way to memory
  // where a barrier and then the number cost four: a word of the residual stream or of g that is zero is not there yet.
  // These two have kStackTurns places that blocks of the stack take in turn, so that there is time to clear the next
  // one.
  unsigned* counter;             // of the barrier that what has no tags takes
  unsigned long long* dbc;       // (blocks, tokens, R + 2 N) at sum_place: sums of W_x, and how many added to them
  unsigned* residual;            // (kStackTurns, tokens, E): the residual stream between blocks
  unsigned* g;                   // (kStackTurns, tokens, D)
  int8_t* bytes;                 // (tokens, max(D, E)), u or g
  // For many sequences in place of these, (kStackTurns) of u and of g at many_place, turned with kThere:
  // a word of them that is zero is not there yet, or, seldom, what it should be.
  unsigned *u_words, *g_words;
  unsigned* parts_of_sums;  // of W_x: (grid, grid, quads of a thread block, 4): for which, from which
  unsigned* sums;           // (kStackTurns, quads, 4)
};

struct StackParams {
  StackPlan plan;
  StackBlock block[kStackBlocks];
};

static_assert(sizeof(StackParams) <= 32764, "a kernel's arguments");

constexpr int kAccPitch = 8;         // sums of a product: (rows, 8), a column for each sequence
// Where sum i of W_x is, in words: four of them in each 128 bytes, for all thread blocks add to them and wait for them
// at a time, and each part of the second-level cache serves some of these lines.
constexpr int kSumSpread = 4;
__host__ __device__ constexpr int sum_place(int i) { return kSumSpread * (i - i % 4) + i % 4; }

// For many sequences: numbers from row to row of a product's sums, by groups of eight sequences.
__host__ __device__ constexpr int many_pitch(int groups) { return 8 * groups + 4; }

constexpr int kCounterSpread = 32;   // words from one of two counters of thread blocks to the other one
constexpr int kTeams = 2;            // of workers; each takes a slot at a time
constexpr int kTileWeightRows = 16;  // of a weight, in a slot of the ring
constexpr int kManyTileRows = 8;     // the same for many sequences
constexpr int kManyPieceColumns = 2560;  // of a row there, at most: five times 32 for each of sixteen warps
constexpr int kSlotColumns = 2560;   // of a weight, in a slot, at most: short copies are slow

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

// Bytes from row to row of an operand with `columns` columns: eight rows read 16 bytes at a time hit all banks.
__host__ __device__ constexpr int operand_pitch(int columns) {
  return round_up(columns, 64) + (round_up(columns, 64) % 128 == 0 ? 64 : 0);
}

// The same for many sequences, whose slots are read 8 bytes at a time, four rows of 32.
__host__ __device__ constexpr int many_slot_pitch(int columns) {
  return round_up(columns, 32) + (round_up(columns, 32) % 64 == 0 ? 32 : 0);
}

// Bytes for all, by groups of eight sequences: as the lanes of a matrix instruction have them, 32 columns at a time.
__host__ __device__ constexpr int many_bytes(int groups, int columns) { return round_up(columns, 32) * 8 * groups; }
__host__ __device__ constexpr int many_place(int groups, int m, int column) {
  return column / 32 * 256 * groups + (m % 8 * 4 + column % 32 / 8) * 8 * groups + m / 8 * 8 + column % 8;
}

// Columns of a slot, where a row is cut evenly into as few pieces of at most `most` as there can be.
__host__ __device__ constexpr int slot_columns(int columns, int most) {
  return round_up(divide_up(columns, divide_up(columns, most)), 64);
}

}  // namespace quamba
