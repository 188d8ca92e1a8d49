// The arguments that describe a block, kept under a number: passing their thirty tensors through the dispatcher takes
// longer than launching the block's kernels.
#pragma once

#include <memory>

#include "op.h"

namespace quamba {

struct Block {
  // In the order of quamba/ops/mixer_step.py, and as mixers_step takes them.
  std::vector<OptionalTensor> tensors;
  std::vector<double> floats;
  std::vector<int64_t> flags;
  // Of these: R, and parts of xz_scale and dbc_scale.
  int64_t rank = 0;
  std::vector<Tensor> scales;
};

// Places in `tensors`.
enum BlockTensor {
  kBlockNormWeight,
  kBlockUScale,
  kBlockInWeight,
  kBlockInWeightScale,
  kBlockInBias,
  kBlockXzScale,
  kBlockConvWeight,
  kBlockConvWeightScale,
  kBlockConvBias,
  kBlockXScale,
  kBlockXWeight,
  kBlockXWeightScale,
  kBlockXInScale,
  kBlockXScanScale,
  kBlockDNormWeight,
  kBlockBNormWeight,
  kBlockCNormWeight,
  kBlockDbcScale,
  kBlockDtWeight,
  kBlockDtWeightScale,
  kBlockDtScale,
  kBlockDtBias,
  kBlockA,
  kBlockD,
  kBlockGScale,
  kBlockOutWeight,
  kBlockOutWeightScale,
  kBlockOutBias,
  kBlockTensors
};

// In `floats` and `flags`.
enum BlockFloat { kBlockNormEps, kBlockDbcEps, kBlockFloats };
enum BlockFlag { kBlockNormDbc, kBlockRotate, kBlockResidual, kBlockFlags };

// In `scales`.
enum BlockScale { kBlockX0Scale, kBlockZScale, kBlockDScale, kBlockBScale, kBlockCScale };

// The block of that number; raises where none is kept under it.
std::shared_ptr<const Block> kept_block(int64_t number);

}  // namespace quamba
