// quamba::keep_block and quamba::drop_block, the CUDA side of quamba/ops/block.py.
#include "block.h"

#include <map>
#include <mutex>

namespace quamba {
namespace {

struct Kept {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Block>> blocks;
};

Kept& kept() {
  // Never destroyed: at the end of the process torch may be gone before the tensors.
  static Kept* const all = new Kept;
  return *all;
}

void keep_block(int64_t number, const std::vector<OptionalTensor>& tensors, const std::vector<double>& floats,
                const std::vector<int64_t>& flags) {
  QUAMBA_CHECK(tensors.size() == kBlockTensors && floats.size() == kBlockFloats && flags.size() == kBlockFlags,
               "found a block of ", tensors.size(), " tensors, ", floats.size(), " floats and ", flags.size(),
               " flags; expected ", int{kBlockTensors}, ", ", int{kBlockFloats}, " and ", int{kBlockFlags});
  constexpr int kOptional[] = {kBlockInBias,     kBlockConvBias,   kBlockDNormWeight, kBlockBNormWeight,
                               kBlockCNormWeight, kBlockDtScale,   kBlockOutBias};
  for (int i = 0; i < kBlockTensors; ++i)
    QUAMBA_CHECK(tensors[i] || std::find(std::begin(kOptional), std::end(kOptional), i) != std::end(kOptional),
                 "found a block without its tensor number ", i);
  auto block = std::make_shared<Block>();
  // Not copied as a whole: that asks the C++ library for a function that older ones do not have.
  block->tensors.insert(block->tensors.end(), tensors.begin(), tensors.end());
  block->floats.insert(block->floats.end(), floats.begin(), floats.end());
  block->flags.insert(block->flags.end(), flags.begin(), flags.end());
  const Tensor &A = *tensors[kBlockA], &dt_weight = *tensors[kBlockDtWeight], &xz_scale = *tensors[kBlockXzScale],
               &dbc_scale = *tensors[kBlockDbcScale];
  QUAMBA_CHECK(A.dim() == 2 && dt_weight.dim() == 2, "A has shape ", shape_of(A), " and dt_weight ",
               shape_of(dt_weight), "; expected (D, N) and (D, R)");
  const int64_t inner = A.size(0), states = A.size(1), rank = dt_weight.size(1);
  QUAMBA_CHECK(xz_scale.dim() == 1 && xz_scale.size(0) == 2 * inner && dbc_scale.dim() == 1 &&
                   dbc_scale.size(0) == rank + 2 * states,
               "xz_scale has shape ", shape_of(xz_scale), " and dbc_scale ", shape_of(dbc_scale), "; expected (",
               2 * inner, ",) and (", rank + 2 * states, ",)");
  const Tensor &in_weight = *tensors[kBlockInWeight], &x_weight = *tensors[kBlockXWeight];
  QUAMBA_CHECK(in_weight.size(0) == 2 * inner && x_weight.size(0) == rank + 2 * states, "in_weight has shape ",
               shape_of(in_weight), " and x_weight ", shape_of(x_weight), "; expected (", 2 * inner, ", E) and (",
               rank + 2 * states, ", D)");
  block->rank = rank;
  for (const Tensor& scale : {part(xz_scale, 0, inner), part(xz_scale, inner, inner), part(dbc_scale, 0, 1),
                              part(dbc_scale, rank, states), part(dbc_scale, rank + states, states)})
    block->scales.push_back(scale);
  const std::lock_guard<std::mutex> lock(kept().mutex);
  kept().blocks[number] = std::move(block);
}

void drop_block(int64_t number) {
  std::shared_ptr<const Block> last;  // whose tensors are freed after the lock
  const std::lock_guard<std::mutex> lock(kept().mutex);
  const auto found = kept().blocks.find(number);
  if (found == kept().blocks.end()) return;
  last = std::move(found->second);
  kept().blocks.erase(found);
}

}  // namespace

std::shared_ptr<const Block> kept_block(int64_t number) {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  const auto found = kept().blocks.find(number);
  QUAMBA_CHECK(found != kept().blocks.end(), "found no block number ", number,
               " on CUDA; expected the number of a quamba.ops.Block that is alive and on a CUDA device");
  return found->second;
}

}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CompositeExplicitAutograd, m) {
  m.impl("keep_block", TORCH_BOX(&quamba::keep_block));
  m.impl("drop_block", TORCH_BOX(&quamba::drop_block));
}
