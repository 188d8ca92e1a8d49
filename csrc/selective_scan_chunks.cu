// The scan with a number of lanes along time; compiled once for each in setup.py.
#include "quamba/selective_scan_chunks.cuh"

#include "selective_scan_kernel.h"

namespace quamba {

template <int LANES>
cudaError_t launch_selective_scan_chunks(const ScanParams& p, cudaStream_t stream) {
  const auto kernel = selective_scan_chunks_kernel<LANES>;
  const ChunkLayout<LANES> layout(p);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.total);
  if (error != cudaSuccess) return error;
  const int threads = p.block_channels * LANES;
  const dim3 grid(static_cast<unsigned>((p.channels + p.block_channels - 1) / p.block_channels),
                  static_cast<unsigned>(p.batch));
  kernel<<<grid, threads, layout.total, stream>>>(p, ChunkCopies(p, layout, threads));
  return cudaGetLastError();
}

template cudaError_t launch_selective_scan_chunks<QUAMBA_LANES>(const ScanParams&, cudaStream_t);

}  // namespace quamba
