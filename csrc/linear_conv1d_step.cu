// quamba::linear_conv1d_step on CUDA: in one launch where linear would take its ring kernel, else by the two ops.
#include <array>
#include <tuple>

#include "linear_choice.h"
#include "linear_conv1d_step_kernel.h"
#include "linear_conv1d_tail.h"
#include "op.h"

namespace quamba {
namespace {

Tensor call(const char* op, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

#ifdef QUAMBA_SM90
// The sizes agree, and every row and vector is aligned as the kernel reads it. All else is left to the single ops.
bool fits(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& conv_weight,
          const Tensor& conv_state) {
  if (x.dim() != 2 || weight.dim() != 2 || conv_weight.dim() != 2 || conv_state.dim() != 3) return false;
  const int64_t channels = conv_weight.size(0);
  return x.size(0) > 0 && x.scalar_type() == ScalarType::Char && weight.scalar_type() == ScalarType::Char &&
         conv_state.scalar_type() == ScalarType::Char && weight.is_cuda() && conv_weight.is_cuda() &&
         conv_state.is_cuda() && x_scale.is_cuda() && x_scale.numel() == 1 && channels % 4 == 0 &&
         weight.size(0) == 2 * channels && weight.size(1) == x.size(1) && x.stride(1) == 1 && weight.stride(1) == 1 &&
         conv_weight.size(1) == 4 && conv_weight.is_contiguous() && conv_state.size(0) == x.size(0) &&
         conv_state.size(1) == channels && conv_state.size(2) == 4 && conv_state.stride(2) == 1 &&
         conv_state.stride(1) == 4 && conv_state.stride(0) % 16 == 0 && aligned(conv_state.data_ptr(), 16) &&
         x.size(1) % 16 == 0 && x.stride(0) % 16 == 0 && weight.stride(0) % 16 == 0 && aligned(x.data_ptr(), 16) &&
         aligned(weight.data_ptr(), 16);
}
#endif

std::tuple<Tensor, Tensor> linear_conv1d_step(const Tensor& x, const Tensor& x_scale, const Tensor& weight,
                                              const Tensor& weight_scale, const OptionalTensor& bias,
                                              const Tensor& out_scale, const Tensor& conv_weight,
                                              const OptionalTensor& conv_weight_scale, const OptionalTensor& conv_bias,
                                              const Tensor& conv_out_scale, const Tensor& conv_state) {
  QUAMBA_CHECK(conv_weight.dim() == 2, "conv_weight has shape ", shape_of(conv_weight), "; expected (D, K)");
  const int64_t channels = conv_weight.size(0);
#ifdef QUAMBA_SM90
  if (fits(x, x_scale, weight, conv_weight, conv_state)) {
    check_device(weight, x, "weight");
    check_device(conv_state, x, "conv_state");
    LinearParams p = step_params(x, x_scale, weight, weight_scale, bias, out_scale);
    RingConv tail{};
    set_step(&tail, conv_weight, conv_weight_scale, conv_bias, conv_out_scale, conv_state, x);
    const auto four = [](const void* data, Type type) { return aligned(data, 4 * size_of(type)); };
    const LinearDevice device = linear_device(x.get_device_index());
    if (choose_kernel(p, device, true) == LinearKernel::kRing && four(tail.weight.data, tail.weight.type) &&
        four(tail.bias.data, tail.bias.type) && four(tail.weight_scale.data, Type::kFloat) &&
        four(tail.out_scale.data, Type::kFloat) && four(p.out_scale.data, Type::kFloat)) {
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      Tensor out = empty(x, {p.rows, channels}, ScalarType::Char);
      Tensor xz = empty(x, {p.rows, 2 * channels}, ScalarType::Char);
      Tensor z = torch::stable::narrow(xz, 1, channels, channels);
      tail.x = static_cast<int8_t*>(out.data_ptr());
      tail.z = static_cast<int8_t*>(z.data_ptr()), tail.z_row = 2 * channels;
      check_launch("linear_conv1d_step", launch_linear_conv1d_step(p, tail, device.processors, stream_of(x)));
      return {out, z};
    }
  }
#endif
  using torch::stable::detail::from;
  std::array<StableIValue, 8> product{from(x),    from(x_scale),         from(weight),    from(weight_scale),
                                      from(bias), from(OptionalTensor{}), from(OptionalTensor{out_scale}),
                                      from(ScalarType::Char)};
  Tensor xz = call("quamba::linear", product.data());
  Tensor x0 = torch::stable::narrow(xz, 1, 0, channels);
  Tensor scale = out_scale;
  if (out_scale.dim() == 1 && out_scale.size(0) == 2 * channels) scale = torch::stable::narrow(scale, 0, 0, channels);
  std::array<StableIValue, 8> step{from(x0),
                                   from(OptionalTensor{scale}),
                                   from(conv_weight),
                                   from(conv_weight_scale),
                                   from(conv_bias),
                                   from(OptionalTensor{conv_out_scale}),
                                   from(ScalarType::Char),
                                   from(conv_state)};
  Tensor out = call("quamba::causal_conv1d_step", step.data());
  return {out, torch::stable::narrow(xz, 1, channels, channels)};
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("linear_conv1d_step", TORCH_BOX(&quamba::linear_conv1d_step)); }
