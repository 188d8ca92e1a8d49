// The scan whose warps hand each other the states, for a number of groups and of blocks that share them; compiled once
// for each in setup.py.
#include "quamba/selective_scan_relay.cuh"

#include "selective_scan_kernel.h"

namespace quamba {

template <int GROUPS, int BLOCKS>
cudaError_t launch_selective_scan_relay(const ScanParams& p, cudaStream_t stream) {
  using Layout = RelayLayout<GROUPS, BLOCKS>;
  const dim3 grid(static_cast<unsigned>((p.channels + Layout::kChannels - 1) / Layout::kChannels * BLOCKS),
                  static_cast<unsigned>(p.batch));
  return launch(selective_scan_relay_kernel<GROUPS, BLOCKS>,
                Launch{grid, Layout::kThreads, Layout::kTotal, stream, BLOCKS}, p);
}

template cudaError_t launch_selective_scan_relay<QUAMBA_GROUPS, QUAMBA_BLOCKS>(const ScanParams&, cudaStream_t);

}  // namespace quamba
