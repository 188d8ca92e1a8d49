// quamba::rms_norm_quant on CUDA.
#include "quamba/rms_norm_quant.cuh"

#include <algorithm>

#include "op.h"

namespace quamba {
namespace {

Tensor rms_norm_quant(const Tensor& x, const OptionalTensor& weight, const Tensor& scale, double eps) {
  const Rows rows = rows_of(x, "x");
  const AnyVector weights = vector_of(weight, rows.columns, x, "weight");
  const Scale scales = scale_of(scale, rows.columns, x, "scale");
  Tensor out = empty(x, sizes_of(x), ScalarType::Char);
  if (x.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int threads = static_cast<int>(std::clamp<int64_t>((rows.columns / kChunk + 31) / 32 * 32, 32, 512));
  with_float_type(type_of(x, "x"), "x", [&](auto element) {
    using T = decltype(element);
    with_bool(vectorizable(rows, kChunk, sizeof(T)), [&](auto vector) {
      const Launch how{static_cast<unsigned>(rows.rows), threads, 0, stream_of(x)};
      check_launch("rms_norm_quant",
                   launch(rms_norm_quant_kernel<T, vector.value>, how, static_cast<const T*>(rows.data),
                          rows.row_stride, rows.column_stride, rows.columns, weights, scales,
                          static_cast<float>(eps), static_cast<int8_t*>(out.data_ptr())));
    });
  });
  return out;
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("rms_norm_quant", TORCH_BOX(&quamba::rms_norm_quant)); }
