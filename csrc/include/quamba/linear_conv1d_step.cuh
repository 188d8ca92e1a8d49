// linear_conv1d_step: the ring kernel of linear, whose blocks also do the convolution's step for the columns that are
// channels of x0: a block has a column's results of all its sequences, and so owns the channel's states.
#pragma once

#include "quamba/causal_conv1d_step.cuh"
#include "quamba/linear_conv1d_tail.cuh"
#include "quamba/linear_ring.cuh"

namespace quamba {

struct RingConv : LinearConv1dStep {
  int64_t z_row;

  __device__ __forceinline__ void near(const LinearParams& p, int64_t m, int64_t n, int columns) const {
    if (m >= p.rows || n >= channels) return;
    prefetch(state + m * state_batch + 4 * n,
             static_cast<uint32_t>(4 * (channels - n < columns ? channels - n : columns)));
  }

  template <int ROUNDS, typename Sums>
  __device__ __forceinline__ void operator()(const LinearParams& p, Sums&& sums, int first, int step, int end,
                                             int64_t m0, int64_t n) const {
    const bool is_x = n < channels;
    int8_t* const states = state + 4 * n;
    // All states are asked for before the first is used.
    uint4 words[ROUNDS] = {};
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int m = first + i * step;
      if (is_x && m < end && m0 + m < p.rows)
        words[i] = *reinterpret_cast<const uint4*>(states + (m0 + m) * state_batch);
    }
    const RingColumns columns(p, n);
    const ConvColumns conv(weight, weight_scale, bias, p.out_scale, out_scale, is_x ? n : 0);
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int m = first + i * step;
      if (m >= end || m0 + m >= p.rows) return;
      int8_t values[4];
      columns.rescale(p, sums(m), m0 + m, n, values);
      const uint32_t word = pack_bytes(values[0], values[1], values[2], values[3]);
      if (!is_x) {
        *reinterpret_cast<uint32_t*>(z + (m0 + m) * z_row + n - channels) = word;
        continue;
      }
      const uint4 next = ConvColumns::shifted(words[i], word);
      *reinterpret_cast<uint4*>(states + (m0 + m) * state_batch) = next;
      float y[4];
      conv.apply(next, y);
      conv.store(y, x + (m0 + m) * channels + n);
    }
  }
};

}  // namespace quamba
