// The kernel of linear for short rows: how it is cut for a shape, and its launch.
#include "linear_short.h"

#include <algorithm>

#include "quamba/linear_short.cuh"

namespace quamba {
namespace {

// Rows of x a block: so many that the device takes all blocks at a time, or in as few passes as can be.
int rows_of_block(const LinearParams& p, int64_t column_blocks, int blocks) {
  const int64_t at_a_time = std::max<int64_t>(blocks / column_blocks, 1);
  const int64_t passes = (p.rows + at_a_time * kShortRows - 1) / (at_a_time * kShortRows);
  const int64_t rows = (p.rows + at_a_time * passes - 1) / (at_a_time * passes);
  return static_cast<int>((rows + 15) / 16 * 16);
}

template <int STEPS>
cudaError_t start(const LinearParams& p, int processors, cudaStream_t stream) {
  const int64_t column_blocks = (p.columns + kShortColumns - 1) / kShortColumns;
  const int rows = rows_of_block(p, column_blocks, short_blocks(STEPS) * processors);
  const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>((p.rows + rows - 1) / rows));
  const Launch how{grid, 32 * kShortWarps, short_shared(STEPS, rows), stream};
  if (p.x_scale.stride) return launch(linear_short_kernel<STEPS, true>, how, p, rows);
  return launch(linear_short_kernel<STEPS, false>, how, p, rows);
}

}  // namespace

cudaError_t linear_short(const LinearParams& p, int processors, cudaStream_t stream) {
  return with_short_steps(p.inner, [&](auto steps) { return start<steps.value>(p, processors, stream); });
}

}  // namespace quamba
