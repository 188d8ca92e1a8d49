// Which kernel computes a linear of a given shape.
#pragma once

#include "quamba/linear.cuh"

namespace quamba {

// The first ones read the weight once, for up to kFewRows rows of x: without matrix instructions (one row), or with them
// and as many warps to 16 rows of the weight. The others are matrix tiles, rows x columns of the result that a block
// computes at a time; on anything but Hopper one tile stands for all.
enum class LinearKernel : int8_t { kDot, kRows4, kRows8, kRows16, k128x256, k128x192, k128x128, k64x64 };

inline bool is_tile(LinearKernel kernel) { return kernel >= LinearKernel::k128x256; }

constexpr int64_t kFewRows = 32;

struct LinearDevice {
  bool hopper;  // and its matrix kernels are in the library
  int processors;
};

LinearDevice linear_device(int index);

// From the table of measured shapes, or by a model of their cost. p.inner is a multiple of 16, and rows are aligned.
// For tuning, QUAMBA_LINEAR_KERNEL forces one by name ("dot", "rows4", "128x256", ...) where it can take so many rows,
// and "model" leaves the table out.
LinearKernel choose_kernel(const LinearParams& p, const LinearDevice& device);

}  // namespace quamba
