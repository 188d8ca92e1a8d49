// What every op does on the host: checks with messages that say what was found, views of tensors as plain structs,
// the stream. The only header here that knows torch; it uses the stable ABI alone.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "quamba/types.cuh"

namespace quamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define QUAMBA_CHECK(cond, ...) STD_TORCH_CHECK(cond, "quamba: ", __VA_ARGS__)

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

inline Type type_of(ScalarType dtype, const char* what) {
  switch (dtype) {
    case ScalarType::Char:
      return Type::kInt8;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Float:
      return Type::kFloat;
    default:
      QUAMBA_CHECK(false, what, " has dtype code ", static_cast<int>(dtype),
                   "; expected int8, float16, bfloat16 or float32 on CUDA");
  }
  return Type::kFloat;
}

inline Type type_of(const Tensor& t, const char* what) { return type_of(t.scalar_type(), what); }

inline void check_device(const Tensor& t, const Tensor& like, const char* what) {
  QUAMBA_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), what,
               " is not on the CUDA device of the first argument; move every argument to one device");
}

// A vector of `size` elements of any of our types, made contiguous by the caller's storage `keep`.
inline AnyVector vector_of(const Tensor& t, int64_t size, const Tensor& like, const char* what) {
  check_device(t, like, what);
  QUAMBA_CHECK(t.dim() == 1 && t.size(0) == size && (size <= 1 || t.stride(0) == 1), what, " has shape ", shape_of(t),
               "; expected a contiguous (", size, ",)");
  return {t.data_ptr(), type_of(t, what)};
}

inline AnyVector vector_of(const OptionalTensor& t, int64_t size, const Tensor& like, const char* what) {
  return t ? vector_of(*t, size, like, what) : AnyVector{};
}

// A float32 scale of shape () (or one element), or (size,).
inline Scale scale_of(const Tensor& t, int64_t size, const Tensor& like, const char* what) {
  check_device(t, like, what);
  QUAMBA_CHECK(t.scalar_type() == ScalarType::Float, what, " must be float32");
  const bool single = t.numel() == 1;
  QUAMBA_CHECK(single || (t.dim() == 1 && t.size(0) == size && t.stride(0) == 1), what, " has shape ", shape_of(t),
               "; expected () or a contiguous (", size, ",)");
  return {static_cast<const float*>(t.data_ptr()), single ? 0 : 1};
}

inline Scale scale_of(const OptionalTensor& t, int64_t size, const Tensor& like, const char* what) {
  return t ? scale_of(*t, size, like, what) : Scale{};
}

// A (..., D) tensor seen as (rows, D): one stride between rows, one between columns. Leading dimensions that do not
// collapse to one stride are copied.
struct Rows {
  Tensor tensor;
  int64_t rows = 1, columns = 1, row_stride = 0, column_stride = 1;
  const void* data = nullptr;
};

inline Rows rows_of(const Tensor& t, const char* what) {
  QUAMBA_CHECK(t.dim() >= 1, what, " is a scalar; expected (..., D)");
  const int64_t last = t.dim() - 1;
  Rows view{t};
  view.columns = t.size(last);
  bool collapses = true;
  int64_t expected = 0;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) != 1) {
      if (view.rows == 1) {
        view.row_stride = t.stride(i);
      } else if (t.stride(i) != expected) {
        collapses = false;
      }
      expected = t.stride(i) * t.size(i);
    }
    view.rows *= t.size(i);
  }
  if (collapses) {
    view.column_stride = view.columns > 1 ? t.stride(last) : 1;
    if (view.rows == 1) view.row_stride = view.columns;
  } else {
    view.tensor = torch::stable::contiguous(t);
    view.row_stride = view.columns;
  }
  view.data = view.tensor.data_ptr();
  return view;
}

