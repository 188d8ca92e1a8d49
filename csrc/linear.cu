// quamba::linear on CUDA: checks, and the choice between the row kernel and the matrix kernels.
#include "linear_matrix.h"
#include "op.h"
#include "quamba/linear_rows.cuh"

namespace quamba {
namespace {

constexpr int64_t kFewRows = 32;  // up to here the row kernels read the weight once and are as fast as that

template <int GROUPS>
void launch_mma(const LinearParams& p, int processors, cudaStream_t stream) {
  const int64_t tiles = (p.columns + kTileRows - 1) / kTileRows;
  const auto launch = [&](auto split) {
    constexpr int kSplit = split.value, kTiles = rows_block_warps(kSplit) / kSplit;
    const unsigned blocks = static_cast<unsigned>((tiles + kTiles - 1) / kTiles);
    linear_rows_mma_kernel<GROUPS, kSplit><<<blocks, 32 * rows_block_warps(kSplit), 0, stream>>>(p);
  };
  // As many warps share a tile as are needed to keep the memory busy, while each has something to read.
  const int64_t warps = 24 * processors, pieces = p.inner / 64;
  if (tiles * 4 >= 2 * warps || pieces < 8) return launch(std::integral_constant<int, 1>{});
  if (tiles * 8 >= warps || pieces < 32) return launch(std::integral_constant<int, 4>{});
  launch(std::integral_constant<int, 16>{});
}

template <int M, int ROWS>
void launch_dot(const LinearParams& p, bool vector, int processors, cudaStream_t stream) {
  // A weight of few rows leaves most of the device idle unless several warps share one.
  const bool split = p.columns < 16 * processors;
  const int64_t groups = (p.columns + ROWS - 1) / ROWS;
  const dim3 grid(static_cast<unsigned>(split ? groups : (groups + kRowWarps - 1) / kRowWarps),
                  static_cast<unsigned>((p.rows + M - 1) / M));
  with_bool(vector, [&](auto aligned) {
    if (split) {
      linear_rows_kernel<M, ROWS, true, aligned.value><<<grid, 32 * kRowWarps, 0, stream>>>(p);
    } else {
      linear_rows_kernel<M, ROWS, false, aligned.value><<<grid, 32 * kRowWarps, 0, stream>>>(p);
    }
  });
}

void run_rows(const LinearParams& p, int processors, cudaStream_t stream) {
  const bool vector = p.inner % 16 == 0 && p.x_row % 16 == 0 && p.weight_row % 16 == 0 && aligned(p.x, 16) &&
                      aligned(p.weight, 16);
  // One row: the product without matrix instructions, which the other kernel beats where the device is just full.
  if (vector && p.rows == 1 && (p.columns > 16384 || p.columns * p.inner < (int64_t{8} << 20))) {
    if (p.columns >= 4096) return launch_dot<1, 2>(p, true, processors, stream);
    return launch_dot<1, 1>(p, true, processors, stream);
  }
  if (!vector) return launch_dot<4, 1>(p, false, processors, stream);
  if (p.rows <= 8) return launch_mma<1>(p, processors, stream);
  if (p.rows <= 16) return launch_mma<2>(p, processors, stream);
  launch_mma<4>(p, processors, stream);
}

// The tensor's rows with contiguous columns.
Rows dense_rows(const Tensor& t, const char* what) {
  const Rows rows = rows_of(t, what);
  return rows.column_stride == 1 ? rows : rows_of(torch::stable::contiguous(t), what);
}

Tensor linear(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
              const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& out_scale,
              ScalarType out_dtype) {
  QUAMBA_CHECK(x.scalar_type() == ScalarType::Char && weight.scalar_type() == ScalarType::Char,
               "linear: x and weight must be int8");
  check_device(weight, x, "weight");
  QUAMBA_CHECK(weight.dim() == 2 && x.dim() >= 1 && weight.size(1) == x.size(x.dim() - 1), "weight has shape ",
               shape_of(weight), "; expected (N, K) for x ", shape_of(x));
  LinearTensors t{dense_rows(x, "x"), dense_rows(weight, "weight"), x_scale,  weight_scale, bias,
                  residual,           out_scale,                    out_dtype};
  LinearParams p{};
  p.rows = t.x.rows, p.inner = t.x.columns, p.columns = weight.size(0);
  p.x = static_cast<const int8_t*>(t.x.data), p.x_row = t.x.row_stride;
  p.weight = static_cast<const int8_t*>(t.weight.data), p.weight_row = t.weight.row_stride;
  check_device(x_scale, x, "x_scale");
  const bool single = x_scale.numel() == 1;
  QUAMBA_CHECK(x_scale.scalar_type() == ScalarType::Float &&
                   (single || (x_scale.numel() == p.rows && x_scale.is_contiguous() &&
                               x_scale.size(x_scale.dim() - 1) == 1)),
               "x_scale has shape ", shape_of(x_scale), "; expected float32 (), or contiguous (..., 1), for x ",
               shape_of(x));
  p.x_scale = {static_cast<const float*>(x_scale.data_ptr()), single ? 0 : 1};
  p.weight_scale = scale_of(weight_scale, p.columns, x, "weight_scale");
  p.bias = vector_of(bias, p.columns, x, "bias");
  p.out_scale = scale_of(out_scale, p.columns, x, "out_scale");
  p.out_type = result_type(out_dtype, out_scale.has_value());

  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = p.columns;
  Rows residual_rows = t.x;
  if (residual) {
    check_device(*residual, x, "residual");
    QUAMBA_CHECK(sizes_of(*residual) == sizes, "residual has shape ", shape_of(*residual),
                 "; expected that of the result, with a last dimension of ", p.columns);
    residual_rows = dense_rows(*residual, "residual");
    p.residual = {residual_rows.data, type_of(*residual, "residual")};
    p.residual_row = residual_rows.row_stride;
  }
  if (p.rows == 0 || p.columns == 0) return empty(x, sizes, out_dtype);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (p.rows > kFewRows && p.inner > 0) return torch::stable::view(linear_matrix(p, t), sizes);
  Tensor out = empty(x, sizes, out_dtype);
  p.out = out.data_ptr();
  run_rows(p, multiprocessors(x), stream_of(x));
  check_launch("linear");
  return out;
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("linear", TORCH_BOX(&quamba::linear)); }
