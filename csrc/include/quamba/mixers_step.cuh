// mixers_step: one token per sequence through a stack of blocks, in one launch. What the launch is given, and how a
// thread block divides its shared memory; the kernel is in mixers_step_kernel.cuh.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kStackBlocks = 96;        // blocks a launch: a kernel's arguments end at 32764 bytes
constexpr int kStackTokens = 16;        // sequences a launch
constexpr int kStackDistributed = 3;    // from so many on, a token's norm and transform are one thread block's work
constexpr int kStackSlots = 24;         // of the ring, at most
constexpr int kStackWidth = 8192;       // of the model, at most
constexpr int kStackHadamards[] = {1, 12, 20};  // orders of the base matrix that the kernel has

// Every pointer is to what mixer_step takes under that name.
struct StackBlock {
  const void* norm_weight;
  const float* u_scale;
  const int8_t* in_weight;
  const float* in_weight_scale;
  const void* in_bias;
  const float* xz_scale;
  const int8_t* conv_weight;
  const float* conv_weight_scale;
  const void* conv_bias;
  const float* x_scale;
  const int8_t* x_weight;
  const float* x_weight_scale;
  const float* x_in_scale;
  const float* x_scan_scale;
  const void* d_norm_weight;
  const void* B_norm_weight;
  const void* C_norm_weight;
  const float* dbc_scale;
  const int8_t* dt_weight;
  const float* dt_weight_scale;
  const float* dt_scale;
  const void* dt_bias;
  const float* A;
  const void* D;
  const float* g_scale;
  const int8_t* out_weight;
  const float* out_weight_scale;
  const void* out_bias;
  int8_t* conv_state;
  float* ssm_state;
  float norm_eps, dbc_eps;
};

// What the blocks of a launch have in common.
struct StackFormat {
  int64_t conv_batch, ssm_batch;  // strides of the states
  int model, inner, states, width, rank;  // E, D, N, K, R
  int in_weight_scale, conv_weight_scale, x_scale, x_weight_scale, x_scan_scale, dt_weight_scale, dt_scale,
      out_weight_scale;  // strides of scales: 0 or 1
  Type norm_weight, in_bias, conv_bias, dbc_norm_weight, dt_bias, D, out_bias;
  bool norm_dbc, rotate, residual;
};

// Offsets in a thread block's shared memory, in bytes. A "buffer" is what the staging warps prepare for one block of
// the stack; there are two.
struct StackShared {
  int act, acc, kept, raw, buffer[2], total;
  int slots, slot_bytes, slot_columns;  // the ring of weight tiles, at offset 0
  // within a buffer:
  int x_weight, dt_weight, A, taps, fields, field_bytes, dbc, out, single, norm, block;
};

struct StackParams {
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
  StackBlock block[kStackBlocks];
};

static_assert(sizeof(StackParams) <= 32764, "a kernel's arguments");

// What is staged of each channel of a thread block, 4 bytes at most, and beside the channels.
enum StackField {
  kInX, kInZ, kBiasX, kBiasZ, kScaleX, kScaleZ, kConvScale, kConvBias, kXScale, kScanScale, kDtWeightScale, kDtScale,
  kDtBias, kSkip, kStackFields
};
enum StackSingle { kUScale, kXInScale, kGScale, kStackSingles };

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
