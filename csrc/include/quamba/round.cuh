// Rounding to int8 without the general case's cost.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

// clamp(round_half_even(v), -128, 127) of four finite values, a in the lowest byte: two instructions on Hopper.
__device__ __forceinline__ uint32_t round_to_bytes(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return pack_bytes(round_to_byte(a), round_to_byte(b), round_to_byte(c), round_to_byte(d));
#else
  uint32_t word;
  asm("{ .reg .s32 i, j, k, l; .reg .b32 high;\n"
      "cvt.rni.s32.f32 i, %1;\n"
      "cvt.rni.s32.f32 j, %2;\n"
      "cvt.rni.s32.f32 k, %3;\n"
      "cvt.rni.s32.f32 l, %4;\n"
      "cvt.pack.sat.s8.s32.b32 high, l, k, 0;\n"
      "cvt.pack.sat.s8.s32.b32 %0, j, i, high; }"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
#endif
}

// For values whose own roundings are as large as that of a quotient:

// clamp(round_half_even(v * factor), -128, 127) in the low byte: as round_to_byte, but multiplied and shifted at once,
// with one rounding.
__device__ __forceinline__ uint32_t round_product(float v, float factor) {
  return __float_as_uint(fminf(fmaxf(fmaf(v, factor, 12582912.0f), 12582784.0f), 12583039.0f));
}

// The same before the clamping, as a float: what is far beyond the range of bytes stays beyond.
__device__ __forceinline__ float rounded_product(float v, float factor) {
  return fmaf(v, factor, 12582912.0f) - 12582912.0f;
}

}  // namespace quamba
