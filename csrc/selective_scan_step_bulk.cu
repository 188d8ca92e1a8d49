// The step of the scan with bulk copies.
#include "selective_scan_step_bulk.h"

#include <algorithm>
#include <cstdlib>

#include "quamba/selective_scan_step_bulk.cuh"

namespace quamba {
namespace {

// Sequences of a block, for tuning; 0 for the other kernel, -1 where the environment has no wish.
int wanted() {
  const char* const text = std::getenv("QUAMBA_SCAN_STEP");
  return text ? std::clamp(std::atoi(text), 0, kBulkStepSequences) : -1;
}

template <bool kProduct>
cudaError_t start(const ScanParams& p, const DtProduct& product, int processors, cudaStream_t stream) {
  // As many parts as the device takes at a time, of four sequences or more, for what belongs to a channel is read for
  // each; of fewer where multiprocessors would have nothing to do.
  const int64_t groups = (p.channels + kBulkStepChannels - 1) / kBulkStepChannels;
  const int64_t fit = std::max<int64_t>(processors * kBulkStepBlocks / groups, 1);
  const int64_t parts = std::min(fit, std::max((p.batch + 3) / 4, std::min<int64_t>(p.batch, processors / groups)));
  const int64_t forced = wanted();
  const int64_t share = forced > 0 ? forced : std::min<int64_t>((p.batch + parts - 1) / parts, kBulkStepSequences);
  const int64_t ranges = (p.batch + share - 1) / share;
  const int most = static_cast<int>((p.batch + ranges - 1) / ranges);
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(ranges));
  const auto kernel = selective_scan_step_bulk_kernel<kProduct>;
  // For all kBulkStepBlocks at a time.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  return launch(kernel, Launch{grid, kBulkStepThreads, BulkStepLayout(most).total, stream}, p, product, most);
}

}  // namespace

bool takes_bulk_step(const ScanParams& p, int device) {
  const int forced = wanted();
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9 && (forced < 0 ? p.batch > 8 : forced > 0) && p.states == kBulkStepStates &&
         p.state_channel == kBulkStepStates && p.batch <= 65535 && p.channels <= INT32_MAX - kBulkStepChannels;
}

cudaError_t selective_scan_step_bulk(const ScanParams& p, const DtProduct* product, int processors,
                                     cudaStream_t stream) {
  return product ? start<true>(p, *product, processors, stream) : start<false>(p, {}, processors, stream);
}

}  // namespace quamba
