// What a block of the kernel of linear that holds its weights does with its sums, as the host gives it to the kernel.
#pragma once

#include "quamba/linear.cuh"

namespace quamba {

// It writes them to p.out.
struct HeldWrite {};

// Columns below `channels` are x0 and go through the convolution's step to x; the others are z. Both int8, (B,
// channels), contiguous. channels is a multiple of 16.
struct HeldConv {
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
