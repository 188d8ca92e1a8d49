// What launches of linear with the convolution's step behind it have in common: tensors as the kernels' parameters.
#pragma once

#include "op.h"
#include "quamba/linear_conv1d_tail.cuh"

namespace quamba {

// Of an int8 result, x and the weight with rows of K in a row; the result's place is not set.
inline LinearParams step_params(const Tensor& x, const Tensor& x_scale, const Tensor& weight,
                                const Tensor& weight_scale, const OptionalTensor& bias,
                                const OptionalTensor& out_scale) {
  LinearParams p{};
  p.rows = x.size(0), p.inner = x.size(1), p.columns = weight.size(0);
  p.x = static_cast<const int8_t*>(x.data_ptr()), p.x_row = x.stride(0);
  p.weight = static_cast<const int8_t*>(weight.data_ptr()), p.weight_row = weight.stride(0);
  p.x_scale = scale_of(x_scale, 1, x, "x_scale");
  p.weight_scale = scale_of(weight_scale, p.columns, x, "weight_scale");
  p.bias = vector_of(bias, p.columns, x, "bias");
  p.out_scale = scale_of(out_scale, p.columns, x, "out_scale");
  p.out_type = Type::kInt8;
  return p;
}

// All but where x and z go, for an x before the product on the device of `like`.
inline void set_step(LinearConv1dStep* step, const Tensor& weight, const OptionalTensor& weight_scale,
                     const OptionalTensor& bias, const OptionalTensor& out_scale, const Tensor& state,
                     const Tensor& like) {
  const int64_t channels = step->channels = weight.size(0);
  step->weight = {weight.data_ptr(), type_of(weight, "conv_weight")};
  step->weight_scale = scale_of(weight_scale, channels, like, "conv_weight_scale");
  step->bias = vector_of(bias, channels, like, "conv_bias");
  step->out_scale = scale_of(out_scale, channels, like, "conv_out_scale");
  step->state = static_cast<int8_t*>(state.data_ptr()), step->state_batch = state.stride(0);
}

}  // namespace quamba
