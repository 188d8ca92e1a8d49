// How the bulk kernel of linear is cut for a shape, and its launch.
#pragma once

#include <cstdlib>

#include "quamba/linear_bulk.cuh"
#include "tensor_map.h"

namespace quamba {

struct BulkCut {
  int columns, tokens, cluster;
};

// Rows of x up to which a cut is one of few: 64 rows of x a block, or 128 where there are more. Sequences may take
// either, and 96 columns, too: two of these are W_x of mamba-2.8b.
constexpr int64_t kBulkFew = 128;

// QUAMBA_BULK_COLUMNS, _TOKENS and _CLUSTER force a cut, for tuning, where the shape allows it.
inline int forced_cut(const char* name) {
  const char* const value = std::getenv(name);
  return value ? std::atoi(value) : 0;
}

// The cut by which the busiest multiprocessor has to fetch least, in rows of a stage. sequences: all cuts are there.
inline BulkCut cheapest_bulk(const LinearParams& p, int processors, bool sequences) {
  const int64_t stages = (p.inner + kBulkStage - 1) / kBulkStage;
  const int forced_columns = forced_cut("QUAMBA_BULK_COLUMNS"), forced_cluster = forced_cut("QUAMBA_BULK_CLUSTER"),
            forced_tokens = forced_cut("QUAMBA_BULK_TOKENS");
  const bool any = sequences && p.rows > kBulkFew;
  BulkCut best{};
  int64_t best_cost = 0;
  for (const int columns : {80, 32, 96, 128, 160}) {
    if (forced_columns ? columns != forced_columns || (columns == 96 && !sequences) : columns == 96 && !any) continue;
    for (const int tokens : {64, 128}) {
      if (forced_tokens ? tokens != forced_tokens : !any && tokens != (p.rows <= 64 ? 64 : 128)) continue;
      const int64_t row_tiles = (p.rows + tokens - 1) / tokens;
      for (const int cluster : {1, 2, 4, 8}) {
        if (cluster > stages || (forced_cluster && cluster != forced_cluster)) continue;
        const int64_t blocks = (p.columns + columns - 1) / columns * cluster * row_tiles;
        // Clusters of four and more do not fill a device: they lie within parts of it that are no multiples of them.
        const int64_t at_a_time = cluster <= 2 ? processors : processors * 7 / 8 / cluster * cluster;
        // Meeting in a cluster, and reading its sums: as many bytes as a block has of them, at half the speed.
        const int64_t adding_up = cluster > 1 ? 128 + 4 * columns * tokens / 64 : 0;
        const int64_t cost = (blocks + at_a_time - 1) / at_a_time *
                             ((columns + tokens) * ((stages + cluster - 1) / cluster) + adding_up);
        if (best.columns == 0 || cost < best_cost) best = {columns, tokens, cluster}, best_cost = cost;
      }
    }
  }
  return best;
}

template <int COLUMNS, int TOKENS, typename Tail>
cudaError_t start_bulk(const LinearParams& p, int cluster, const Tail& tail, cudaStream_t stream) {
  using B = Bulk<COLUMNS, TOKENS>;
  CUtensorMap weight, x;
  if (!encode_rows(&weight, p.weight, p.columns, p.inner, p.weight_row, kBulkStage, COLUMNS) ||
      !encode_rows(&x, p.x, p.rows, p.inner, p.x_row, kBulkStage, TOKENS))
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((p.columns + COLUMNS - 1) / COLUMNS * cluster),
                  static_cast<unsigned>((p.rows + TOKENS - 1) / TOKENS));
  static const char* const forced = std::getenv("QUAMBA_RING_AHEAD");  // stages to prefetch, for tuning
  const int ahead = forced ? std::atoi(forced) : B::kStages;
  return launch(linear_bulk_kernel<COLUMNS, TOKENS, Tail>, Launch{grid, kBulkThreads, B::kShared, stream, cluster}, p,
                cluster, ahead, tail, weight, x);
}

template <int TOKENS, typename Tail>
cudaError_t start_bulk(const LinearParams& p, const BulkCut& cut, const Tail& tail, cudaStream_t stream) {
  if (cut.columns == 32) return start_bulk<32, TOKENS>(p, cut.cluster, tail, stream);
  if constexpr (Tail::kSequences) {
    if (cut.columns == 96) return start_bulk<96, TOKENS>(p, cut.cluster, tail, stream);
  }
  if (cut.columns == 80) return start_bulk<80, TOKENS>(p, cut.cluster, tail, stream);
  if (cut.columns == 128) return start_bulk<128, TOKENS>(p, cut.cluster, tail, stream);
  if (cut.columns == 160) return start_bulk<160, TOKENS>(p, cut.cluster, tail, stream);
  return cudaErrorInvalidValue;  // a cut was forced that there is not
}

// Starts the kernel with a tail.
template <typename Tail>
cudaError_t start_bulk(const LinearParams& p, int processors, const Tail& tail, cudaStream_t stream) {
  const BulkCut cut = cheapest_bulk(p, processors, Tail::kSequences);
  if (cut.tokens == 64) return start_bulk<64>(p, cut, tail, stream);
  return start_bulk<128>(p, cut, tail, stream);
}

}  // namespace quamba