// The tensor's rows with contiguous columns.
inline Rows dense_rows(const Tensor& t, const char* what) {
  const Rows rows = rows_of(t, what);
  return rows.column_stride == 1 ? rows : rows_of(torch::stable::contiguous(t), what);
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether rows can be read in aligned pieces of `count` elements of `size` bytes.
inline bool vectorizable(const Rows& r, int count, int size) {
  return r.column_stride == 1 && r.columns % count == 0 && aligned(r.data, count * size) &&
         (r.rows <= 1 || r.row_stride % count == 0);
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// While one of these lives, the next empty() lies in `pool`, int8 (bytes,), from byte `offset` on, where it needs no
// more than so many bytes. So an op that is made of others has the results between them in one allocation.
class Placed {
 public:
  Placed(const Tensor& pool, int64_t offset, int64_t bytes) : pool_(&pool), offset_(offset), bytes_(bytes) {
    next() = this;
  }
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;
  ~Placed() { next() = nullptr; }

  // The one that lives, once; or null.
  static const Placed* take() {
    const Placed* const found = next();
    next() = nullptr;
    return found;
  }
  const Tensor& pool() const { return *pool_; }
  int64_t offset() const { return offset_; }
  int64_t bytes() const { return bytes_; }

 private:
  static const Placed*& next() {
    static thread_local const Placed* placed = nullptr;
    return placed;
  }

  const Tensor* pool_;
  int64_t offset_, bytes_;
};

// A contiguous tensor on the device of `like`. This and the views below go by torch's C functions:
// torch::stable::new_empty, view and narrow look an op up by its name at every call, and box its arguments.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  const auto dims = static_cast<int64_t>(sizes.size());
  AtenTensorHandle made = nullptr;
  if (const Placed* const placed = Placed::take()) {
    int64_t bytes = size_of(type_of(dtype, "a result"));
    for (const int64_t size : sizes) bytes *= size;
    if (bytes <= placed->bytes()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch__alloc_from_pool(placed->pool().get(), placed->offset(), code_of(dtype), dims,
                                                         sizes.data(), strides.data(), &made));
      return Tensor(made);
    }
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), code_of(dtype),
                                                  aoti_torch_device_type_cuda(), like.get_device_index(), &made));
  return Tensor(made);
}

// A contiguous tensor's elements in other sizes.
inline Tensor reshaped(const Tensor& t, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), 0, &made));
  return Tensor(made);
}

// Elements [first, first + size) of the last dimension.
inline Tensor part(const Tensor& t, int64_t first, int64_t size) {
  const auto shape = t.sizes(), steps = t.strides();
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = size;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), t.dim(), sizes.data(), steps.data(),
                                                        first * steps[steps.size() - 1], &made));
  return Tensor(made);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error = cudaGetLastError()) {
  QUAMBA_CHECK(error == cudaSuccess, op, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

inline int multiprocessors(const Tensor& t) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index());
  return count;
}

// The result's type: int8 goes with a scale, a float type without.
inline Type result_type(ScalarType out_dtype, bool has_scale) {
  const Type type = type_of(out_dtype, "out_dtype");
  QUAMBA_CHECK((type == Type::kInt8) == has_scale,
               "out_dtype is int8 exactly where out_scale is given; found one without the other");
  return type;
}

// Calls f with a value of the C++ type that `type` names.
template <typename F>
void with_float_type(Type type, const char* what, F&& f) {
  switch (type) {
    case Type::kHalf:
      return f(__half{});
    case Type::kBFloat16:
      return f(__nv_bfloat16{});
    case Type::kFloat:
      return f(float{});
    default:
      QUAMBA_CHECK(false, what, " is int8; expected float16, bfloat16 or float32");
  }
}

template <typename F>
void with_type(Type type, F&& f) {
  if (type == Type::kInt8) return f(int8_t{});
  with_float_type(type, "tensor", f);
}

template <typename F>
void with_bool(bool value, F&& f) {
  if (value) return f(std::true_type{});
  f(std::false_type{});
}

}  // namespace quamba
