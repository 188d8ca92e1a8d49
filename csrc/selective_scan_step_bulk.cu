// The step of the scan with bulk copies.
#include "selective_scan_step_bulk.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "quamba/selective_scan_step_bulk.cuh"

namespace quamba {
namespace {

// Up to so many sequences the other kernel is as fast, and what follows it starts earlier.
constexpr int64_t kFewSequences = 32;

// Sequences of a block, for tuning; 0 for the other kernel, -1 where the environment has no wish.
int wanted() {
  const char* const text = std::getenv("QUAMBA_SCAN_STEP");
  return text ? std::clamp(std::atoi(text), 0, kBulkStepSequences) : -1;
}

// Whether the kernel can keep it in 32 bits.
bool narrow(int64_t stride) { return stride >= 0 && stride <= INT32_MAX; }
bool narrow(const Sequence& s) { return narrow(s.batch) && narrow(s.channel); }

template <bool kProduct, bool kUsual, bool kAlone>
cudaError_t start(const ScanParams& p, const DtProduct& product, const BulkStepCut& cut, bool early,
                  cudaStream_t stream) {
  const int64_t channels = 32 * cut.warps;
  const dim3 grid(static_cast<unsigned>((p.channels + channels - 1) / channels),
                  static_cast<unsigned>((p.batch + cut.most - 1) / cut.most));
  const auto kernel = selective_scan_step_bulk_kernel<kProduct, kUsual, kAlone>;
  // For all blocks of a multiprocessor at a time.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                 cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int threads = 32 * (cut.warps + (kAlone ? 1 : 0));
  return launch(kernel, Launch{grid, threads, BulkStepLayout(cut).total, stream}, p, product, cut, early);
}

// Blocks of four warps, of as many sequences as make one wave.
BulkStepCut narrow_cut(const ScanParams& p, int processors) {
  constexpr int64_t kChannels = 32 * kBulkStepWarps;
  const int64_t groups = (p.channels + kChannels - 1) / kChannels;
  const int64_t fit = std::max<int64_t>(processors * kBulkStepBlocks / groups, 1);
  const int64_t parts = std::min(fit, p.batch);
  const int64_t forced = wanted();
  const int64_t share = forced > 0 ? forced : std::min<int64_t>((p.batch + parts - 1) / parts, kBulkStepSequences);
  const int64_t ranges = (p.batch + share - 1) / share;
  return {kBulkStepWarps, static_cast<int>((p.batch + ranges - 1) / ranges), kBulkStepSlots};
}

// Blocks that are alone on a multiprocessor, of as many warps as leave fewest of them idle.
BulkStepCut alone_cut(const ScanParams& p, int processors) {
  const int64_t groups = (p.channels + 31) / 32, most = std::min<int64_t>(p.batch, kBulkStepBatch);
  BulkStepCut best{};
  int64_t best_cost = 0;
  for (int warps = 1; warps <= kBulkStepMostWarps; ++warps) {
    const int64_t blocks = (groups + warps - 1) / warps * ((p.batch + most - 1) / most);
    const int64_t cost = (blocks + processors - 1) / processors * (warps + 2);
    if (best_cost != 0 && cost >= best_cost) continue;
    best = {warps, static_cast<int>(most), kBulkStepAloneSlots}, best_cost = cost;
  }
  return best;
}

}  // namespace

bool takes_bulk_step(const ScanParams& p, const DtProduct& product, int device) {
  const int forced = wanted();
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9 && (forced < 0 ? p.batch > kFewSequences : forced > 0) && p.states == kBulkStepStates &&
         p.state_channel == kBulkStepStates && p.batch <= 65535 && p.channels * kBulkStepStates <= INT32_MAX / 2 &&
         narrow(p.x) && narrow(p.dt) && narrow(p.z) && narrow(p.B) && narrow(p.C) && narrow(p.state_batch) &&
         narrow(p.a_channel) && narrow(product.d_batch) && narrow(product.weight_row);
}

cudaError_t selective_scan_step_bulk(const ScanParams& p, const DtProduct* product, bool early, int processors,
                                     cudaStream_t stream) {
  const auto bytes = [](const Sequence& s) { return s.data == nullptr || s.type == Type::kInt8; };
  const bool usual = bytes(p.x) && bytes(p.dt) && bytes(p.z) && bytes(p.B) && bytes(p.C) &&
                     p.dt_bias.type == Type::kFloat && p.D.type == Type::kFloat;
  const auto run = [&](auto with, auto plain) {
    const DtProduct of = with.value ? *product : DtProduct{};
    if constexpr (with.value && plain.value) {
      if (early && wanted() < 0) return start<true, true, true>(p, of, alone_cut(p, processors), true, stream);
    }
    return start<with.value, plain.value, false>(p, of, narrow_cut(p, processors), early, stream);
  };
  if (product) return usual ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  return usual ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
}

}  // namespace quamba
