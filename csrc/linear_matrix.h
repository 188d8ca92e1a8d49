// linear for more than a few rows: what the matrix kernels need, made from what the caller has.
#pragma once

#include "linear_choice.h"
#include "linear_gemm.h"
#include "op.h"

namespace quamba {

struct LinearTensors {
  Rows x;       // int8, contiguous columns
  Rows weight;  // int8, contiguous columns
  Tensor x_scale, weight_scale;
  OptionalTensor bias, residual, out_scale;
  ScalarType out_dtype;
};

// p holds the call as the row kernel would take it; kernel is a tile. Returns (rows, columns) of out_dtype.
Tensor linear_matrix(LinearParams p, const LinearTensors& t, LinearKernel kernel, bool hopper);

}  // namespace quamba
