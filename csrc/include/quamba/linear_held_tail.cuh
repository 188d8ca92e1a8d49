// What a block of the kernel of linear that holds its weights does with its sums, as the host gives it to the kernel.
#pragma once

#include "quamba/linear_conv1d_tail.cuh"

namespace quamba {

// It writes them to p.out.
struct HeldWrite {};

// The convolution's step to x, and z, both contiguous. channels is a multiple of 16.
struct HeldConv : LinearConv1dStep {};

}  // namespace quamba
