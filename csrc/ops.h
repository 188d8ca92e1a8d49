// Ops that others are made of, as functions: the same checks and kernels, without the dispatcher between them.
#pragma once

#include "op.h"

namespace quamba {

// alone: it starts behind the end of all before it.
Tensor rms_norm_quant(const Tensor& x, const OptionalTensor& weight, const Tensor& scale, double eps,
                      bool alone = false);

Tensor linear(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
              const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& out_scale,
              ScalarType out_dtype);

Tensor causal_conv1d(const Tensor& x, const OptionalTensor& x_scale, const Tensor& weight,
                     const OptionalTensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& out_scale,
                     ScalarType out_dtype, const OptionalTensor& mask, const OptionalTensor& conv_state);

Tensor selective_scan(const Tensor& x, const OptionalTensor& x_scale, const Tensor& dt, const OptionalTensor& dt_scale,
                      const Tensor& dt_bias, const Tensor& A, const Tensor& B, const OptionalTensor& B_scale,
                      const Tensor& C, const OptionalTensor& C_scale, const Tensor& D, const OptionalTensor& z,
                      const OptionalTensor& z_scale, const OptionalTensor& out_scale, ScalarType out_dtype,
                      const OptionalTensor& state);

// early: nothing that may still run when the kernel begins writes the state.
Tensor selective_scan_dt_step(const Tensor& x, const OptionalTensor& x_scale, const Tensor& d, const Tensor& d_scale,
                              const Tensor& dt_weight, const Tensor& dt_weight_scale, const OptionalTensor& dt_scale,
                              const Tensor& dt_bias, const Tensor& A, const Tensor& B, const OptionalTensor& B_scale,
                              const Tensor& C, const OptionalTensor& C_scale, const Tensor& D, const OptionalTensor& z,
                              const OptionalTensor& z_scale, const OptionalTensor& out_scale, ScalarType out_dtype,
                              const Tensor& state, bool early);

Tensor hadamard_quant(const Tensor& x, const Tensor& scale);

// On Hopper alone.
Tensor mixers_step(const Tensor& hidden, const std::vector<OptionalTensor>& tensors, const std::vector<double>& floats,
                   const std::vector<int64_t>& flags, ScalarType out_dtype, const std::vector<Tensor>& conv_states,
                   const std::vector<Tensor>& ssm_states);

}  // namespace quamba
