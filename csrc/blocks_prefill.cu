// quamba::blocks_prefill on CUDA: the ops of every block one after the other, without Python and the dispatcher
// between them. What they take on the host, not on the device, is what short sequences wait for.
#include "block.h"
#include "ops.h"

namespace quamba {
namespace {

constexpr int64_t kPlaceUnit = 512;  // bytes: what torch's own allocations are aligned to

struct Place {
  int64_t offset, bytes;
};

// `own`: hidden may be overwritten, and the residual stream stays where it is: less for the second-level cache to hold.
Tensor prefill(const Tensor& hidden, bool own, const Block& block, ScalarType wide_dtype, ScalarType out_dtype,
               const OptionalTensor& mask, const OptionalTensor& conv_state, const OptionalTensor& ssm_state,
               OptionalTensor* pool) {
  const std::vector<OptionalTensor>& t = block.tensors;
  const std::vector<Tensor>& scales = block.scales;
  const auto given = [&](BlockTensor i) -> const Tensor& { return *t[i]; };
  const int64_t inner = given(kBlockA).size(0), states = given(kBlockA).size(1), rank = block.rank;
  const bool norm_dbc = block.flags[kBlockNormDbc], rotate = block.flags[kBlockRotate];
  constexpr ScalarType kInt8 = ScalarType::Char;
  const OptionalTensor none;
  const OptionalTensor& dt_scale = t[kBlockDtScale];

  // What lies between the ops, in one allocation. u is done with when g comes, and so is x when the rotated g does.
  const int64_t rows = hidden.size(0) * hidden.size(1), sums = rank + 2 * states;
  const int64_t wide = size_of(type_of(wide_dtype, "wide_dtype"));
  int64_t total = 0;
  const auto place = [&total](int64_t bytes) {
    const int64_t offset = total;
    total += (bytes + kPlaceUnit - 1) / kPlaceUnit * kPlaceUnit;
    return Place{offset, bytes};
  };
  const Place xz_place = place(2 * rows * inner), x_place = place(rows * inner),
              dbc_place = place(rows * sums * (norm_dbc ? wide : 1)),
              dt_place = place(rows * inner * (dt_scale ? 1 : wide)),
              g_place = place(rows * std::max(inner * (rotate ? wide : 1), hidden.size(2)));
  if (!*pool || (*pool)->numel() < total) *pool = empty(hidden, {total}, kInt8);
  const auto at = [pool](const Place& p) { return Placed(**pool, p.offset, p.bytes); };

  const Tensor u = [&] {
    const Placed placed = at(g_place);
    return rms_norm_quant(hidden, t[kBlockNormWeight], given(kBlockUScale), block.floats[kBlockNormEps]);
  }();
  const Tensor xz = [&] {
    const Placed placed = at(xz_place);
    return linear(u, given(kBlockUScale), given(kBlockInWeight), given(kBlockInWeightScale), t[kBlockInBias], none,
                  t[kBlockXzScale], kInt8);
  }();
  const Tensor x = [&] {
    const Placed placed = at(x_place);
    return causal_conv1d(part(xz, 0, inner), scales[kBlockX0Scale], given(kBlockConvWeight), t[kBlockConvWeightScale],
                         t[kBlockConvBias], t[kBlockXScale], kInt8, mask, conv_state);
  }();

  const Tensor dbc = [&] {
    const Placed placed = at(dbc_place);
    return linear(x, given(kBlockXInScale), given(kBlockXWeight), given(kBlockXWeightScale), none, none,
                  norm_dbc ? none : t[kBlockDbcScale], norm_dbc ? wide_dtype : kInt8);
  }();
  Tensor d = part(dbc, 0, rank), B = part(dbc, rank, states), C = part(dbc, rank + states, states);
  if (norm_dbc) {
    const double eps = block.floats[kBlockDbcEps];
    d = rms_norm_quant(d, t[kBlockDNormWeight], scales[kBlockDScale], eps);
    B = rms_norm_quant(B, t[kBlockBNormWeight], scales[kBlockBScale], eps);
    C = rms_norm_quant(C, t[kBlockCNormWeight], scales[kBlockCScale], eps);
  }
  const Tensor dt = [&] {
    const Placed placed = at(dt_place);
    return linear(d, scales[kBlockDScale], given(kBlockDtWeight), given(kBlockDtWeightScale), none, none, dt_scale,
                  dt_scale ? kInt8 : wide_dtype);
  }();

  Tensor g = [&] {
    const Placed placed = at(g_place);
    return selective_scan(x, t[kBlockXScanScale], dt, dt_scale, given(kBlockDtBias), given(kBlockA), B,
                          scales[kBlockBScale], C, scales[kBlockCScale], given(kBlockD), part(xz, inner, inner),
                          scales[kBlockZScale], rotate ? none : t[kBlockGScale], rotate ? wide_dtype : kInt8,
                          ssm_state);
  }();
  if (rotate) {
    const Placed placed = at(x_place);
    g = hadamard_quant(g, given(kBlockGScale));
  }
  const OptionalTensor left = block.flags[kBlockResidual] ? OptionalTensor(hidden) : none;
  const bool over = own && left && hidden.scalar_type() == out_dtype;
  const Placed placed(hidden, 0, over ? hidden.numel() * size_of(type_of(out_dtype, "out_dtype")) : 0);
  return linear(g, given(kBlockGScale), given(kBlockOutWeight), given(kBlockOutWeightScale), t[kBlockOutBias], left,
                none, out_dtype);
}

// The state of block i, or none where no states are given.
OptionalTensor state_of(const std::vector<Tensor>& states, size_t i) {
  return states.empty() ? OptionalTensor() : OptionalTensor(states[i]);
}

Tensor blocks_prefill(const Tensor& hidden, const std::vector<int64_t>& blocks, ScalarType wide_dtype,
                      ScalarType out_dtype, const OptionalTensor& mask, const std::vector<Tensor>& conv_states,
                      const std::vector<Tensor>& ssm_states) {
  QUAMBA_CHECK(hidden.dim() == 3, "hidden has shape ", shape_of(hidden), "; expected (B, L, E)");
  const auto fits = [&](const std::vector<Tensor>& states) { return states.empty() || states.size() == blocks.size(); };
  QUAMBA_CHECK(!blocks.empty() && fits(conv_states) && fits(ssm_states), "blocks_prefill: found ", blocks.size(),
               " blocks with ", conv_states.size(), " and ", ssm_states.size(),
               " states; expected at least one block, and a state of a kind for each or for none");
  OptionalTensor pool, padding = mask;
  if (mask && mask->scalar_type() != ScalarType::Bool) padding = torch::stable::to(*mask, ScalarType::Bool);
  Tensor stream = hidden;
  for (size_t i = 0; i < blocks.size(); ++i)
    stream = prefill(stream, i > 0, *kept_block(blocks[i]), wide_dtype, out_dtype, padding, state_of(conv_states, i),
                     state_of(ssm_states, i), &pool);
  return stream;
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("blocks_prefill", TORCH_BOX(&quamba::blocks_prefill)); }
