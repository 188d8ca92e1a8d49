// selective_scan: the recurrence over a whole sequence, channel-last.
//
// LANES threads of a warp share a channel, each with STATES of its states in registers; a block covers a few channels
// and walks along the sequence in tiles of 32 steps that are copied ahead into shared memory. A warp treats its part
// of a tile in three phases, each with a mapping of its own:
//   prepare  a lane takes one step of all the warp's channels: dequantization, softplus; (dt, dt x) to shared memory
//   recur    a lane takes its channel and states, and runs through the steps, LANES at a time; a transposing
//            reduction leaves the sum of step j in lane j of the group, which puts it into shared memory
//   finish   a lane takes one step of all the warp's channels again: skip, gate, quantization
// No exponential is computed twice, and one block barrier a tile is all the synchronization between warps.
#pragma once

#include "quamba/selective_scan.cuh"

namespace quamba {

template <int LANES, int STATES, bool kBytes, bool kAsync>
__global__ void __launch_bounds__(kScanThreads) selective_scan_kernel(const ScanParams p) {
  static_assert(LANES % 4 == 0 && kScanTile % LANES == 0, "steps are taken four, and LANES, at a time");
  constexpr int kPadded = LANES * STATES, kChannels = 32 / LANES;
  extern __shared__ __align__(16) char shared[];
  const ScanLayout at(p, kPadded);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = warp * kChannels;  // the warp's first channel in the block
  const int64_t b = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x) * p.block_channels;
  const int valid_channels =
      static_cast<int>(p.channels - c0 < p.block_channels ? p.channels - c0 : p.block_channels);
  float* steps = reinterpret_cast<float*>(shared + at.steps) + first * kStepPitch;
  float* sums = reinterpret_cast<float*>(shared + at.sums) + first * kSumPitch;

  // Preparing and finishing: the warp's channels.
  float xs[kChannels], ds[kChannels], bias[kChannels], zs[kChannels], skip[kChannels], ros[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int64_t c = c0 + (first + i < valid_channels ? first + i : 0);
    xs[i] = p.x.scale.or_one(c), ds[i] = p.dt.scale.or_one(c), zs[i] = p.z.scale.or_one(c);
    bias[i] = p.dt_bias[c], skip[i] = p.D[c];
    ros[i] = reciprocal_approx(p.out_scale.or_one(c));
  }
  // Recurring: the lane's channel (in the low bits, so that lanes that read one address are neighbours) and states.
  const int j = lane / kChannels, mine = lane % kChannels;
  const bool live = first + mine < valid_channels;
  const int64_t channel = c0 + (live ? first + mine : 0);
  float a[STATES], h[STATES];
#pragma unroll
  for (int s = 0; s < STATES; ++s) {
    const int n = j + s * LANES;
    const bool inside = n < p.states;
    a[s] = inside ? p.A[channel * p.a_channel + n * p.a_state] * kLog2E : 0.0f;
    h[s] = inside && p.state ? p.state[b * p.state_batch + channel * p.state_channel + n * p.state_state] : 0.0f;
  }

  float* scales = reinterpret_cast<float*>(shared + at.scales);
  for (int n = threadIdx.x; n < 2 * kPadded; n += blockDim.x) {
    const int state = n % kPadded;
    scales[n] = state < p.states ? (n < kPadded ? p.B.scale : p.C.scale).or_one(state) : 0.0f;
  }

  Stage<kAsync> stage_x(p.x, b, c0, p.block_channels, valid_channels);
  Stage<kAsync> stage_dt(p.dt, b, c0, p.block_channels, valid_channels);
  Stage<kAsync> stage_z(p.z, b, c0, p.block_channels, valid_channels);
  Stage<kAsync> stage_b(p.B, b, 0, p.states, p.states), stage_c(p.C, b, 0, p.states, p.states);
  const int out_size = size_of(p.out_type);
  Share share_out(static_cast<char*>(p.out) + (b * p.length * p.channels + c0) * out_size, p.channels * out_size,
                  out_size, out_size, p.block_channels, valid_channels, kAsync);
  const int tiles = static_cast<int>((p.length + kScanTile - 1) / kScanTile);
  const auto valid_steps = [&](int tile) {
    return tile + 1 < tiles ? kScanTile : static_cast<int>(p.length - static_cast<int64_t>(tile) * kScanTile);
  };
  // These three are called for one tile after the other.
  const auto stage = [&](int tile) {
    if (tile >= tiles) return;
    char* buffer = shared + (tile % 3) * at.buffer;
    const int valid = valid_steps(tile);
    stage_x(buffer + at.x, valid);
    stage_dt(buffer + at.dt, valid);
    if (p.z.data) stage_z(buffer + at.z, valid);
    stage_b(buffer + at.b, valid);
    stage_c(buffer + at.c, valid);
  };
  const auto widen_tile = [&](int tile) {
    if (tile >= tiles) return;
    const char* buffer = shared + (tile % 3) * at.buffer;
    const int side = (tile & 1) * at.narrow;
    widen<kBytes>(reinterpret_cast<float*>(shared + at.bf + side), reinterpret_cast<float*>(shared + at.cf + side),
                  buffer + at.b, buffer + at.c, scales, p, kPadded, valid_steps(tile));
  };
  const auto write_tile = [&](int tile) {
    const char* staged_out = shared + at.out + (tile & 1) * at.out_bytes;
    share_out.next(valid_steps(tile), p.block_channels * out_size, [&](int offset, const char* address) {
      char* to = const_cast<char*>(address);
      if constexpr (kAsync) {
        *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(staged_out + offset);
      } else {
        for (int byte = 0; byte < out_size; ++byte) to[byte] = staged_out[offset + byte];
      }
    });
  };

