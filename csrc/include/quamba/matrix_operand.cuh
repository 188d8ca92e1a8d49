// What Hopper's matrix unit is told of an operand in shared memory.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>

#include <cstdint>

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

}  // namespace quamba
