// blocks_step for more sequences than mixers_step takes well.
#pragma once

#include "block.h"

namespace quamba {

// Whether blocks_step_many takes such a block, for which `hidden`, (B, E), and its states are.
bool fits_step_many(const Tensor& hidden, const Block& block, const Tensor& conv_state, const Tensor& ssm_state);

// blocks_step, op by op; all blocks fit.
Tensor blocks_step_many(const Tensor& hidden, const std::vector<int64_t>& blocks, ScalarType out_dtype,
                        const std::vector<Tensor>& conv_states, const std::vector<Tensor>& ssm_states);

}  // namespace quamba
