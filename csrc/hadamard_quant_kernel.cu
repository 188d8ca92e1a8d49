// One base order of the transform; compiled once for each in setup.py. Order 0 takes any, from a table in memory.
#if QUAMBA_BASE == 0
#define QUAMBA_GENERIC_BASE
#define QUAMBA_ROWS_SPACE static __device__ const
#endif
#include "hadamard_quant_kernel.h"
#if QUAMBA_BASE != 0
#include "quamba/hadamard_quant_rows.cuh"
#endif

#include <algorithm>

namespace quamba {
namespace {

template <int BASE, typename T, typename Out>
cudaError_t transform(const HadamardParams& p, int64_t rows, int processors, cudaStream_t stream) {
  const int order = p.power * p.base;
  const int whole = (std::max(order / 16, BASE == 1 ? 0 : p.power) + 31) / 32 * 32;  // threads for a pass in one round
  // Rows of 5120 by 320 threads are three a multiprocessor, by 256 four: where that makes one pass of two.
  const bool one_pass = BASE == 20 && p.power == 256 && rows > 3 * processors && rows <= 4 * processors;
  const int threads = one_pass ? p.power : std::clamp(whole, 64, hadamard_threads(BASE));
  const int shared = 4 * (hadamard_shared_floats(order) + (BASE == kAnyBase ? order : 0));
  const auto kernel = hadamard_kernel<BASE, T, Out>;
  // A multiprocessor keeps its division of memory while a block is there, of the kernel behind this one, too.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  return launch(kernel, Launch{static_cast<unsigned>(rows * p.blocks), threads, shared, stream}, p);
}

#if QUAMBA_BASE != 0
// By the kernel for many rows, where p's size is BASE * 2^LOG_POWER or a larger power that it is compiled for.
template <int BASE, int LOG_POWER, typename T>
cudaError_t transform_rows(const HadamardParams& p, int64_t rows, int processors, cudaStream_t stream) {
  if constexpr (LOG_POWER > 13) {
    return cudaErrorInvalidValue;
  } else if constexpr (!has_rows_kernel(BASE, LOG_POWER)) {
    return transform_rows<BASE, LOG_POWER + 1, T>(p, rows, processors, stream);
  } else {
    if (p.log_power != LOG_POWER) return transform_rows<BASE, LOG_POWER + 1, T>(p, rows, processors, stream);
    using How = HadamardRows<BASE, LOG_POWER>;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(rows, How::kBlocks * processors));
    return launch(hadamard_rows_kernel<BASE, LOG_POWER, T>,
                  Launch{blocks, How::kThreads, hadamard_rows_shared<BASE, LOG_POWER>(), stream}, p, rows);
  }
}
#endif

}  // namespace

template <int BASE>
cudaError_t launch_hadamard(const HadamardParams& p, int64_t rows, Type x_type, bool quantize, bool many,
                            int processors, cudaStream_t stream) {
#if QUAMBA_BASE != 0
  if (many)
    return x_type == Type::kHalf ? transform_rows<BASE, 0, __half>(p, rows, processors, stream)
                                 : transform_rows<BASE, 0, __nv_bfloat16>(p, rows, processors, stream);
#endif
  switch (x_type) {
    case Type::kHalf:
      return quantize ? transform<BASE, __half, int8_t>(p, rows, processors, stream)
                      : transform<BASE, __half, __half>(p, rows, processors, stream);
    case Type::kBFloat16:
      return quantize ? transform<BASE, __nv_bfloat16, int8_t>(p, rows, processors, stream)
                      : transform<BASE, __nv_bfloat16, __nv_bfloat16>(p, rows, processors, stream);
    default:
      return quantize ? transform<BASE, float, int8_t>(p, rows, processors, stream)
                      : transform<BASE, float, float>(p, rows, processors, stream);
  }
}

template cudaError_t launch_hadamard<QUAMBA_BASE>(const HadamardParams&, int64_t, Type, bool, bool, int, cudaStream_t);

}  // namespace quamba
