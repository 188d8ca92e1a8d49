// The kernel of linear for short rows by strips: how it is cut for a shape, and its launch.
#include "linear_strips.h"

#include <algorithm>

#include "linear_short.h"
#include "quamba/linear_strips.cuh"

namespace quamba {
namespace {

struct StripCut {
  int teams, groups;
};

constexpr int kMostShared = 227 * 1024;

// The cut by which the busiest multiprocessor takes least, in cycles: it fetches 64 bytes in one, rescales a team's
// strip in 300 where others fill the gaps, and waits for one in 660 at least.
StripCut cheapest_cut(const LinearParams& p, int steps, int processors) {
  const int64_t strips = p.columns / kStripSide;
  StripCut best{};
  int64_t best_cost = 0;
  for (const int teams : {4, 2}) {
    for (int groups = 1; groups <= kStripGroups; ++groups) {
      if (StripShared(steps, teams, groups).total(groups) > kMostShared) continue;
      const int64_t rows = teams * kStripSide;
      const int64_t blocks = (p.rows + rows - 1) / rows * ((strips + groups - 1) / groups);
      const int64_t cost = (blocks + processors - 1) / processors *
                           ((teams + groups) * p.inner + groups * std::max(300 * teams, 660));
      if (best.teams == 0 || cost < best_cost) best = {teams, groups}, best_cost = cost;
    }
  }
  return best;
}

template <int STEPS>
cudaError_t start(const LinearParams& p, int processors, cudaStream_t stream) {
  const StripCut cut = cheapest_cut(p, STEPS, processors);
  const int64_t rows = cut.teams * kStripSide, columns = cut.groups * kStripSide;
  const dim3 grid(static_cast<unsigned>((p.columns + columns - 1) / columns),
                  static_cast<unsigned>((p.rows + rows - 1) / rows));
  const Launch how{grid, cut.teams * kStripTeamThreads, StripShared(STEPS, cut.teams, cut.groups).total(cut.groups),
                   stream};
  if (p.x_scale.stride) return launch(linear_strips_kernel<STEPS, true>, how, p, cut.groups);
  return launch(linear_strips_kernel<STEPS, false>, how, p, cut.groups);
}

}  // namespace

cudaError_t linear_strips(const LinearParams& p, int processors, cudaStream_t stream) {
  return with_short_steps(p.inner, [&](auto steps) { return start<steps.value>(p, processors, stream); });
}

}  // namespace quamba
