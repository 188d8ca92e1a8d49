// Which kernel computes a linear of a given shape.
#pragma once

#include "linear_slices.h"

namespace quamba {

// The first ones read the weight once, for up to kFewRows rows of x: without matrix instructions (one row), or with
// them and as many warps to 16 rows of the weight. The ring, on Hopper, reads it once for 64 rows, and serves
// kRingRows. The short one, on Hopper, is for int8 results of up to kShortInner of K; so is the one by strips, where
// columns come by 64. Pairs of thread blocks, on Hopper, are for int8 results, and for float32 ones with a residual;
// those that have half of K each, alone or by two, for the latter. Slices of K, on Hopper, are for few columns, without
// bias and residual. The others are matrix tiles, rows x columns of the result that a block computes at a time, 64x80
// and 256x192 for int8 without residual, 128x80 and 128x96 for float32 with one; on anything but Hopper one tile stands
// for all.
enum class LinearKernel : int8_t {
  kDot,
  kRows4,
  kRows8,
  kRows16,
  kRing,
  kShort,
  kStrips,
  kPairs,
  kHalves,
  kQuads,
  kSlices,
  k128x256,
  k128x192,
  k128x128,
  k64x64,
  k64x80,
  k128x160,
  k256x192,
  k128x80,
  k128x96
};

inline bool is_pairs(LinearKernel kernel) {
  return kernel == LinearKernel::kPairs || kernel == LinearKernel::kHalves || kernel == LinearKernel::kQuads;
}
inline bool is_tile(LinearKernel kernel) { return kernel >= LinearKernel::k128x256; }

constexpr int64_t kFewRows = 32, kRingRows = 4096, kShortInner = 256, kPairInner = 128, kSliceInner = 128;

struct LinearDevice {
  bool hopper;  // and its matrix kernels are in the library
  int processors;
};

LinearDevice linear_device(int index);

// From the table of measured shapes, or by a model of their cost. `vectors`: p.inner is a multiple of 16, and the
// rows of x and of the weight are aligned to 16 bytes, which all but the tiles, that make copies, rely on. For
// tuning, QUAMBA_LINEAR_KERNEL forces one by name ("dot", "rows4", "ring", "128x256", ...) where it can take the
// call, and "model" leaves the table out.
LinearKernel choose_kernel(const LinearParams& p, const LinearDevice& device, bool vectors);

// For tuning, QUAMBA_LINEAR_SLICES forces how the kernel by slices divides a call: "4x72", slices of K by rows of x.
SliceWay forced_slices(const LinearParams& p);

}  // namespace quamba
