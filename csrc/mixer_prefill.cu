// quamba::mixer_prefill on CUDA: the ops of a block one after the other, without Python and the dispatcher between
// them. What they take on the host, not on the device, is what short sequences wait for.
#include "block.h"
#include "ops.h"

namespace quamba {
namespace {

Tensor mixer_prefill(const Tensor& hidden, int64_t block, ScalarType wide_dtype, ScalarType out_dtype,
                     const OptionalTensor& mask, const OptionalTensor& conv_state, const OptionalTensor& ssm_state) {
  QUAMBA_CHECK(hidden.dim() == 3, "hidden has shape ", shape_of(hidden), "; expected (B, L, E)");
  const std::shared_ptr<const Block> kept = kept_block(block);
  const std::vector<OptionalTensor>& t = kept->tensors;
  const std::vector<Tensor>& scales = kept->scales;
  const auto given = [&](BlockTensor i) -> const Tensor& { return *t[i]; };
  const int64_t inner = given(kBlockA).size(0), states = given(kBlockA).size(1), rank = kept->rank;
  const bool norm_dbc = kept->flags[kBlockNormDbc], rotate = kept->flags[kBlockRotate];
  constexpr ScalarType kInt8 = ScalarType::Char;
  const OptionalTensor none;

  const Tensor u = rms_norm_quant(hidden, t[kBlockNormWeight], given(kBlockUScale), kept->floats[kBlockNormEps]);
  const Tensor xz = linear(u, given(kBlockUScale), given(kBlockInWeight), given(kBlockInWeightScale), t[kBlockInBias],
                           none, t[kBlockXzScale], kInt8);
  const Tensor x = causal_conv1d(part(xz, 0, inner), scales[kBlockX0Scale], given(kBlockConvWeight),
                                 t[kBlockConvWeightScale], t[kBlockConvBias], t[kBlockXScale], kInt8, mask, conv_state);

  const Tensor dbc = linear(x, given(kBlockXInScale), given(kBlockXWeight), given(kBlockXWeightScale), none, none,
                            norm_dbc ? none : t[kBlockDbcScale], norm_dbc ? wide_dtype : kInt8);
  Tensor d = part(dbc, 0, rank), B = part(dbc, rank, states), C = part(dbc, rank + states, states);
  if (norm_dbc) {
    const double eps = kept->floats[kBlockDbcEps];
    d = rms_norm_quant(d, t[kBlockDNormWeight], scales[kBlockDScale], eps);
    B = rms_norm_quant(B, t[kBlockBNormWeight], scales[kBlockBScale], eps);
    C = rms_norm_quant(C, t[kBlockCNormWeight], scales[kBlockCScale], eps);
  }
  const OptionalTensor& dt_scale = t[kBlockDtScale];
  const Tensor dt = linear(d, scales[kBlockDScale], given(kBlockDtWeight), given(kBlockDtWeightScale), none, none,
                           dt_scale, dt_scale ? kInt8 : wide_dtype);

  Tensor g = selective_scan(x, t[kBlockXScanScale], dt, dt_scale, given(kBlockDtBias), given(kBlockA), B,
                            scales[kBlockBScale], C, scales[kBlockCScale], given(kBlockD), part(xz, inner, inner),
                            scales[kBlockZScale], rotate ? none : t[kBlockGScale], rotate ? wide_dtype : kInt8,
                            ssm_state);
  if (rotate) g = hadamard_quant(g, given(kBlockGScale));
  const OptionalTensor left = kept->flags[kBlockResidual] ? OptionalTensor(hidden) : none;
  return linear(g, given(kBlockGScale), given(kBlockOutWeight), given(kBlockOutWeightScale), t[kBlockOutBias], left,
                none, out_dtype);
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("mixer_prefill", TORCH_BOX(&quamba::mixer_prefill)); }
