// quamba::quantize and quamba::quantize_per_token on CUDA.
#include "quamba/quantize.cuh"

#include <algorithm>
#include <tuple>

#include "op.h"

namespace quamba {
namespace {

Tensor quantize(const Tensor& x, const Tensor& scale) {
  const Rows rows = rows_of(x, "x");
  check_device(scale, x, "scale");
  QUAMBA_CHECK(scale.scalar_type() == ScalarType::Float, "scale must be float32");
  const bool row_scale = scale.numel() > 1 && scale.dim() == x.dim() && scale.size(scale.dim() - 1) == 1;
  QUAMBA_CHECK(!row_scale || scale.numel() == rows.rows, "scale has shape ", shape_of(scale),
               "; expected (), (D,) or (..., 1) with one scale per row of x ", shape_of(x));
  const Tensor flat = row_scale ? torch::stable::contiguous(scale) : scale;
  const Scale view =
      row_scale ? Scale{static_cast<const float*>(flat.data_ptr()), 1} : scale_of(flat, rows.columns, x, "scale");
  Tensor out = empty(x, sizes_of(x), ScalarType::Char);
  if (x.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t chunks = rows.rows * ((rows.columns + kChunk - 1) / kChunk);
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((chunks + 255) / 256, 16 * multiprocessors(x)));
  with_float_type(type_of(x, "x"), "x", [&](auto element) {
    using T = decltype(element);
    with_bool(vectorizable(rows, kChunk, sizeof(T)), [&](auto vector) {
      quantize_kernel<T, vector.value><<<blocks, 256, 0, stream_of(x)>>>(
          static_cast<const T*>(rows.data), rows.row_stride, rows.column_stride, rows.rows, rows.columns, view,
          row_scale, static_cast<int8_t*>(out.data_ptr()));
    });
  });
  check_launch("quantize");
  return out;
}

std::tuple<Tensor, Tensor> quantize_per_token(const Tensor& x) {
  const Rows rows = rows_of(x, "x");
  Tensor out = empty(x, sizes_of(x), ScalarType::Char);
  std::vector<int64_t> scale_sizes = sizes_of(x);
  scale_sizes.back() = 1;
  Tensor scales = empty(x, scale_sizes, ScalarType::Float);
  if (rows.rows == 0) return {out, scales};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int threads = static_cast<int>(std::clamp<int64_t>((rows.columns / kChunk + 31) / 32 * 32, 32, 512));
  with_float_type(type_of(x, "x"), "x", [&](auto element) {
    using T = decltype(element);
    with_bool(vectorizable(rows, kChunk, sizeof(T)), [&](auto vector) {
      quantize_per_token_kernel<T, vector.value><<<static_cast<unsigned>(rows.rows), threads, 0, stream_of(x)>>>(
          static_cast<const T*>(rows.data), rows.row_stride, rows.column_stride, rows.columns,
          static_cast<int8_t*>(out.data_ptr()), static_cast<float*>(scales.data_ptr()));
    });
  });
  check_launch("quantize_per_token");
  return {out, scales};
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quamba::quantize));
  m.impl("quantize_per_token", TORCH_BOX(&quamba::quantize_per_token));
}
