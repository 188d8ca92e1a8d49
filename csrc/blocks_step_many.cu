// quamba::blocks_step for many sequences: a chain of kernels, each of which asks for its weights or states while those
// before it still run. Nothing in the chain writes what one of them reads so early, and its first kernel starts behind
// the end of all that was before the chain.
#include "blocks_step_many.h"

#include "linear_conv1d_tail.h"
#include "linear_held.h"
#include "ops.h"

namespace quamba {
namespace {

// The convolution's result, and z.
std::pair<Tensor, Tensor> project_and_convolve(const Tensor& u, const Block& block, const Tensor& conv_state,
                                               cudaStream_t stream) {
  const std::vector<OptionalTensor>& t = block.tensors;
  const int64_t inner = t[kBlockConvWeight]->size(0);
  Tensor x = empty(u, {u.size(0), inner}, ScalarType::Char), z = empty(u, {u.size(0), inner}, ScalarType::Char);
  HeldConv tail{};
  set_step(&tail, *t[kBlockConvWeight], t[kBlockConvWeightScale], t[kBlockConvBias], t[kBlockXScale], conv_state, u);
  tail.x = static_cast<int8_t*>(x.data_ptr()), tail.z = static_cast<int8_t*>(z.data_ptr());
  const LinearParams p =
      step_params(u, *t[kBlockUScale], *t[kBlockInWeight], *t[kBlockInWeightScale], t[kBlockInBias], t[kBlockXzScale]);
  check_launch("blocks_step", linear_held(p, tail, stream));
  return {x, z};
}

// first: of the chain.
Tensor step(const Tensor& hidden, const Block& block, ScalarType out_dtype, const Tensor& conv_state,
            const Tensor& ssm_state, bool first) {
  const std::vector<OptionalTensor>& t = block.tensors;
  const std::vector<Tensor>& scales = block.scales;
  const auto given = [&](BlockTensor i) -> const Tensor& { return *t[i]; };
  const int64_t rows = hidden.size(0), states = given(kBlockA).size(1), rank = block.rank;
  const bool rotate = block.flags[kBlockRotate];
  const OptionalTensor none;
  const cudaStream_t stream = stream_of(hidden);
  constexpr ScalarType kInt8 = ScalarType::Char;

  const Tensor u = rms_norm_quant(hidden, t[kBlockNormWeight], given(kBlockUScale), block.floats[kBlockNormEps], first);
  const auto [x, z] = project_and_convolve(u, block, conv_state, stream);
  const Tensor dbc = empty(hidden, {rows, rank + 2 * states}, kInt8);
  LinearParams sums = step_params(x, given(kBlockXInScale), given(kBlockXWeight), given(kBlockXWeightScale), none,
                                t[kBlockDbcScale]);
  sums.out = dbc.data_ptr();
  check_launch("blocks_step", linear_parts(sums, stream));
  Tensor g = selective_scan_dt_step(x, t[kBlockXScanScale], part(dbc, 0, rank), scales[kBlockDScale],
                                    given(kBlockDtWeight), given(kBlockDtWeightScale), t[kBlockDtScale],
                                    given(kBlockDtBias), given(kBlockA), part(dbc, rank, states), scales[kBlockBScale],
                                    part(dbc, rank + states, states), scales[kBlockCScale], given(kBlockD), z,
                                    scales[kBlockZScale], rotate ? none : t[kBlockGScale],
                                    rotate ? ScalarType::Float : kInt8, ssm_state, true);
  if (rotate) g = hadamard_quant(g, given(kBlockGScale));
  const Tensor out = empty(hidden, {rows, hidden.size(1)}, out_dtype);
  LinearParams p =
      step_params(g, given(kBlockGScale), given(kBlockOutWeight), given(kBlockOutWeightScale), t[kBlockOutBias], none);
  p.out_type = type_of(out_dtype, "out_dtype"), p.out = out.data_ptr();
  if (block.flags[kBlockResidual])
    p.residual = {hidden.data_ptr(), type_of(hidden, "hidden")}, p.residual_row = hidden.stride(0);
  check_launch("blocks_step", linear_held(p, stream));
  return out;
}

constexpr int64_t kMostRows = 64;  // of linear_held

// Contiguous int8 rows of a multiple of 16, aligned to 16.
bool in_rows(const Tensor& t) {
  return t.scalar_type() == ScalarType::Char && t.is_contiguous() && t.size(1) % 16 == 0 && aligned(t.data_ptr(), 16);
}

// Contiguous, and aligned as the kernels read it, which is by four elements.
bool in_fours(const OptionalTensor& t) {
  return !t || (t->is_contiguous() && aligned(t->data_ptr(), 16));
}

}  // namespace

bool fits_step_many(const Tensor& hidden, const Block& block, const Tensor& conv_state, const Tensor& ssm_state) {
  const std::vector<OptionalTensor>& t = block.tensors;
  const Tensor& A = *t[kBlockA];
  const int64_t inner = A.size(0), states = A.size(1);
  for (const BlockTensor i : {kBlockInWeight, kBlockXWeight, kBlockDtWeight, kBlockOutWeight})
    if (!in_rows(*t[i])) return false;
  for (const OptionalTensor& tensor : t)
    if (!in_fours(tensor)) return false;
  const bool state = conv_state.dim() == 3 && conv_state.scalar_type() == ScalarType::Char && conv_state.size(2) == 4 &&
                     conv_state.stride(2) == 1 && conv_state.stride(1) == 4 && conv_state.stride(0) % 16 == 0 &&
                     aligned(conv_state.data_ptr(), 16) && ssm_state.dim() == 3 && ssm_state.stride(2) == 1 &&
                     ssm_state.stride(1) == states && ssm_state.stride(0) % 4 == 0 && aligned(ssm_state.data_ptr(), 16);
  return state && !block.flags[kBlockNormDbc] && states == 16 && inner % 16 == 0 &&
         block.rank % 16 == 0 && hidden.size(0) <= kMostRows && hidden.size(1) % 8 == 0 &&
         hidden.stride(1) == 1 && hidden.stride(0) % 4 == 0 && aligned(hidden.data_ptr(), 16) &&
         t[kBlockConvWeight]->size(1) == 4;
}

Tensor blocks_step_many(const Tensor& hidden, const std::vector<int64_t>& blocks, ScalarType out_dtype,
                        const std::vector<Tensor>& conv_states, const std::vector<Tensor>& ssm_states) {
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor stream = hidden;
  for (size_t i = 0; i < blocks.size(); ++i)
    stream = step(stream, *kept_block(blocks[i]), out_dtype, conv_states[i], ssm_states[i], i == 0);
  return stream;
}

}  // namespace quamba
