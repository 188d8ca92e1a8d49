// One base order of the transform; compiled once for each in setup.py. Order 0 takes any, from a table in memory.
#if QUAMBA_BASE == 0
#define QUAMBA_GENERIC_BASE
#define QUAMBA_ROWS_SPACE static __device__ const
#endif
#include "hadamard_quant_kernel.h"

#include <algorithm>

namespace quamba {
namespace {

template <int BASE, typename T, typename Out>
cudaError_t transform(const HadamardParams& p, int64_t rows, cudaStream_t stream) {
  const int order = p.power * p.base;
  const int threads =
      std::clamp((std::max(order / 16, BASE == 1 ? 0 : p.power) + 31) / 32 * 32, 64, hadamard_threads(BASE));
  const int shared = 4 * (hadamard_shared_floats(order) + (BASE == kAnyBase ? order : 0));
  return launch(hadamard_kernel<BASE, T, Out>,
                Launch{static_cast<unsigned>(rows * p.blocks), threads, shared, stream}, p);
}

}  // namespace

template <int BASE>
cudaError_t launch_hadamard(const HadamardParams& p, int64_t rows, Type x_type, bool quantize, cudaStream_t stream) {
  switch (x_type) {
    case Type::kHalf:
      return quantize ? transform<BASE, __half, int8_t>(p, rows, stream)
                      : transform<BASE, __half, __half>(p, rows, stream);
    case Type::kBFloat16:
      return quantize ? transform<BASE, __nv_bfloat16, int8_t>(p, rows, stream)
                      : transform<BASE, __nv_bfloat16, __nv_bfloat16>(p, rows, stream);
    default:
      return quantize ? transform<BASE, float, int8_t>(p, rows, stream)
                      : transform<BASE, float, float>(p, rows, stream);
  }
}

template cudaError_t launch_hadamard<QUAMBA_BASE>(const HadamardParams&, int64_t, Type, bool, cudaStream_t);

}  // namespace quamba
