// linear with the convolution's step behind it: what the kernels that do both are given of the step.
#pragma once

#include "quamba/linear.cuh"

namespace quamba {

// Columns below `channels` are x0 and go through the convolution to x, contiguous; the others are z. Both int8,
// (B, channels).
struct LinearConv1dStep {
  int64_t channels;
  AnyVector weight;
  Scale weight_scale;
  AnyVector bias;
  Scale out_scale;
  int8_t* state;  // (B, channels, 4), contiguous but for the sequences' stride
  int64_t state_batch;
  int8_t* x;
  int8_t* z;
};

}  // namespace quamba
