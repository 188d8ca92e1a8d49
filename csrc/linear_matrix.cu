// Padding for the matrix kernels of linear, and their launch.
#include "linear_matrix.h"

#include <array>

namespace quamba {
namespace {

template <typename Out, bool kResidual>
cudaError_t matrix_sm90(const LinearParams& p, LinearKernel kernel, void* workspace, size_t* bytes,
                        cudaStream_t stream) {
  if (kernel == LinearKernel::k64x64) return linear_sm90<Out, kResidual, Tile::k64x64>(p, workspace, bytes, stream);
  if constexpr (sizeof(Out) == 1) {
    if (kernel == LinearKernel::k64x80) return linear_sm90<Out, kResidual, Tile::k64x80>(p, workspace, bytes, stream);
    if (kernel == LinearKernel::k256x192)
      return linear_sm90<Out, kResidual, Tile::k256x192>(p, workspace, bytes, stream);
  }
  if constexpr (kResidual && sizeof(Out) == 4) {
    if (kernel == LinearKernel::k128x80) return linear_sm90<Out, true, Tile::k128x80>(p, workspace, bytes, stream);
    if (kernel == LinearKernel::k128x96) return linear_sm90<Out, true, Tile::k128x96>(p, workspace, bytes, stream);
  }
  // A float32 result without residual is rare: its larger tiles are not worth their compilation.
  if constexpr (kResidual || sizeof(Out) < 4) {
    switch (kernel) {
      case LinearKernel::k128x256:
        return linear_sm90<Out, kResidual, Tile::k128x256>(p, workspace, bytes, stream);
      case LinearKernel::k128x192:
        return linear_sm90<Out, kResidual, Tile::k128x192>(p, workspace, bytes, stream);
      case LinearKernel::k128x160:
        return linear_sm90<Out, kResidual, Tile::k128x160>(p, workspace, bytes, stream);
      default:
        break;
    }
  }
  return linear_sm90<Out, kResidual, Tile::k128x128>(p, workspace, bytes, stream);
}

template <typename Out>
cudaError_t matrix(const LinearParams& p, LinearKernel kernel, bool hopper, void* workspace, size_t* bytes,
                   cudaStream_t stream) {
#ifdef QUAMBA_SM90
  if (hopper) {
    if constexpr (sizeof(Out) > 1) {
      if (p.residual.data) return matrix_sm90<Out, true>(p, kernel, workspace, bytes, stream);
    }
    return matrix_sm90<Out, false>(p, kernel, workspace, bytes, stream);
  }
#endif
  return linear_sm80(p, stream);
}

int64_t round_up(int64_t v, int64_t unit) { return (v + unit - 1) / unit * unit; }

// `t` as it is where it has this shape and rows aligned to 16 bytes; else a copy with zeros added.
Rows padded(const Rows& t, int64_t rows, int64_t columns, int64_t element_size) {
  const int64_t unit = 16 / element_size;
  if (t.rows == rows && t.columns == columns && t.column_stride == 1 && t.row_stride % unit == 0 &&
      aligned(t.data, 16))
    return t;
  const Tensor flat = torch::stable::reshape(t.tensor, std::vector<int64_t>{t.rows, t.columns});
  Tensor wide = torch::stable::new_zeros(flat, std::vector<int64_t>{rows, columns});
  Tensor top = torch::stable::narrow(wide, 0, 0, t.rows);
  Tensor part = torch::stable::narrow(top, 1, 0, t.columns);
  torch::stable::copy_(part, flat);
  return rows_of(wide, "padded");
}

// A scale or bias as float32, (columns,) where it is a vector.
Tensor padded_vector(const Tensor& v, int64_t columns) {
  const Tensor f = v.scalar_type() == ScalarType::Float ? v : torch::stable::to(v, ScalarType::Float);
  if (f.dim() != 1 || f.size(0) == columns || f.size(0) == 1) return f;
  Tensor wide = torch::stable::new_zeros(f, std::vector<int64_t>{columns});
  Tensor part = torch::stable::narrow(wide, 0, 0, f.size(0));
  torch::stable::copy_(part, f);
  return wide;
}

void launch(const LinearParams& p, LinearKernel kernel, bool hopper, const Tensor& like) {
  const cudaStream_t stream = stream_of(like);
  const auto run = [&](void* workspace, size_t* bytes) {
    switch (p.out_type) {
      case Type::kInt8:
        return matrix<int8_t>(p, kernel, hopper, workspace, bytes, stream);
      case Type::kHalf:
        return matrix<__half>(p, kernel, hopper, workspace, bytes, stream);
      case Type::kBFloat16:
        return matrix<__nv_bfloat16>(p, kernel, hopper, workspace, bytes, stream);
      default:
        return matrix<float>(p, kernel, hopper, workspace, bytes, stream);
    }
  };
  size_t bytes = 0;
  cudaError_t error = run(nullptr, &bytes);
  if (error == cudaErrorMemoryAllocation && bytes > 0) {
    const Tensor workspace = empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Char);
    error = run(workspace.data_ptr(), &bytes);
  }
  QUAMBA_CHECK(error == cudaSuccess, "linear: the matrix kernel for M=", p.rows, " N=", p.columns, " K=", p.inner,
               " could not be launched: ", cudaGetErrorString(error));
}

Tensor quantized(const Tensor& x, const Tensor& scale) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(scale)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("quamba::quantize", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor linear_matrix(LinearParams p, const LinearTensors& t, LinearKernel kernel, bool hopper) {
  // The kernels add a residual of the result's own type. Any other is added to a float32 result, rounded afterwards.
  const bool direct = !t.residual || (p.residual.type == p.out_type && p.out_type != Type::kInt8);
  const ScalarType written = direct ? t.out_dtype : ScalarType::Float;
  // Rows of 16 bytes: what the copy engine moves. The sums of the padding are computed and dropped.
  const int64_t true_columns = p.columns, columns = round_up(p.columns, 16 / size_of(type_of(written, "out_dtype"))),
                inner = round_up(p.inner, 16);

  const Rows x = padded(t.x, p.rows, inner, 1), weight = padded(t.weight, columns, inner, 1);
  const Tensor weight_scale = padded_vector(t.weight_scale, columns);
  const Tensor bias = t.bias ? padded_vector(*t.bias, columns) : weight_scale;
  const Tensor out_scale = t.out_scale ? padded_vector(*t.out_scale, columns) : weight_scale;
  Rows residual = x;
  if (t.residual) {
    const Tensor same = direct ? *t.residual : torch::stable::to(*t.residual, ScalarType::Float);
    residual = padded(rows_of(same, "residual"), p.rows, columns, size_of(type_of(same, "residual")));
    p.residual = {residual.data, type_of(same, "residual")};
    p.residual_row = residual.row_stride;
  }
  p.x = static_cast<const int8_t*>(x.data), p.x_row = x.row_stride;
  p.weight = static_cast<const int8_t*>(weight.data), p.weight_row = weight.row_stride;
  p.inner = inner, p.columns = columns;
  p.weight_scale.data = static_cast<const float*>(weight_scale.data_ptr());
  if (t.bias) p.bias = {bias.data_ptr(), Type::kFloat};
  if (t.out_scale) p.out_scale.data = static_cast<const float*>(out_scale.data_ptr());
  p.out_type = type_of(written, "out_dtype");
  Tensor out = empty(x.tensor, {p.rows, columns}, written);
  p.out = out.data_ptr();
  launch(p, kernel, hopper, x.tensor);
  if (columns != true_columns) out = torch::stable::contiguous(torch::stable::narrow(out, 1, 0, true_columns));
  if (written == t.out_dtype) return out;
  return t.out_scale ? quantized(out, *t.out_scale) : torch::stable::to(out, t.out_dtype);
}

}  // namespace quamba
