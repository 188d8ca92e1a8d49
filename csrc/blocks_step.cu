// quamba::blocks_step on CUDA: mixers_step for kept blocks, or beyond its sequences a chain of the ops' kernels.
#include "block.h"
#include "blocks_step_many.h"
#include "ops.h"

namespace quamba {
namespace {

// Sequences up to which mixers_step is the faster one (benchmarks/NOTES.md).
constexpr int64_t kMostTogether = 16;

Tensor blocks_step(const Tensor& hidden, const std::vector<int64_t>& blocks, ScalarType out_dtype,
                   const std::vector<Tensor>& conv_states, const std::vector<Tensor>& ssm_states) {
  if (hidden.dim() == 2 && hidden.size(0) > kMostTogether && blocks.size() == conv_states.size() &&
      blocks.size() == ssm_states.size()) {
    bool fit = true;
    for (size_t i = 0; i < blocks.size() && fit; ++i)
      fit = fits_step_many(hidden, *kept_block(blocks[i]), conv_states[i], ssm_states[i]);
    if (fit) return blocks_step_many(hidden, blocks, out_dtype, conv_states, ssm_states);
  }
  std::vector<OptionalTensor> tensors;
  std::vector<double> floats;
  std::vector<int64_t> flags;
  tensors.reserve(blocks.size() * kBlockTensors);
  for (const int64_t number : blocks) {
    const std::shared_ptr<const Block> block = kept_block(number);
    tensors.insert(tensors.end(), block->tensors.begin(), block->tensors.end());
    floats.insert(floats.end(), block->floats.begin(), block->floats.end());
    flags.insert(flags.end(), block->flags.begin(), block->flags.end());
  }
  return mixers_step(hidden, tensors, floats, flags, out_dtype, conv_states, ssm_states);
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("blocks_step", TORCH_BOX(&quamba::blocks_step)); }
