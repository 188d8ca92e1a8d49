// Rounding to int8 of values whose own roundings are as large as that of a quotient.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

// clamp(round_half_even(v * factor), -128, 127) in the low byte: as round_to_byte, but multiplied and shifted at once,
// with one rounding.
__device__ __forceinline__ uint32_t round_product(float v, float factor) {
  return __float_as_uint(fminf(fmaxf(fmaf(v, factor, 12582912.0f), 12582784.0f), 12583039.0f));
}

}  // namespace quamba
