// quamba::rms_norm_quant on CUDA.
#include "quamba/rms_norm_quant.cuh"

#include <algorithm>

#include "op.h"
#include "ops.h"

namespace quamba {
namespace {

// Whether rms_norm_quant_rows_kernel takes it. It adds up in another order than the kernels for whole steps, whose
// bytes those of single ops are; steps are of so many sequences at most.
bool of_many_rows(const Rows& rows, const AnyVector& weight, int size) {
  constexpr int64_t kStepRows = 256;
  return rows.rows > kStepRows && rows.columns <= kNormPieces * kNormThreads * kChunk &&
         vectorizable(rows, kChunk, size) && aligned(rows.data, 16) && aligned(weight.data, 16);
}

}  // namespace

Tensor rms_norm_quant(const Tensor& x, const OptionalTensor& weight, const Tensor& scale, double eps, bool alone) {
  const Rows rows = rows_of(x, "x");
  const AnyVector weights = vector_of(weight, rows.columns, x, "weight");
  const Scale scales = scale_of(scale, rows.columns, x, "scale");
  Tensor out = empty(x, sizes_of(x), ScalarType::Char);
  if (x.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int threads = static_cast<int>(std::clamp<int64_t>((rows.columns / kChunk + 31) / 32 * 32, 32, 512));
  with_float_type(type_of(x, "x"), "x", [&](auto element) {
    using T = decltype(element);
    if (!alone && of_many_rows(rows, weights, sizeof(T))) {
      const int64_t pieces = (rows.columns / kChunk + kNormPieces - 1) / kNormPieces;
      const int few = static_cast<int>((pieces + 31) / 32 * 32);
      const Launch how{static_cast<unsigned>(rows.rows), few, 0, stream_of(x)};
      return check_launch("rms_norm_quant",
                          launch(rms_norm_quant_rows_kernel<T>, how, static_cast<const T*>(rows.data), rows.row_stride,
                                 static_cast<int>(rows.columns), 1.0f / static_cast<float>(rows.columns), weights,
                                 scales, static_cast<float>(eps), static_cast<int8_t*>(out.data_ptr())));
    }
    with_bool(vectorizable(rows, kChunk, sizeof(T)), [&](auto vector) {
      const Launch how{static_cast<unsigned>(rows.rows), threads, 0, stream_of(x)};
      const auto kernel = rms_norm_quant_kernel<T, vector.value>;
      // A multiprocessor keeps its division of memory while a block is there, of the kernel behind this one, too.
      check_launch("rms_norm_quant", cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                          cudaSharedmemCarveoutMaxShared));
      if (alone) {
        kernel<<<how.grid, threads, 0, how.stream>>>(
            static_cast<const T*>(rows.data), rows.row_stride, rows.column_stride, rows.columns, weights, scales,
            static_cast<float>(eps), static_cast<int8_t*>(out.data_ptr()));
        return check_launch("rms_norm_quant");
      }
      check_launch("rms_norm_quant",
                   launch(kernel, how, static_cast<const T*>(rows.data),
                          rows.row_stride, rows.column_stride, rows.columns, weights, scales,
                          static_cast<float>(eps), static_cast<int8_t*>(out.data_ptr())));
    });
  });
  return out;
}

namespace {
Tensor rms_norm_quant_op(const Tensor& x, const OptionalTensor& weight, const Tensor& scale, double eps) {
  return rms_norm_quant(x, weight, scale, eps);
}
}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("rms_norm_quant", TORCH_BOX(&quamba::rms_norm_quant_op)); }
