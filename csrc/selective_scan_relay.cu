// The scan whose warps hand each other the states, for a number of groups; compiled once for each in setup.py.
#include "quamba/selective_scan_relay.cuh"

#include "selective_scan_kernel.h"

namespace quamba {

template <int GROUPS>
cudaError_t launch_selective_scan_relay(const ScanParams& p, cudaStream_t stream) {
  using Layout = RelayLayout<GROUPS>;
  const auto kernel = selective_scan_relay_kernel<GROUPS>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kTotal);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((p.channels + Layout::kChannels - 1) / Layout::kChannels),
                  static_cast<unsigned>(p.batch));
  kernel<<<grid, Layout::kThreads, Layout::kTotal, stream>>>(p);
  return cudaGetLastError();
}

template cudaError_t launch_selective_scan_relay<QUAMBA_GROUPS>(const ScanParams&, cudaStream_t);

}  // namespace quamba
