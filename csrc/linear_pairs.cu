// The kernel of linear by pairs of thread blocks: its tile for a shape, and its launch. Compiled once for each
// QUAMBA_OUT that setup.py lists.
#include "linear_pairs.h"

#include "quamba/linear_pairs.cuh"
#include "tensor_map.h"

namespace quamba {
namespace {

using Out = QUAMBA_OUT;
static_assert(kPairStage == kPairInner, "what is halved has two stages");

template <typename Tile>
dim3 grid_of(const LinearParams& p) {
  const auto tiles = static_cast<unsigned>((p.columns + Tile::kColumns - 1) / Tile::kColumns);
  constexpr int kRows = Tile::kQuads ? 2 * Tile::kRows : Tile::kRows;
  return {Tile::kHalves ? Tile::kCluster * tiles : (tiles + 1) / 2 * 2,
          static_cast<unsigned>((p.rows + kRows - 1) / kRows)};
}

template <typename Tile>
cudaError_t start(const LinearParams& p, cudaStream_t stream) {
  const auto inner = static_cast<cuuint64_t>(p.inner), stride = static_cast<cuuint64_t>(p.weight_row);
  constexpr cuuint32_t kRun = Tile::kRun;
  CUtensorMap weight, x;
  if (!encode<5>(&weight, p.weight, {inner, 2, 4, kRun / 8, static_cast<cuuint64_t>(p.columns / kRun)},
                 {stride, kRun / 4 * stride, 2 * stride, kRun * stride}, {kPairStage, 2, 4, kRun / 8, Tile::kBox}) ||
      !encode_rows(&x, p.x, p.rows, p.inner, p.x_row, kPairStage, Tile::kHalves ? Tile::kRows : Tile::kRows / 2))
    return cudaErrorInvalidValue;
  const Launch how{grid_of<Tile>(p), kPairThreads, Tile::kShared, stream, Tile::kCluster};
  if (p.x_scale.stride) return launch(linear_pairs_kernel<Tile, true>, how, p, x, weight);
  return launch(linear_pairs_kernel<Tile, false>, how, p, x, weight);
}

struct Choice {
  int64_t cost = 0;
  cudaError_t (*start)(const LinearParams&, cudaStream_t) = nullptr;
};

// By what the products of all passes over the device take; the larger tile of two alike, which takes in less.
template <typename Tile>
void consider(Choice& best, const LinearParams& p, int processors) {
  const dim3 grid = grid_of<Tile>(p);
  const int64_t room = Tile::kQuads ? processors * 10 / 11 : processors;  // clusters of four leave some idle
  const int64_t passes = (static_cast<int64_t>(grid.x) * grid.y + room - 1) / room;
  const int64_t cost = passes * Tile::kRows * Tile::kColumns / (Tile::kHalves ? 2 : 1);
  if (best.start == nullptr || cost < best.cost) best = {cost, start<Tile>};
}

template <int ROWS, bool HALVES, bool QUADS, int... COLUMNS>
void consider_all(Choice& best, const LinearParams& p, int processors) {
  (consider<PairTile<ROWS, COLUMNS, HALVES, Out, QUADS>>(best, p, processors), ...);
}

}  // namespace

template <>
cudaError_t linear_pairs<Out>(const LinearParams& p, LinearKernel kernel, int processors, cudaStream_t stream) {
  Choice best;
  if constexpr (sizeof(Out) == 1) {
    consider_all<256, false, false, 192, 160, 128, 96>(best, p, processors);
    consider_all<128, false, false, 192, 160, 128, 96>(best, p, processors);
  } else if (kernel == LinearKernel::kQuads) {
    consider_all<128, true, true, 192, 176, 160, 128, 96>(best, p, processors);
  } else if (kernel == LinearKernel::kHalves) {
    consider_all<128, true, false, 192, 160, 128, 96, 64>(best, p, processors);
  } else {
    consider_all<128, false, false, 160, 128, 96>(best, p, processors);
  }
  return best.start(p, stream);
}

}  // namespace quamba
