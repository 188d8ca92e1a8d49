// The ring kernel of linear.
#include "linear_ring.h"

#include "linear_ring_start.h"

namespace quamba {

cudaError_t linear_ring(const LinearParams& p, int processors, cudaStream_t stream) {
  return start_ring(p, processors, 8, RingWrite{}, stream);
}

}  // namespace quamba
