// The bulk kernel of linear.
#include "linear_bulk.h"

#include "linear_bulk_start.h"

namespace quamba {

cudaError_t linear_bulk(const LinearParams& p, int processors, cudaStream_t stream) {
  return start_bulk(p, processors, RingWrite{}, stream);
}

}  // namespace quamba
