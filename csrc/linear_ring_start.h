// How the ring kernel of linear is cut for a shape, and its launch.
#pragma once

#include <cstdlib>

#include "quamba/linear_ring.cuh"

namespace quamba {

// Tiles of rows of x from which on 96 columns a block are worth a kernel: two of these are W_x of mamba-2.8b.
constexpr int64_t kManyRowTiles = 5;

struct Cut {
  int tiles, cluster;
};

// The cut by which the busiest multiprocessor has to fetch least.
inline Cut cheapest_ring(const LinearParams& p, int tokens, int processors, int most_clusters) {
  constexpr int64_t kAddingUp = 256;  // what meeting in a cluster costs, in rows of a stage
  const int64_t stages = (p.inner + kRingStage - 1) / kRingStage, row_tiles = (p.rows + tokens - 1) / tokens;
  Cut best{};
  int64_t best_cost = 0;
  for (const int tiles : {5, 2, 8, 6}) {
    if (tiles == 6 && row_tiles < kManyRowTiles) continue;
    for (const int cluster : {1, 2, 4, 8}) {
      if (cluster > stages || cluster > most_clusters) continue;
      const int64_t blocks = (p.columns + 16 * tiles - 1) / (16 * tiles) * cluster * row_tiles;
      const int64_t cost = (blocks + processors - 1) / processors * (16 * tiles + tokens) *
                               ((stages + cluster - 1) / cluster) +
                           (cluster > 1 ? kAddingUp : 0);
      if (best.tiles == 0 || cost < best_cost) best = {tiles, cluster}, best_cost = cost;
    }
  }
  return best;
}

template <int TILES, int TOKENS, typename Tail>
cudaError_t start_ring(const LinearParams& p, int cluster, const Tail& tail, cudaStream_t stream) {
  using R = Ring<TILES, TOKENS>;
  const dim3 grid(static_cast<unsigned>((p.columns + R::kColumns - 1) / R::kColumns * cluster),
                  static_cast<unsigned>((p.rows + TOKENS - 1) / TOKENS));
  static const char* const forced = std::getenv("QUAMBA_RING_AHEAD");  // stages to prefetch, for tuning
  const int ahead = forced ? std::atoi(forced) : R::kStages;
  return launch(linear_ring_kernel<TILES, TOKENS, Tail>, Launch{grid, R::kThreads, R::kShared, stream, cluster}, p,
                cluster, ahead, tail);
}

template <int TOKENS, typename Tail>
cudaError_t start_ring(const LinearParams& p, int processors, int most_clusters, const Tail& tail,
                       cudaStream_t stream) {
  const Cut cut = cheapest_ring(p, TOKENS, processors, most_clusters);
  if (cut.tiles == 2) return start_ring<2, TOKENS>(p, cut.cluster, tail, stream);
  if (cut.tiles == 5) return start_ring<5, TOKENS>(p, cut.cluster, tail, stream);
  if constexpr (TOKENS == 64) {
    if (cut.tiles == 6) return start_ring<6, TOKENS>(p, cut.cluster, tail, stream);
  }
  return start_ring<8, TOKENS>(p, cut.cluster, tail, stream);
}

// Starts the kernel with a tail. most_clusters: blocks that may cut K among them, where the tail's results allow it.
template <typename Tail>
cudaError_t start_ring(const LinearParams& p, int processors, int most_clusters, const Tail& tail,
                       cudaStream_t stream) {
  if (p.rows <= 16) return start_ring<16>(p, processors, most_clusters, tail, stream);
  if (p.rows <= 32) return start_ring<32>(p, processors, most_clusters, tail, stream);
  return start_ring<64>(p, processors, most_clusters, tail, stream);
}

}  // namespace quamba
