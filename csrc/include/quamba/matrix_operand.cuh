// What Hopper's matrix unit is told of operands in shared memory, and products of them.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include <cstdint>
#include <utility>

namespace quamba {

// Rows of 128 bytes, eight to a pattern of the swizzle; `place` in 16 bytes. Places add up in the low word: two
// registers to make uniform, not four.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t place) {
  constexpr int kRowBytes = 128;
  cute::GmmaDescriptor operand;
  operand.bitfield.leading_byte_offset_ = 1;
  operand.bitfield.stride_byte_offset_ = 8 * kRowBytes >> 4;
  operand.bitfield.layout_type_ = 1;
  operand.reg32_[0] += place;
  return operand.desc_;
}

// The instruction for 64 rows of one operand by so many of the other, 32 bytes of K.
template <int COLUMNS>
struct MatrixMultiply;
template <>
struct MatrixMultiply<16> {
  using type = cute::SM90::GMMA::MMA_64x16x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<24> {
  using type = cute::SM90::GMMA::MMA_64x24x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<32> {
  using type = cute::SM90::GMMA::MMA_64x32x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<48> {
  using type = cute::SM90::GMMA::MMA_64x48x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<64> {
  using type = cute::SM90::GMMA::MMA_64x64x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<80> {
  using type = cute::SM90::GMMA::MMA_64x80x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<96> {
  using type = cute::SM90::GMMA::MMA_64x96x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<128> {
  using type = cute::SM90::GMMA::MMA_64x128x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<160> {
  using type = cute::SM90::GMMA::MMA_64x160x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<176> {
  using type = cute::SM90::GMMA::MMA_64x176x32_S32S8S8_SS_TN;
};
template <>
struct MatrixMultiply<192> {
  using type = cute::SM90::GMMA::MMA_64x192x32_S32S8S8_SS_TN;
};

template <typename Multiply, int COUNT, std::size_t... I>
__device__ __forceinline__ void matrix_multiply(uint64_t a, uint64_t b, uint32_t (&sum)[COUNT], bool first,
                                                std::index_sequence<I...>) {
  Multiply::fma(a, b, sum[I]..., first ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One);
}

// Added to the sums, or with `first` in place of them.
template <int COLUMNS>
__device__ __forceinline__ void matrix_multiply(uint64_t a, uint64_t b, uint32_t (&sum)[COLUMNS / 2],
                                                bool first = false) {
  matrix_multiply<typename MatrixMultiply<COLUMNS>::type>(a, b, sum, first, std::make_index_sequence<COLUMNS / 2>{});
}

}  // namespace quamba
