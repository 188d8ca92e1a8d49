// The bulk kernel of linear with the convolution behind it.
#include "linear_bulk_start.h"
#include "linear_conv1d_step_kernel.h"

namespace quamba {

cudaError_t launch_linear_conv1d_step_bulk(const LinearParams& p, const RingConv& tail, int processors,
                                           cudaStream_t stream) {
  return start_bulk(p, processors, tail, stream);
}

}  // namespace quamba
