// The ring kernel of linear with the convolution behind it.
#include "linear_conv1d_step_kernel.h"

#include "linear_ring_start.h"

namespace quamba {

cudaError_t launch_linear_conv1d_step(const LinearParams& p, const RingConv& tail, int processors,
                                      cudaStream_t stream) {
  return start_ring(p, processors, 1, tail, stream);
}

}  // namespace quamba
