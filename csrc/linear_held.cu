// The kernel of linear that holds its weights before x is there: its launch.
#include "linear_held.h"

#include "quamba/linear_held.cuh"
#include "quamba/linear_parts.cuh"
#include "tensor_map.h"

namespace quamba {
namespace {

// The weight in boxes of so many runs of 16 columns, dealt out such that a thread gets four neighbours of a run.
bool encode_runs(CUtensorMap* map, const LinearParams& p, cuuint32_t runs) {
  const auto inner = static_cast<cuuint64_t>(p.inner), stride = static_cast<cuuint64_t>(p.weight_row);
  return encode<5>(map, p.weight, {inner, 2, 4, 2, static_cast<cuuint64_t>(p.columns / 16)},
                   {stride, 4 * stride, 2 * stride, 16 * stride}, {kHeldStage, 2, 4, 2, runs});
}

template <typename Tile, typename Tail>
cudaError_t start(const LinearParams& p, const Tail& tail, const CUtensorMap& weight, cudaStream_t stream) {
  CUtensorMap x;
  if (!encode_rows(&x, p.x, p.rows, p.inner, p.x_row, kHeldStage, Tile::kHalves ? kHeldRows : kHeldRows / 2))
    return cudaErrorInvalidValue;
  const auto kernel = linear_held_kernel<Tile, Tail>;
  // A multiprocessor keeps its division of memory while a block is there.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const auto tiles = static_cast<unsigned>((p.columns + Tile::kColumns - 1) / Tile::kColumns);
  const Launch how{Tile::kHalves ? 2 * tiles : (tiles + 1) / 2 * 2, kHeldThreads, held_shared<Tile, Tail>(), stream, 2};
  return launch(kernel, how, p, tail, x, weight);
}

}  // namespace

cudaError_t linear_held(const LinearParams& p, cudaStream_t stream) {
  CUtensorMap weight;
  if (!encode_rows(&weight, p.weight, p.columns, p.inner, p.weight_row, kHeldStage, HeldOut::kColumns))
    return cudaErrorInvalidValue;
  return start<HeldOut>(p, HeldWrite{}, weight, stream);
}

cudaError_t linear_held(const LinearParams& p, const HeldConv& tail, cudaStream_t stream) {
  CUtensorMap weight;
  if (!encode_runs(&weight, p, HeldIn::kColumns / 16)) return cudaErrorInvalidValue;
  return start<HeldIn>(p, tail, weight, stream);
}

cudaError_t linear_parts(const LinearParams& p, cudaStream_t stream) {
  CUtensorMap weight, x;
  if (!encode_runs(&weight, p, 1) || !encode_rows(&x, p.x, p.rows, p.inner, p.x_row, kPartStage, kPartRows))
    return cudaErrorInvalidValue;
  const auto kernel = linear_parts_kernel;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int stages = static_cast<int>((p.inner + kPartStage - 1) / kPartStage);
  const Launch how{static_cast<unsigned>(p.columns / kPartColumns * kPartCluster), kPartThreads, part_shared(stages),
                   stream, kPartCluster};
  return launch(kernel, how, p, x, weight);
}

}  // namespace quamba
