// Rounding to int8 without the general case's cost.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

// clamp(round_half_even(v), -128, 127) of four values, NaN as 0 like the CPU, a in the lowest byte: two instructions on
// Hopper, at half the rate of a multiply-add, where clamping four takes eight and packing three of that rate.
__device__ __forceinline__ uint32_t round_to_bytes(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  const auto byte = [](float v) { return round_to_byte(v == v ? v : 0.0f); };
  return pack_bytes(byte(a), byte(b), byte(c), byte(d));
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

__device__ __forceinline__ int8_t rounded_byte(float v) {
  return static_cast<int8_t>(round_to_bytes(v, 0.0f, 0.0f, 0.0f) & 0xff);
}

// COUNT neighbours, rounded so, at an address that is a multiple of COUNT or of 16.
template <int COUNT>
__device__ __forceinline__ void store_rounded(int8_t* p, const float* v) {
  static_assert(COUNT == 4 || COUNT == 8 || COUNT % 16 == 0, "whole vectors");
  uint32_t words[COUNT / 4];
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i) words[i] = round_to_bytes(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  if constexpr (COUNT == 4) {
    *reinterpret_cast<uint32_t*>(p) = words[0];
  } else if constexpr (COUNT == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i)
      reinterpret_cast<uint4*>(p)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
}

// round_half_even(v * factor) of what is in the range of bytes or near it, multiplied and shifted at once, with one
// rounding: for values whose own roundings are as large as that of a quotient. What is far beyond stays beyond.
__device__ __forceinline__ float rounded_product(float v, float factor) {
  return fmaf(v, factor, 12582912.0f) - 12582912.0f;
}

// For the convolution, whose bytes are packed otherwise: clamp(round_half_even(v * factor), -128, 127) in the low byte,
// NaN as -128.
__device__ __forceinline__ uint32_t round_product(float v, float factor) {
  return __float_as_uint(fminf(fmaxf(fmaf(v, factor, 12582912.0f), 12582784.0f), 12583039.0f));
}

}  // namespace quamba
