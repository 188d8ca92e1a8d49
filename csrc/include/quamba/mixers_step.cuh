// mixers_step: one token per sequence through a stack of blocks, in one launch. What the launch is given, and how a
// thread block divides its shared memory; the kernel is in mixers_step_kernel.cuh.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kStackBlocks = 100;       // blocks a launch: a kernel's arguments end at 32764 bytes
constexpr int kStackTokens = 16;        // sequences a launch
constexpr int kStackDistributed = 3;    // from so many on, a token's norm and transform are one thread block's work
constexpr int kStackSlots = 24;         // of the ring, at most
constexpr int kStackWidth = 8192;       // of the model, at most
constexpr int kStackHadamards[] = {1, 12, 20};  // orders of the base matrix that the kernel has

// What is copied to shared memory for each block, in words. A field that has one number a channel of D, or a row of W_out,
// is copied for those of the thread block. Vectors are float32, but for the norm's weight.
enum StackField {
  kInX, kInZ, kBiasX, kBiasZ, kScaleX, kScaleZ, kConvScale, kConvBias, kXScale, kScanScale, kDtWeightScale, kDtScale,
  kDtBias, kSkip, kA, kTaps, kDtWeight, kXSumScale, kDbcScale, kDNorm, kBNorm, kCNorm, kOutScale, kOutBias, kUScale,
  kXInScale, kGScale, kNormWeight, kStackFields
};

struct StackBlock {
  const void* field[kStackFields];  // null where there is none
  const int8_t* in_weight;
  const int8_t* x_weight;
  const int8_t* out_weight;
  int8_t* conv_state;
  float* ssm_state;
  float norm_eps, dbc_eps;
};

// How a field is copied, the same for all blocks of a launch.
struct StackCopy {
  int to;             // offset in the buffer
  int bytes, stride;  // of a thread block, and from one's to the next one's
  int total;          // bytes of the field
  int width;          // of a copy: 16, 8 or 4 bytes
};

// What the blocks of a launch have in common.
struct StackFormat {
  int64_t conv_batch, ssm_batch;  // strides of the states
  int model, inner, states, width, rank;  // E, D, N, K, R
  int in_weight_scale, conv_weight_scale, x_scale, x_weight_scale, x_scan_scale, dt_weight_scale, dt_scale,
      out_weight_scale;  // strides of scales: 0 or 1
  Type norm_weight;
  bool norm_dbc, rotate, residual, has_dt_scale, has_norms;
  bool has_in_bias, has_conv_bias, has_out_bias;
};

// Offsets in a thread block's shared memory, in bytes. A "buffer" is what the staging warps prepare for one block of
// the stack; there are two.
struct StackShared {
  int act, acc, kept, raw, buffer[2], total;
  int slots, slot_bytes, slot_columns;  // the ring of weight tiles, at offset 0
  // within a buffer:
  int x_weight, x_weight_pitch, block;  // the pitch in words
  StackCopy copy[kStackFields];
};

// All of a launch but the blocks. Thread blocks keep a copy in shared memory: constants are many here, and rare.
struct StackPlan {
  StackFormat f;
  StackShared s;
  int blocks, tokens, grid;
  int channels, rows;  // of D, of E, a thread block
  int flight;          // slots of the ring that are under way at a time, at most
  // The transform of g: order = power * base.
  int power, log_power, base;
  float factor;
  const void* hidden;
  int64_t hidden_row;
  void* out;
  Type hidden_type, out_type;
  // Between thread blocks, zero at the launch. Numbers travel with a tag beside them, by which a reader sees that they
  // are there: waiting for the number costs one way to memory, where a barrier and then the number cost four.
  unsigned* counter;             // of the barrier that what has no tags takes
  unsigned long long* dbc;       // (blocks, tokens, R + 2 N), sums of W_x and how many thread blocks added to them
  unsigned long long* residual;  // (tokens, E), tagged: the residual stream between blocks
  unsigned long long* g;         // (tokens, D), tagged
  int8_t* bytes;                 // (tokens, max(D, E)), u or g
};

struct StackParams {
  StackPlan plan;
  StackBlock block[kStackBlocks];
};

static_assert(sizeof(StackParams) <= 32764, "a kernel's arguments");

constexpr int kTeams = 2;            // of workers; each takes a slot at a time
constexpr int kTileWeightRows = 16;  // of a weight, in a slot of the ring
constexpr int kSlotColumns = 2560;   // of a weight, in a slot, at most: short copies are slow

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

// Bytes from row to row of an operand with `columns` columns: eight rows read 16 bytes at a time hit all banks.
__host__ __device__ constexpr int operand_pitch(int columns) {
  return round_up(columns, 64) + (round_up(columns, 64) % 128 == 0 ? 64 : 0);
}

// Columns of a slot, where a row is cut evenly into as few pieces of at most `most` as there can be.
__host__ __device__ constexpr int slot_columns(int columns, int most) {
  return round_up(divide_up(columns, divide_up(columns, most)), 64);
}

}  // namespace quamba
