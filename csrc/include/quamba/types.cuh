// Element types, loads and the one rounding: what every kernel shares. No torch here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quamba {

enum class Type : int8_t { kInt8, kHalf, kBFloat16, kFloat };

template <typename T>
struct TypeOf;
template <>
struct TypeOf<int8_t> {
  static constexpr Type value = Type::kInt8;
};
template <>
struct TypeOf<__half> {
  static constexpr Type value = Type::kHalf;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr Type value = Type::kBFloat16;
};
template <>
struct TypeOf<float> {
  static constexpr Type value = Type::kFloat;
};

__host__ __device__ constexpr int size_of(Type type) {
  return type == Type::kInt8 ? 1 : type == Type::kFloat ? 4 : 2;
}

__device__ __forceinline__ float to_float(int8_t v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

// A vector whose element type is known at run time only: for what is loaded rarely (bias, norm weight, D skip),
// where a uniform branch costs less than another kernel instantiation.
struct AnyVector {
  const void* data = nullptr;
  Type type = Type::kFloat;

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ float operator[](int64_t i) const {
    switch (type) {
      case Type::kInt8:
        return to_float(static_cast<const int8_t*>(data)[i]);
      case Type::kHalf:
        return to_float(static_cast<const __half*>(data)[i]);
      case Type::kBFloat16:
        return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

// An element of an AnyVector in two steps, for code that has several to load: a conversion next to its load would wait
// for it before the next load is issued.
__device__ __forceinline__ uint32_t load_bits(const AnyVector& v, int64_t i) {
  switch (v.type) {
    case Type::kInt8:
      return static_cast<const uint8_t*>(v.data)[i];
    case Type::kFloat:
      return static_cast<const uint32_t*>(v.data)[i];
    default:
      return static_cast<const uint16_t*>(v.data)[i];
  }
}

__device__ __forceinline__ float from_bits(uint32_t bits, Type type) {
  switch (type) {
    case Type::kInt8:
      return static_cast<float>(static_cast<int8_t>(bits));
    case Type::kHalf:
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    case Type::kBFloat16:
      return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
    default:
      return __uint_as_float(bits);
  }
}

// A float32 scale: absent, one for all (stride 0), or one per index (stride 1).
struct Scale {
  const float* data = nullptr;
  int stride = 0;

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ float operator[](int64_t i) const { return data[i * stride]; }
  __device__ __forceinline__ float or_one(int64_t i) const { return data != nullptr ? data[i * stride] : 1.0f; }
};

__device__ __forceinline__ float reciprocal_approx(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// x / scale, correctly rounded, from the scale's (approximate) reciprocal in three multiply-adds: the quotient decides on which
// side of a rounding tie a value falls, so a plain multiplication by the reciprocal would not give the integers of
// the reference. Quotients beyond the int8 range skip the correction, which infinities would turn into NaN.
__device__ __forceinline__ float divide(float x, float scale, float reciprocal) {
  const float q = x * reciprocal;
  const float corrected = fmaf(fmaf(-q, scale, x), reciprocal, q);
  return fabsf(q) < 1024.0f ? corrected : q;
}

// clamp(round_half_even(v), -128, 127) in the low byte: adding 1.5 * 2^23 rounds to an integer in the low mantissa
// bits, on the multiply-add pipe instead of the slow conversion unit.
__device__ __forceinline__ uint32_t round_to_byte(float v) {
  return __float_as_uint(fminf(fmaxf(v, -128.0f), 127.0f) + 12582912.0f);
}

__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Byte i of a word of int8, as float, without the conversion unit: the byte, made unsigned, becomes the low mantissa
// byte of 2^23.
template <int I>
__device__ __forceinline__ float byte_to_float(uint32_t word_xor_0x80) {
  return __uint_as_float(__byte_perm(word_xor_0x80, 0x4b000000u, 0x7440 + I)) - 8388736.0f;
}

__device__ __forceinline__ void unpack_bytes(uint32_t word, float* out) {
  word ^= 0x80808080u;
  out[0] = byte_to_float<0>(word);
  out[1] = byte_to_float<1>(word);
  out[2] = byte_to_float<2>(word);
  out[3] = byte_to_float<3>(word);
}

// How a kernel writes its float results: as they are, or quantized with the scale of their column.
template <typename T>
struct Store {
  __device__ __forceinline__ static void one(T* out, float v, float, float) { *out = from_float<T>(v); }
};
template <>
struct Store<int8_t> {
  __device__ __forceinline__ static void one(int8_t* out, float v, float scale, float reciprocal) {
    *out = static_cast<int8_t>(round_to_byte(divide(v, scale, reciprocal)) & 0xff);
  }
};

// COUNT consecutive elements as floats. kVector: 16-byte (or shorter, where COUNT is small) aligned accesses.
template <int COUNT, bool kVector, typename T>
__device__ __forceinline__ void load(const T* p, int64_t stride, int valid, float* out) {
  if constexpr (kVector) {
    constexpr int kBytes = COUNT * static_cast<int>(sizeof(T));
    static_assert(kBytes % 4 == 0, "a vector load moves whole words");
    constexpr int kWords = kBytes / 4;
    uint32_t words[kWords];
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(p)[i];
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    } else if constexpr (kWords % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) {
        const uint2 v = reinterpret_cast<const uint2*>(p)[i];
        words[2 * i] = v.x, words[2 * i + 1] = v.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(p)[i];
    }
    if constexpr (sizeof(T) == 1) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) unpack_bytes(words[i], out + 4 * i);
    } else {
      const T* elements = reinterpret_cast<const T*>(words);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) out[i] = to_float(elements[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) out[i] = i < valid ? to_float(p[i * stride]) : 0.0f;
  }
}

template <int COUNT, bool kVector>
__device__ __forceinline__ void store_bytes(int8_t* p, int valid, const uint32_t* bytes) {
  if constexpr (kVector) {
    static_assert(COUNT % 4 == 0, "a vector store moves whole words");
    uint32_t words[COUNT / 4];
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i)
      words[i] = pack_bytes(bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]);
    if constexpr (COUNT % 16 == 0) {
#pragma unroll
      for (int i = 0; i < COUNT / 16; ++i)
        reinterpret_cast<uint4*>(p)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if constexpr (COUNT % 8 == 0) {
#pragma unroll
      for (int i = 0; i < COUNT / 8; ++i)
        reinterpret_cast<uint2*>(p)[i] = make_uint2(words[2 * i], words[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < COUNT / 4; ++i) reinterpret_cast<uint32_t*>(p)[i] = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (i < valid) p[i] = static_cast<int8_t>(bytes[i] & 0xff);
  }
}

// SiLU and softplus as the scan and the convolution need them: base 2, on the special-function unit.
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float exp2_approx(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ float log2_approx(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// A selection where the compiler would rather branch around the computation of one side.
__device__ __forceinline__ float select(bool which, float yes, float no) {
  float result;
  asm("{ .reg .pred p; setp.ne.s32 p, %1, 0; selp.f32 %0, %2, %3, p; }"
      : "=f"(result)
      : "r"(static_cast<int>(which)), "f"(yes), "f"(no));
  return result;
}

__device__ __forceinline__ float silu(float v) { return v * reciprocal_approx(1.0f + exp2_approx(-kLog2E * v)); }

// log(1 + e^v). The power is kept finite: above that, and long before, v itself is the answer and the larger number.
// Below e^-5 the logarithm of a number so near one has lost the digits: its series has them.
__device__ __forceinline__ float softplus(float v) {
  const float e = exp2_approx(fminf(v * kLog2E, 126.0f));
  const float logarithm = fmaxf(v, 0.6931471805599453f * log2_approx(1.0f + e));
  const float series = e * fmaf(e, fmaf(e, 0.33333333f, -0.5f), 1.0f);
  return select(v < -5.0f, series, logarithm);
}

}  // namespace quamba
