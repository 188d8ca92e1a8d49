// The kernel of linear by slices of K: how it is cut for a shape, and its launch.
#include "linear_slices.h"

#include <algorithm>
#include <type_traits>

#include "linear_choice.h"
#include "quamba/linear_slices.cuh"
#include "tensor_map.h"

namespace quamba {
namespace {

static_assert(kSliceStage == kSliceInner, "two slices are two stages at least");
constexpr int kMostShared = 227 * 1024;
static_assert(SliceCut{kSliceMostRows, kSliceMostColumns, 2}.shared(2) <= kMostShared &&
                  SliceCut{kSliceMostRows, kSliceMostColumns, 2}.shared(4) <= kMostShared,
              "there is room for two stages of any cut");

template <int ROWS, int SLICES>
cudaError_t start(const LinearParams& p, const SliceCut& cut, cudaStream_t stream) {
  CUtensorMap x, weight;
  if (!encode_rows(&x, p.x, p.rows, p.inner, p.x_row, kSliceStage, cut.rows) ||
      !encode_rows(&weight, p.weight, p.columns, p.inner, p.weight_row, kSliceStage, cut.columns))
    return cudaErrorInvalidValue;
  const dim3 grid(SLICES, static_cast<unsigned>((p.rows + cut.rows - 1) / cut.rows),
                  static_cast<unsigned>((p.columns + cut.columns - 1) / cut.columns));
  const Launch how{grid, cut.threads(), cut.shared(SLICES), stream, SLICES};
  const auto run = [&](auto bytes, auto per_row) {
    return launch(linear_slices_kernel<ROWS, SLICES, bytes.value, per_row.value>, how, p, cut, x, weight);
  };
  using std::false_type, std::true_type;
  const bool bytes = p.out_type == Type::kInt8;
  if (p.x_scale.stride) return bytes ? run(true_type{}, true_type{}) : run(false_type{}, true_type{});
  return bytes ? run(true_type{}, false_type{}) : run(false_type{}, false_type{});
}

template <int SLICES>
cudaError_t start(const LinearParams& p, const SliceCut& cut, cudaStream_t stream) {
  if (cut.rows <= 16) return start<16, SLICES>(p, cut, stream);
  if (cut.rows <= 32) return start<32, SLICES>(p, cut, stream);
  if (cut.rows <= 48) return start<48, SLICES>(p, cut, stream);
  if (cut.rows <= 64) return start<64, SLICES>(p, cut, stream);
  if (cut.rows <= 80) return start<80, SLICES>(p, cut, stream);
  return start<96, SLICES>(p, cut, stream);
}

cudaError_t start(const LinearParams& p, const SliceCut& cut, int slices, cudaStream_t stream) {
  return slices == 2 ? start<2>(p, cut, stream) : start<4>(p, cut, stream);
}

// The cut for so many rows of x: as many stages as there is room for, and as a block has.
SliceCut cut_of(const LinearParams& p, int slices, int rows) {
  const int tiles = static_cast<int>((p.columns + kSliceMostColumns - 1) / kSliceMostColumns);
  const int columns = static_cast<int>((p.columns + tiles - 1) / tiles + 7) / 8 * 8;
  const int all = static_cast<int>((p.inner + kSliceStage - 1) / kSliceStage), own = (all + slices - 1) / slices;
  SliceCut cut{rows, columns, std::min(kSliceMostStages, own)};
  while (cut.shared(slices) > kMostShared) --cut.stages;
  return cut;
}

// The way by which the busiest multiprocessor takes least, in cycles: in one it takes in 60 bytes and sends 28 to
// others of its cluster; 64 columns by one row by a stage of K are multiplied in two, and eight rows' results done in
// 200. Each pass of clusters takes 2000 to begin, and each slice 150 to meet. Clusters of four leave a part of the
// device idle.
SliceWay cheapest_way(const LinearParams& p, int processors) {
  SliceWay best{};
  int64_t best_cost = 0;
  for (const int slices : {2, 4}) {
    for (int rows = 8; rows <= kSliceMostRows; rows += 8) {
      if (!is_slice_way({slices, rows}, p.inner)) continue;
      const SliceCut cut = cut_of(p, slices, rows);
      const int64_t all = (p.inner + kSliceStage - 1) / kSliceStage, own = (all + slices - 1) / slices;
      const int64_t clusters = (p.rows + rows - 1) / rows * ((p.columns + cut.columns - 1) / cut.columns);
      const int64_t room = std::max(slices == 2 ? processors / 2 : processors * 10 / 44, 1);
      const int64_t stage = std::max<int64_t>(cut.stage() / 60, 2 * rows * cut.groups());
      const int64_t sends = static_cast<int64_t>(rows) * cut.columns * 4 * (slices - 1) / slices;
      const int64_t cost = (clusters + room - 1) / room *
                           (2000 + own * stage + sends / 28 + 200 * cut.shares(slices) + 150 * slices);
      if (best.rows == 0 || cost < best_cost) best = {slices, rows}, best_cost = cost;
    }
  }
  return best;
}

}  // namespace

bool is_slice_way(const SliceWay& way, int64_t inner) {
  return (way.slices == 2 || way.slices == 4) && way.rows >= 8 && way.rows <= kSliceMostRows && way.rows % 8 == 0 &&
         inner > (way.slices - 1) * kSliceStage;
}

cudaError_t linear_slices(const LinearParams& p, SliceWay way, int processors, cudaStream_t stream) {
  if (way.rows == 0) way = cheapest_way(p, processors);
  return start(p, cut_of(p, way.slices, way.rows), way.slices, stream);
}

}  // namespace quamba
