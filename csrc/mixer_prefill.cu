// quamba::mixer_prefill on CUDA: the ops of a block one after the other, without Python and the dispatcher between
// them. What they take on the host, not on the device, is what short sequences wait for.
#include "ops.h"

namespace quamba {
namespace {

Tensor mixer_prefill(const Tensor& hidden, const Tensor& norm_weight, double norm_eps, const Tensor& u_scale,
                     const Tensor& in_weight, const Tensor& in_weight_scale, const OptionalTensor& in_bias,
                     const Tensor& xz_scale, const Tensor& conv_weight, const Tensor& conv_weight_scale,
                     const OptionalTensor& conv_bias, const Tensor& x_scale, const Tensor& x_weight,
                     const Tensor& x_weight_scale, const Tensor& x_in_scale, const Tensor& x_scan_scale,
                     const OptionalTensor& d_norm_weight, const OptionalTensor& B_norm_weight,
                     const OptionalTensor& C_norm_weight, std::optional<double> dbc_eps, const Tensor& dbc_scale,
                     const Tensor& dt_weight, const Tensor& dt_weight_scale, const OptionalTensor& dt_scale,
                     const Tensor& dt_bias, const Tensor& A, const Tensor& D, bool rotate, const Tensor& g_scale,
                     const Tensor& out_weight, const Tensor& out_weight_scale, const OptionalTensor& out_bias,
                     bool residual, ScalarType wide_dtype, ScalarType out_dtype, const OptionalTensor& mask,
                     const OptionalTensor& conv_state, const OptionalTensor& ssm_state) {
  QUAMBA_CHECK(hidden.dim() == 3, "hidden has shape ", shape_of(hidden), "; expected (B, L, E)");
  QUAMBA_CHECK(A.dim() == 2 && dt_weight.dim() == 2, "A has shape ", shape_of(A), " and dt_weight ",
               shape_of(dt_weight), "; expected (D, N) and (D, R)");
  const int64_t inner = A.size(0), states = A.size(1), rank = dt_weight.size(1), sums = rank + 2 * states;
  QUAMBA_CHECK(in_weight.size(0) == 2 * inner && xz_scale.dim() == 1 && xz_scale.size(0) == 2 * inner,
               "in_weight has shape ", shape_of(in_weight), " and xz_scale ", shape_of(xz_scale), "; expected (",
               2 * inner, ", E) and (", 2 * inner, ",)");
  QUAMBA_CHECK(x_weight.size(0) == sums && dbc_scale.dim() == 1 && dbc_scale.size(0) == sums, "x_weight has shape ",
               shape_of(x_weight), " and dbc_scale ", shape_of(dbc_scale), "; expected (", sums, ", D) and (", sums,
               ",)");
  constexpr ScalarType kInt8 = ScalarType::Char;

  const Tensor u = rms_norm_quant(hidden, norm_weight, u_scale, norm_eps);
  const Tensor xz = linear(u, u_scale, in_weight, in_weight_scale, in_bias, std::nullopt, xz_scale, kInt8);
  const Tensor x = causal_conv1d(part(xz, 0, inner), part(xz_scale, 0, inner), conv_weight, conv_weight_scale,
                                 conv_bias, x_scale, kInt8, mask, conv_state);

  const Tensor d_scale = part(dbc_scale, 0, 1), B_scale = part(dbc_scale, rank, states),
               C_scale = part(dbc_scale, rank + states, states);
  OptionalTensor sum_scale;
  if (!dbc_eps) sum_scale = dbc_scale;
  const Tensor dbc = linear(x, x_in_scale, x_weight, x_weight_scale, std::nullopt, std::nullopt, sum_scale,
                            dbc_eps ? wide_dtype : kInt8);
  Tensor d = part(dbc, 0, rank), B = part(dbc, rank, states), C = part(dbc, rank + states, states);
  if (dbc_eps) {
    d = rms_norm_quant(d, d_norm_weight, d_scale, *dbc_eps);
    B = rms_norm_quant(B, B_norm_weight, B_scale, *dbc_eps);
    C = rms_norm_quant(C, C_norm_weight, C_scale, *dbc_eps);
  }
  const Tensor dt = linear(d, d_scale, dt_weight, dt_weight_scale, std::nullopt, std::nullopt, dt_scale,
                           dt_scale ? kInt8 : wide_dtype);

  OptionalTensor scan_scale;
  if (!rotate) scan_scale = g_scale;
  Tensor g = selective_scan(x, x_scan_scale, dt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D,
                            part(xz, inner, inner), part(xz_scale, inner, inner), scan_scale,
                            rotate ? wide_dtype : kInt8, ssm_state);
  if (rotate) g = hadamard_quant(g, g_scale);
  OptionalTensor left;
  if (residual) left = hidden;
  return linear(g, g_scale, out_weight, out_weight_scale, out_bias, left, std::nullopt, out_dtype);
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("mixer_prefill", TORCH_BOX(&quamba::mixer_prefill)); }
