// The scan with two lanes a channel, for a number of groups that two blocks share; compiled once for each in setup.py.
#include "quamba/selective_scan_halves.cuh"

#include "selective_scan_kernel.h"

namespace quamba {

template <int GROUPS>
cudaError_t launch_selective_scan_halves(const ScanParams& p, cudaStream_t stream) {
  using Layout = HalvesLayout<GROUPS>;
  const dim3 grid(static_cast<unsigned>((p.channels + Layout::kChannels - 1) / Layout::kChannels * 2),
                  static_cast<unsigned>(p.batch));
  return launch(selective_scan_halves_kernel<GROUPS>, Launch{grid, Layout::kThreads, Layout::kTotal, stream, 2}, p);
}

template cudaError_t launch_selective_scan_halves<QUAMBA_GROUPS>(const ScanParams&, cudaStream_t);

}  // namespace quamba