  stage(0);
  stage(1);
  wait_copies();
  __syncthreads();
  widen_tile(0);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies();
    __syncthreads();  // tiles up to the next are there, and everyone is done with the one before
    stage(tile + 2);
    widen_tile(tile + 1);
    if (tile > 0) write_tile(tile - 1);

    const char* buffer = shared + (tile % 3) * at.buffer;
    const int index = lane * p.block_channels + first;
    float x[kChannels];
    {
      float dt[kChannels];
      staged<kChannels, kBytes>(buffer + at.x, index, p.x.type, x);
      staged<kChannels, kBytes>(buffer + at.dt, index, p.dt.type, dt);
      // Past the end the state must stand still; what was staged there is anything, NaN included.
      const bool inside = lane < valid_steps(tile);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        x[i] *= xs[i];
        const float step = select(inside, softplus(fmaf(dt[i], ds[i], bias[i])), 0.0f);
        reinterpret_cast<float2*>(steps + i * kStepPitch)[lane] =
            make_float2(step, select(inside, step * x[i], 0.0f));
      }
    }
    __syncwarp();

    const float* bf = reinterpret_cast<const float*>(shared + at.bf + (tile & 1) * at.narrow);
    const float* cf = reinterpret_cast<const float*>(shared + at.cf + (tile & 1) * at.narrow);
#pragma unroll
    for (int k0 = 0; k0 < kScanTile; k0 += LANES) {
      float y[LANES];
#pragma unroll
      for (int k = 0; k < LANES; k += 4) {
        const float4* pairs = reinterpret_cast<const float4*>(steps + mine * kStepPitch + 2 * (k0 + k));
        const float4 early = pairs[0], late = pairs[1];
        const float dt[4] = {early.x, early.z, late.x, late.z}, dtx[4] = {early.y, early.w, late.y, late.w};
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
          const int row = (j + s * LANES) * kScanPitch + k0 + k;
          const float4 b4 = *reinterpret_cast<const float4*>(bf + row);
          const float4 c4 = *reinterpret_cast<const float4*>(cf + row);
          const float bs[4] = {b4.x, b4.y, b4.z, b4.w}, cs[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            h[s] = fmaf(exp2_approx(dt[i] * a[s]), h[s], dtx[i] * bs[i]);
            y[k + i] = s == 0 ? h[s] * cs[i] : fmaf(h[s], cs[i], y[k + i]);
          }
        }
      }
#pragma unroll
      for (int half = LANES / 2; half > 0; half /= 2) {
        const bool upper = (j & half) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float keep = upper ? y[i + half] : y[i], send = upper ? y[i] : y[i + half];
          y[i] = keep + __shfl_xor_sync(0xffffffffu, send, half * kChannels);
        }
      }
      sums[mine * kSumPitch + k0 + j] = y[0];
    }
    __syncwarp();

    float z[kChannels], v[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) v[i] = fmaf(skip[i], x[i], sums[i * kSumPitch + lane]);
    if (p.z.data) {
      staged<kChannels, kBytes>(buffer + at.z, index, p.z.type, z);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) v[i] *= silu(z[i] * zs[i]);
    }
    stage_out<kChannels>(shared + at.out + (tile & 1) * at.out_bytes, index, p.out_type, v, ros);
  }
  __syncthreads();
  write_tile(tiles - 1);
  if (p.state && live) {
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
      const int n = j + s * LANES;
      if (n < p.states) p.state[b * p.state_batch + channel * p.state_channel + n * p.state_state] = h[s];
    }
  }
}

}  // namespace quamba
