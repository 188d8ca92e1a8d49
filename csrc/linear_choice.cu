#include "linear_choice.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <tuple>

#include "linear_table.h"
#include "op.h"

namespace quamba {
namespace {

struct TileCost {
  LinearKernel kernel;
  int64_t rows, columns;
  double cost;  // of one tile per unit of K, relative: measured rates differ (benchmarks/NOTES.md)
};

constexpr TileCost kTiles[] = {
    {LinearKernel::k128x256, 128, 256, 128 * 256 * 1.00},
    {LinearKernel::k128x192, 128, 192, 128 * 192 * 1.03},
    {LinearKernel::k128x128, 128, 128, 128 * 128 * 1.06},
    {LinearKernel::k64x64, 64, 64, 64 * 64 * 2.80},
};

// The tile whose passes over the device cost least; for few rows, whose time is that of reading the weight, the one
// that gives most blocks.
LinearKernel cheapest_tile(const LinearParams& p, int processors) {
  const bool reading = p.columns < 32768 && p.columns * p.inner < (int64_t{64} << 20);
  if (p.rows <= (reading ? 128 : 64)) return LinearKernel::k64x64;
  double best_cost = 0.0;
  LinearKernel best = LinearKernel::k64x64;
  for (const TileCost& t : kTiles) {
    const int64_t tiles = (p.rows + t.rows - 1) / t.rows * ((p.columns + t.columns - 1) / t.columns);
    const double cost = static_cast<double>((tiles + processors - 1) / processors) * t.cost;
    if (best_cost == 0.0 || cost < best_cost) best_cost = cost, best = t.kernel;
  }
  return best;
}

// benchmarks/tune_linear.py prints what it loses to the fastest on the shapes of the table.
LinearKernel model(const LinearParams& p, const LinearDevice& device) {
  if (p.rows > kFewRows) return cheapest_tile(p, device.processors);
  const bool tiny = p.columns < 128 && p.columns * p.inner < (1 << 18);
  if (p.rows == 1 && (p.columns >= 32768 || tiny)) return LinearKernel::kDot;
  // More warps to a tile where there are few tiles, and each still has something to read.
  const int64_t tiles = (p.columns + 15) / 16;
  if (tiles >= 4 * device.processors || p.inner <= 1024) return LinearKernel::kRows4;
  return 2 * tiles >= device.processors || p.inner <= 2048 ? LinearKernel::kRows8 : LinearKernel::kRows16;
}

// The table's entry for this weight and the next larger number of rows.
const TableEntry* find(const LinearParams& p) {
  const auto key = [](const auto& e) { return std::make_tuple(e.columns, e.inner, e.rows); };
  const TableEntry* end = std::end(kTable);
  const TableEntry* found =
      std::lower_bound(std::begin(kTable), end, key(p), [&](const TableEntry& e, const auto& k) { return key(e) < k; });
  return found != end && found->columns == p.columns && found->inner == p.inner ? found : nullptr;
}

constexpr struct {
  const char* name;
  LinearKernel kernel;
} kNames[] = {{"dot", LinearKernel::kDot},         {"rows4", LinearKernel::kRows4},
              {"rows8", LinearKernel::kRows8},     {"rows16", LinearKernel::kRows16},
              {"ring", LinearKernel::kRing},       {"short", LinearKernel::kShort},
              {"strips", LinearKernel::kStrips},   {"pairs", LinearKernel::kPairs},
              {"halves", LinearKernel::kHalves},   {"quads", LinearKernel::kQuads},
              {"slices", LinearKernel::kSlices},   {"128x256", LinearKernel::k128x256},
              {"128x192", LinearKernel::k128x192}, {"128x128", LinearKernel::k128x128},
              {"64x64", LinearKernel::k64x64},     {"64x80", LinearKernel::k64x80},
              {"128x160", LinearKernel::k128x160}, {"256x192", LinearKernel::k256x192},
              {"128x80", LinearKernel::k128x80},   {"128x96", LinearKernel::k128x96}};

bool takes_short(const LinearParams& p) {
  constexpr int64_t kStride = int64_t{1} << 31;
  return p.out_type == Type::kInt8 && p.bias.data == nullptr && p.residual.data == nullptr && p.inner > 0 &&
         p.inner <= kShortInner && p.columns % 8 == 0 && p.x_row < kStride && p.weight_row < kStride;
}

bool takes_strips(const LinearParams& p) { return takes_short(p) && p.columns % 64 == 0; }

bool takes_pairs(LinearKernel kernel, const LinearParams& p) {
  if (p.bias.data != nullptr || p.inner == 0) return false;
  if (p.out_type == Type::kInt8)
    return kernel == LinearKernel::kPairs && p.residual.data == nullptr && p.columns % 32 == 0;
  return p.out_type == Type::kFloat && p.residual.data != nullptr && p.residual.type == Type::kFloat &&
         p.residual_row % 4 == 0 && aligned(p.residual.data, 16) && p.columns % 16 == 0 &&
         (kernel == LinearKernel::kPairs || p.inner > kPairInner);
}

bool takes_slices(const LinearParams& p) {
  return p.bias.data == nullptr && p.residual.data == nullptr && p.inner > kSliceInner && p.columns % 4 == 0;
}

// Whether a kernel takes that call there.
bool takes(LinearKernel kernel, const LinearParams& p, const LinearDevice& device, bool vectors) {
  if (kernel == LinearKernel::kRing) return device.hopper && vectors && p.rows <= kRingRows;
  if (kernel == LinearKernel::kShort) return device.hopper && vectors && takes_short(p);
  if (kernel == LinearKernel::kStrips) return device.hopper && vectors && takes_strips(p);
  if (kernel == LinearKernel::kSlices) return device.hopper && vectors && takes_slices(p);
  if (is_pairs(kernel)) return device.hopper && vectors && takes_pairs(kernel, p);
  if (kernel == LinearKernel::k64x80 || kernel == LinearKernel::k256x192)
    return device.hopper && p.out_type == Type::kInt8 && p.residual.data == nullptr;
  if (kernel == LinearKernel::k128x80 || kernel == LinearKernel::k128x96)
    return device.hopper && p.residual.data != nullptr && p.out_type == Type::kFloat;
  return is_tile(kernel) || p.rows <= (kernel == LinearKernel::kDot ? 1 : kFewRows);
}

}  // namespace

// Hopper's kernels run on compute capability 9.0 alone. QUAMBA_CUDA_GEMM=sm80 forces the path of older devices.
LinearDevice linear_device(int index) {
  LinearDevice device{};
  cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
#ifdef QUAMBA_SM90
  static const char* const path = std::getenv("QUAMBA_CUDA_GEMM");
  if (path != nullptr && std::strcmp(path, "sm80") == 0) return device;
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  device.hopper = major == 9;
#endif
  return device;
}

LinearKernel choose_kernel(const LinearParams& p, const LinearDevice& device, bool vectors) {
  const LinearKernel modelled = model(p, device);
  const TableEntry* const entry = device.hopper ? find(p) : nullptr;
  const LinearKernel chosen = entry && takes(entry->kernel, p, device, vectors) ? entry->kernel : modelled;
  // Read at every call, so that one process can time them all.
  if (const char* const name = std::getenv("QUAMBA_LINEAR_KERNEL")) {
    for (const auto& known : kNames)
      if (std::strcmp(known.name, name) == 0) return takes(known.kernel, p, device, vectors) ? known.kernel : chosen;
    QUAMBA_CHECK(std::strcmp(name, "model") == 0, "QUAMBA_LINEAR_KERNEL is ", name,
                 "; expected dot, rows4, rows8, rows16, ring, short, strips, pairs, halves, quads, slices, 128x256, "
                 "128x192, 128x128, 64x64, 64x80, 128x160, 256x192, 128x80, 128x96 or model");
    return modelled;
  }
  return chosen;
}

SliceWay forced_slices(const LinearParams& p) {
  const char* const wanted = std::getenv("QUAMBA_LINEAR_SLICES");
  SliceWay way;
  if (wanted == nullptr) return way;
  char rest = 0;
  const bool read = std::sscanf(wanted, "%dx%d%c", &way.slices, &way.rows, &rest) == 2;
  QUAMBA_CHECK(read && is_slice_way(way, p.inner), "QUAMBA_LINEAR_SLICES is ", wanted, " for K=", p.inner,
               "; expected 2 or 4 slices of K, of 128 or more, by rows of x, a multiple of 8 up to 96, as in 4x72");
  return way;
}

}  // namespace quamba
