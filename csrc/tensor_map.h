// How the copy engine is told where bytes lie: boxes of them in rows of 128, swizzled, with zeros beyond the ends.
#pragma once

#include <cutlass/cuda_host_adapter.hpp>

#include <cstdint>

namespace quamba {

// Sizes and box count from the innermost dimension, whose stride is one byte and which `strides` leaves out.
template <int RANK>
bool encode(CUtensorMap* map, const int8_t* data, const cuuint64_t (&sizes)[RANK],
            const cuuint64_t (&strides)[RANK - 1], const cuuint32_t (&box)[RANK]) {
  cuuint32_t steps[RANK];
  for (cuuint32_t& step : steps) step = 1;
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             map, CU_TENSOR_MAP_DATA_TYPE_UINT8, RANK, const_cast<int8_t*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A matrix of `inner` bytes a row, in boxes of `box` rows of `stage` bytes.
inline bool encode_rows(CUtensorMap* map, const int8_t* data, int64_t rows, int64_t inner, int64_t stride, int stage,
                        int box) {
  return encode<2>(map, data, {static_cast<cuuint64_t>(inner), static_cast<cuuint64_t>(rows)},
                   {static_cast<cuuint64_t>(rows > 1 ? stride : inner)},
                   {static_cast<cuuint32_t>(stage), static_cast<cuuint32_t>(box)});
}

}  // namespace quamba
