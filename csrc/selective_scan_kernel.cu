// One (LANES, STATES) pair of the scan; compiled once for each pair in setup.py.
#include "quamba/selective_scan_tiles.cuh"
#include "selective_scan_kernel.h"

namespace quamba {
namespace {

template <int LANES, int STATES, bool kBytes, bool kAsync>
cudaError_t launch(const ScanParams& p, cudaStream_t stream) {
  const auto kernel = selective_scan_kernel<LANES, STATES, kBytes, kAsync>;
  const ScanLayout layout(p, LANES * STATES);
  if (layout.total > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.total);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>((p.channels + p.block_channels - 1) / p.block_channels),
                  static_cast<unsigned>(p.batch));
  kernel<<<grid, p.block_channels * LANES, layout.total, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <int LANES, int STATES>
cudaError_t launch_selective_scan(const ScanParams& p, bool bytes, bool async, cudaStream_t stream) {
  if (bytes && async) return launch<LANES, STATES, true, true>(p, stream);
  if (async) return launch<LANES, STATES, false, true>(p, stream);
  return launch<LANES, STATES, false, false>(p, stream);
}

template cudaError_t launch_selective_scan<QUAMBA_LANES, QUAMBA_STATES>(const ScanParams&, bool, bool, cudaStream_t);

}  // namespace quamba
