// The arguments of every op, as plain structs of eight-byte members, and the table of its implementations.
//
// A struct is written from a list of its members, so that Python can ask for their names and order
// (module.cpp) and pack the same bytes: P a pointer (0 for none), S a scale, I an integer, R a float64.
#pragma once

#include <cstdint>

namespace quamba::cpu {

// float32, one for all elements (step 0) or one for each (step 1); data is null where there is none.
struct Scale {
  const float* data;
  int64_t step;
};

// One token per sequence through a whole block; tensors are contiguous, vectors float32, weights int8.
#define QUAMBA_MIXER_STEP(P, S, I, R)                                                               \
  I(d_model) I(d_inner) I(d_state) I(d_conv) I(dt_rank)                                             \
  P(const float, norm_weight) R(norm_eps) S(u_scale)                                                \
  P(const int8_t, in_weight) S(in_weight_scale) P(const float, in_bias) S(xz_scale)                 \
  P(const int8_t, conv_weight) S(conv_weight_scale) P(const float, conv_bias) S(x_scale)            \
  P(const int8_t, x_weight) S(x_weight_scale) S(x_in_scale) S(x_scan_scale)                         \
  I(norm_dbc) P(const float, d_norm_weight) P(const float, B_norm_weight) P(const float, C_norm_weight) \
  R(dbc_eps) S(dbc_scale)                                                                           \
  P(const int8_t, dt_weight) S(dt_weight_scale) S(dt_scale) P(const float, dt_bias)                 \
  P(const float, A) P(const float, D)                                                               \
  I(rotate) I(blocks) I(power) I(base) P(const int8_t, base_signs)                                  \
  S(g_scale) P(const int8_t, out_weight) S(out_weight_scale) P(const float, out_bias) I(residual)

// Strides in elements, the last dimension contiguous; *_int8 is 0 for float32. State (B, D, N), or null.
#define QUAMBA_SELECTIVE_SCAN(P, S, I, R)                                                           \
  I(batch) I(length) I(d_inner) I(d_state) I(threads)                                               \
  P(const void, x) I(x_int8) I(x_batch_stride) I(x_stride) S(x_scale)                               \
  P(const void, dt) I(dt_int8) I(dt_batch_stride) I(dt_stride) S(dt_scale) P(const float, dt_bias)  \
  P(const float, A)                                                                                 \
  P(const void, B) I(B_int8) I(B_batch_stride) I(B_stride) S(B_scale)                               \
  P(const void, C) I(C_int8) I(C_batch_stride) I(C_stride) S(C_scale)                               \
  P(const float, D) P(const void, z) I(z_int8) I(z_batch_stride) I(z_stride) S(z_scale)             \
  S(out_scale) P(void, out) P(float, state)

// x (B, L, D) int8, strides as above; mask (B, L) of one byte each, or null; state (B, D, K) int8, or null. The result
// is int8 where there is an out_scale, else float32.
#define QUAMBA_CAUSAL_CONV1D(P, S, I, R)                                                            \
  I(batch) I(length) I(channels) I(width) I(threads)                                                \
  P(const int8_t, x) I(x_batch_stride) I(x_stride) S(x_scale)                                       \
  P(const int8_t, weight) S(weight_scale) P(const float, bias) S(out_scale)                         \
  P(const uint8_t, mask) P(int8_t, state) P(void, out)

// x (rows, depth), weight (size, depth); the result is int8 where there is an out_scale, else float32.
#define QUAMBA_LINEAR(P, S, I, R)                                                                   \
  I(rows) I(size) I(depth) I(threads)                                                               \
  P(const int8_t, x) S(x_scale) P(const int8_t, weight) S(weight_scale)                             \
  P(const float, bias) P(const float, residual) S(out_scale) P(void, out)

#define QUAMBA_RMS_NORM_QUANT(P, S, I, R)                                                           \
  I(rows) I(size) I(threads)                                                                        \
  P(const float, x) I(x_stride) P(const float, weight) R(eps) S(scale) P(int8_t, out)

#define QUAMBA_HADAMARD_QUANT(P, S, I, R)                                                           \
  I(rows) I(blocks) I(power) I(base) I(threads)                                                     \
  P(const int8_t, base_signs) P(const float, x) S(scale) P(int8_t, out)

#define QUAMBA_POINTER(type, name) type* name;
#define QUAMBA_SCALE(name) Scale name;
#define QUAMBA_INTEGER(name) int64_t name;
#define QUAMBA_REAL(name) double name;
#define QUAMBA_STRUCT(Name, MEMBERS) \
  struct Name {                      \
    MEMBERS(QUAMBA_POINTER, QUAMBA_SCALE, QUAMBA_INTEGER, QUAMBA_REAL) \
  };

QUAMBA_STRUCT(MixerStep, QUAMBA_MIXER_STEP)
QUAMBA_STRUCT(SelectiveScan, QUAMBA_SELECTIVE_SCAN)
QUAMBA_STRUCT(CausalConv1d, QUAMBA_CAUSAL_CONV1D)
QUAMBA_STRUCT(Linear, QUAMBA_LINEAR)
QUAMBA_STRUCT(RmsNormQuant, QUAMBA_RMS_NORM_QUANT)
QUAMBA_STRUCT(HadamardQuant, QUAMBA_HADAMARD_QUANT)

// What changes from step to step: hidden and out (B, E) float32, conv_state (B, D, K) int8, ssm_state (B, D, N).
struct Step {
  const float* hidden;
  float* out;
  int8_t* conv_state;
  float* ssm_state;
  int64_t batch;
  int64_t threads;
};

// One per instruction set.
struct Kernels {
  const char* name;
  void (*mixer_step)(const MixerStep&, const Step&);
  void (*selective_scan)(const SelectiveScan&);
  void (*causal_conv1d)(const CausalConv1d&);
  void (*linear)(const Linear&);
  void (*rms_norm_quant)(const RmsNormQuant&);
  void (*hadamard_quant)(const HadamardQuant&);
};

extern const Kernels kGeneric, kAvx2, kAvx512;

}  // namespace quamba::cpu
