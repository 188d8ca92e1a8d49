// quamba::linear on CUDA: checks, and the choice between the kernels.
#include "linear_matrix.h"
#include "linear_pairs.h"
#include "linear_ring.h"
#include "linear_short.h"
#include "linear_slices.h"
#include "linear_strips.h"
#include "op.h"
#include "ops.h"
#include "quamba/linear_rows.cuh"

namespace quamba {
namespace {

void run(void (*kernel)(LinearParams), dim3 grid, int threads, const LinearParams& p, cudaStream_t stream) {
  check_launch("linear", launch(kernel, Launch{grid, threads, 0, stream}, p));
}

template <int GROUPS>
void launch_rows(const LinearParams& p, LinearKernel kernel, cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>((p.columns + kTileRows - 1) / kTileRows);
  switch (kernel) {
    case LinearKernel::kRows8:
      return run(linear_rows_kernel<GROUPS, 8>, tiles, 32 * 8, p, stream);
    case LinearKernel::kRows16:
      return run(linear_rows_kernel<GROUPS, 16>, tiles, 32 * 16, p, stream);
    default:
      return run(linear_rows_kernel<GROUPS, 4>, tiles, 32 * 4, p, stream);
  }
}

template <int M, int ROWS, int STEPS, bool kVector>
void launch_dot(const LinearParams& p, const LinearDevice& device, cudaStream_t stream) {
  // A weight of few rows leaves most of the device idle unless several warps share one.
  const bool split = p.columns < 16 * device.processors;
  const int64_t groups = (p.columns + ROWS - 1) / ROWS;
  const dim3 grid(static_cast<unsigned>(split ? groups : (groups + kDotWarps - 1) / kDotWarps),
                  static_cast<unsigned>((p.rows + M - 1) / M));
  const auto kernel =
      split ? linear_dot_kernel<M, ROWS, STEPS, true, kVector> : linear_dot_kernel<M, ROWS, STEPS, false, kVector>;
  run(kernel, grid, 32 * kDotWarps, p, stream);
}

bool in_vectors(const LinearParams& p) {
  return p.inner % 16 == 0 && p.x_row % 16 == 0 && p.weight_row % 16 == 0 && aligned(p.x, 16) && aligned(p.weight, 16);
}

void run_few(const LinearParams& p, LinearKernel kernel, const LinearDevice& device, cudaStream_t stream) {
#ifdef QUAMBA_SM90
  if (kernel == LinearKernel::kRing) return check_launch("linear", linear_ring(p, device.processors, stream));
  if (kernel == LinearKernel::kShort) return check_launch("linear", linear_short(p, device.processors, stream));
  if (is_pairs(kernel)) {
    const auto start = p.out_type == Type::kInt8 ? linear_pairs<int8_t> : linear_pairs<float>;
    return check_launch("linear", start(p, kernel, device.processors, stream));
  }
  if (kernel == LinearKernel::kSlices)
    return check_launch("linear", linear_slices(p, forced_slices(p), device.processors, stream));
  if (kernel == LinearKernel::kStrips) return check_launch("linear", linear_strips(p, device.processors, stream));
#endif
  if (kernel == LinearKernel::kDot) {
    if (p.columns < 2 * device.processors) return launch_dot<1, 1, 3, true>(p, device, stream);
    if (p.inner <= 2 * kDotStep) return launch_dot<1, 2, 2, true>(p, device, stream);
    if (p.inner <= 3 * kDotStep) return launch_dot<1, 2, 3, true>(p, device, stream);
    return launch_dot<1, 2, 5, true>(p, device, stream);
  }
  if (p.rows <= 8) return launch_rows<1>(p, kernel, stream);
  if (p.rows <= 16) return launch_rows<2>(p, kernel, stream);
  launch_rows<4>(p, kernel, stream);
}

}  // namespace

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
  const LinearDevice device = linear_device(x.get_device_index());
  const bool vectors = in_vectors(p), plain = p.inner == 0 || (p.rows <= kFewRows && !vectors);
  const LinearKernel kernel = choose_kernel(p, device, vectors);
  if (!plain && is_tile(kernel)) return reshaped(linear_matrix(p, t, kernel, device.hopper), sizes);
  Tensor out = empty(x, sizes, out_dtype);
  p.out = out.data_ptr();
  if (plain) {
    launch_dot<4, 1, 1, false>(p, device, stream_of(x));
  } else {
    run_few(p, kernel, device, stream_of(x));
  }
  return out;
}

}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("linear", TORCH_BOX(&quamba::linear)); }
