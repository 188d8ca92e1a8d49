// quamba::embedding on CUDA.
#include "quamba/embedding.cuh"

#include <algorithm>

#include "op.h"

namespace quamba {
namespace {

Tensor embedding(const Tensor& ids, const Tensor& weight, const Tensor& weight_scale,
                 const OptionalTensor& column_scale, ScalarType out_dtype) {
  check_device(ids, weight, "ids");
  QUAMBA_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char && weight.stride(1) == 1,
               "weight has shape ", shape_of(weight), "; expected int8 (V, E) with contiguous rows");
  const bool wide = ids.scalar_type() == ScalarType::Long;
  QUAMBA_CHECK(wide || ids.scalar_type() == ScalarType::Int, "ids must be int64 or int32");
  const Scale scale = scale_of(weight_scale, weight.size(0), weight, "weight_scale");
  const Scale column = scale_of(column_scale, weight.size(1), weight, "column_scale");
  std::vector<int64_t> sizes = sizes_of(ids);
  sizes.push_back(weight.size(1));
  Tensor out = empty(weight, sizes, out_dtype);
  if (out.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor flat = torch::stable::contiguous(ids);
  const int64_t pieces = (weight.size(1) + kEmbeddingColumns - 1) / kEmbeddingColumns;
  const int threads = static_cast<int>(std::min<int64_t>((pieces + 31) / 32 * 32, kEmbeddingThreads));
  const Launch how{static_cast<unsigned>(ids.numel()), threads, 0, stream_of(weight)};
  const bool vectors = weight.size(1) % kEmbeddingColumns == 0 && weight.stride(0) % kEmbeddingColumns == 0 &&
                       aligned(weight.data_ptr(), kEmbeddingColumns) && aligned(column.data, 16) &&
                       aligned(out.data_ptr(), 16);
  with_float_type(type_of(out_dtype, "out_dtype"), "out_dtype", [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](const auto* id, auto vector) {
      using Id = std::decay_t<decltype(*id)>;
      check_launch("embedding", quamba::launch(embedding_kernel<T, Id, vector.value>, how, id,
                                               static_cast<const int8_t*>(weight.data_ptr()), weight.stride(0),
                                               weight.size(0), weight.size(1), scale, column,
                                               static_cast<T*>(out.data_ptr())));
    };
    with_bool(vectors, [&](auto vector) {
      if (wide) return launch(static_cast<const int64_t*>(flat.data_ptr()), vector);
      launch(static_cast<const int32_t*>(flat.data_ptr()), vector);
    });
  });
  return out;
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("embedding", TORCH_BOX(&quamba::embedding)); }
