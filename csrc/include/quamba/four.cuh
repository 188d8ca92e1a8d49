// Four neighbouring elements of a vector whose type is known at run time, in one load.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

// As they are in memory, converted later, for code that has several to load. The first is aligned to four, and zeros
// stand for no vector.
struct FourBits {
  uint32_t words[4];

  __device__ __forceinline__ FourBits(const AnyVector& v, int64_t i) : words{} {
    if (!v) return;
    if (v.type == Type::kInt8) {
      words[0] = static_cast<const uint32_t*>(v.data)[i / 4];
    } else if (v.type == Type::kFloat) {
      const uint4 four = static_cast<const uint4*>(v.data)[i / 4];
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const uint2 four = static_cast<const uint2*>(v.data)[i / 4];
      words[0] = four.x, words[1] = four.y;
    }
  }

  __device__ __forceinline__ void widen(Type type, float (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = words[0] >> 8 * i & 0xff, half = words[i / 2] >> 16 * (i % 2) & 0xffff;
      out[i] = from_bits(type == Type::kInt8 ? byte : type == Type::kFloat ? words[i] : half, type);
    }
  }
};

// The scales of four neighbours, one where there are none.
__device__ __forceinline__ void four_scales(const Scale& s, int64_t i, float (&out)[4]) {
  float4 four = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  if (s && s.stride) {
    four = *reinterpret_cast<const float4*>(s.data + i);
  } else if (s) {
    four.x = four.y = four.z = four.w = s.data[0];
  }
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}

}  // namespace quamba
