// selective_scan of int8 for up to 16 states and a long sequence: time across the lanes.
//
// A warp takes 32 / LANES channels, and a chunk of LANES * kScanSteps steps at a time: each lane owns kScanSteps
// neighbouring steps of one channel, with dt, dt x and y in registers, and goes through the states one by one. A state
// is first run over the lane's own steps from zero; a scan over the lanes, of decayed sums, tells each the state that
// it starts from; then its steps are run again, from the same decays, into y. The reduction over the states never
// leaves a thread, few lanes a channel keep every scheduler equally busy, and a barrier a chunk, for what the warps
// share (the copies, B and C as floats), is all they ever wait for. What is a function of one byte, softplus and the
// gate, is looked up in tables, a pair for each channel.
#pragma once

#include "quamba/selective_scan_copies.cuh"

namespace quamba {

// COUNT results of a lane into its piece of the staged output, `pitch` elements from step to step.
template <typename T, int COUNT, typename F>
__device__ __forceinline__ void stage_results(char* piece, int pitch, const float (&v)[COUNT], F&& convert) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) reinterpret_cast<T*>(piece)[i * pitch] = convert(v[i]);
}

// B and C of a chunk, dequantized, (2 kChunkStates, time); finite past the sequence's end, where dt x is zero. `scales`
// holds kChunkStates of B, then those of C; `between`: bytes from the raw tile of B to that of C.
template <int kLength>
__device__ __forceinline__ void widen_chunk(float* to, const char* raw, int between, const float* scales,
                                            unsigned quads) {
  for (unsigned i = threadIdx.x; i < 2 * kLength * quads; i += blockDim.x) {
    const unsigned side = i / kLength, t = i - side * kLength;
    const bool second = side >= quads;
    const unsigned n = 4 * side + (second ? kChunkStates - 4 * quads : 0);
    const unsigned from = 4 * (t * quads + side) + (second ? between - 4 * quads : 0);
    const float4 scale = *reinterpret_cast<const float4*>(scales + n);
    float v[4];
    unpack_bytes(*reinterpret_cast<const uint32_t*>(raw + from), v);
    float* const row = to + n * kLength + t;
    row[0] = v[0] * scale.x;
    row[kLength] = v[1] * scale.y;
    row[2 * kLength] = v[2] * scale.z;
    row[3 * kLength] = v[3] * scale.w;
  }
}

// A value that the compiler must keep in a register instead of computing it anew in a loop.
__device__ __forceinline__ int kept(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ float kept(float v) {
  asm volatile("" : "+f"(v));
  return v;
}

// A shuffle of a whole warp, without the compiler's precautions for one that might have diverged.
__device__ __forceinline__ float from_lane(float v, int lane) {
  float result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(result) : "f"(v), "r"(lane));
  return result;
}

// A level of the scan over lanes: the lane's sum, and the one `delta` lanes below, if there is such a lane, times the
// product of the decays between.
__device__ __forceinline__ float scan_level(float product, float sum, int delta) {
  asm volatile(
      "{ .reg .pred q; .reg .f32 s;\n"
      " shfl.sync.up.b32 s|q, %0, %2, 0, 0xffffffff;\n"
      " @q fma.rn.f32 %0, %1, s, %0; }"
      : "+f"(sum)
      : "f"(product), "r"(delta));
  return sum;
}

template <int LANES>
__global__ void __launch_bounds__(kChunkThreads, 1)
    selective_scan_chunks_kernel(const __grid_constant__ ScanParams p, const __grid_constant__ ChunkCopies copies) {
  using Layout = ChunkLayout<LANES>;
  constexpr int kChannels = 32 / LANES, kLength = Layout::kLength, kPitch = Layout::kPitch;
  constexpr int kLevels = LANES == 16 ? 4 : 5;  // of the scan over lanes
  extern __shared__ __align__(16) char arena[];
  const Layout at(p);

  // Lanes of the same steps are neighbours: they read the same B and C.
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, k = kept(lane / kChannels);
  const int mine = warp * kChannels + lane % kChannels;
  const bool first = kept(static_cast<int>(k == 0)) != 0;
  const int64_t b = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x) * p.block_channels;
  const int valid_channels =
      static_cast<int>(p.channels - c0 < p.block_channels ? p.channels - c0 : p.block_channels);
  const auto channel_of = [&](int row) { return c0 + (row < valid_channels ? row : 0); };

  float* as = reinterpret_cast<float*>(arena + Layout::kA);
  float* hs = reinterpret_cast<float*>(arena + Layout::kH);
  float* scales = reinterpret_cast<float*>(arena + Layout::kScales);
  float* softplus_table = reinterpret_cast<float*>(arena + at.tables);
  float* gate_table = softplus_table + p.block_channels * 256;
  for (int i = threadIdx.x; i < p.block_channels * p.states; i += blockDim.x) {
    const int row = i / p.states, n = i - row * p.states, to = row * kChunkStates + n;
    const int64_t c = channel_of(row);
    as[to] = p.A[c * p.a_channel + n * p.a_state] * kLog2E;
    hs[to] = p.state ? p.state[b * p.state_batch + c * p.state_channel + n * p.state_state] : 0.0f;
  }
  for (int n = threadIdx.x; n < p.states; n += blockDim.x)
    scales[n] = p.B.scale.or_one(n), scales[kChunkStates + n] = p.C.scale.or_one(n);
  for (int row = warp; row < p.block_channels; row += blockDim.x / 32) {
    const int64_t c = channel_of(row);
    const float scale = p.dt.scale.or_one(c), bias = p.dt_bias[c], z_scale = p.z.scale.or_one(c);
#pragma unroll 4
    for (int i = lane; i < 256; i += 32) {
      const float v = static_cast<float>(static_cast<int8_t>(i));
      softplus_table[row * 256 + i] = softplus(fmaf(v, scale, bias));
      gate_table[row * 256 + i] = p.z.data ? silu(v * z_scale) : 1.0f;
    }
  }

  const int chunks = static_cast<int>((p.length + kLength - 1) / kLength);
  const auto valid_steps = [&](int chunk) {
    return chunk + 1 < chunks ? kLength : static_cast<int>(p.length - static_cast<int64_t>(chunk) * kLength);
  };
  // The inputs from `begin` on, each as many chunks ahead of `now` as it is to be.
  const auto stage = [&](int now, int begin) {
    constexpr int kInputs = ChunkCopies::kInputs;
    const int index = copies.dealt ? warp / kInputs * 32 + lane : static_cast<int>(threadIdx.x);
    for (int i = copies.dealt ? warp % kInputs : 0; i < kInputs; i += copies.dealt ? kInputs : 1) {
      const ChunkCopy& copy = copies.in[i];
      const int chunk = now + copy.ahead;
      if (i < begin || chunk >= chunks || copy.memory == nullptr) continue;
      char* tile = arena + at.raw + (chunk & 1) * at.buffer + copy.tile;
      each_unit(copy, index, chunk, valid_steps(chunk), [&](int offset, char* address) {
        copy.unit == 8 ? copy_pair_async(tile + offset, address) : copy_word_async(tile + offset, address);
      });
    }
  };
  const auto widen = [&](int chunk) {
    if (chunk >= chunks) return;
    widen_chunk<kLength>(reinterpret_cast<float*>(arena + (chunk & 1) * Layout::kNarrow),
                         arena + at.raw + (chunk & 1) * at.buffer + at.b, at.c - at.b, scales, p.states / 4);
  };
  const auto write = [&](int chunk) {
    const char* staged = arena + at.out + (chunk & 1) * at.out_bytes;
    each_unit(copies.out, threadIdx.x, chunk, valid_steps(chunk), [&](int offset, char* address) {
      if (copies.out.unit == 8) {
        *reinterpret_cast<uint2*>(address) = *reinterpret_cast<const uint2*>(staged + offset);
      } else {
        *reinterpret_cast<uint32_t*>(address) = *reinterpret_cast<const uint32_t*>(staged + offset);
      }
    });
  };

  stage(-1, 0);
  stage(-2, ChunkCopies::kFirstNarrow);
  wait_copies();
  __syncthreads();
  widen(0);
  const int64_t channel = channel_of(mine);
  const float x_scale = p.x.scale.or_one(channel), skip = p.D[channel];
  const float reciprocal = reciprocal_approx(p.out_scale.or_one(channel));
  const float *softplus_row = softplus_table + mine * 256, *gate_row = gate_table + mine * 256;
  const int below = kept((lane - kChannels) & 31);

  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies();
    __syncthreads();  // what was asked for is there, and everyone is done with the chunk before
    stage(chunk, 0);
    widen(chunk + 1);
    if (chunk > 0) write(chunk - 1);

    const uint8_t* tile = reinterpret_cast<const uint8_t*>(arena) + at.raw + (chunk & 1) * at.buffer +
                          k * Layout::piece(1) + mine;
    float dt[kScanSteps], dtx[kScanSteps], y[kScanSteps];
#pragma unroll
    for (int i = 0; i < kScanSteps; ++i) dt[i] = softplus_row[tile[at.dt + i * kPitch]];
#pragma unroll
    for (int i = 0; i < kScanSteps; ++i) {
      const float x = byte_to_float<0>(tile[at.x + i * kPitch] ^ 0x80u) * x_scale;
      dtx[i] = dt[i] * x;
      y[i] = skip * x;
    }
    // Past the end the state must stand still.
    const int valid = valid_steps(chunk) - k * kScanSteps;
    if (valid < kScanSteps) {
#pragma unroll
      for (int i = 0; i < kScanSteps; ++i) {
        dt[i] = select(i < valid, dt[i], 0.0f);
        dtx[i] = select(i < valid, dtx[i], 0.0f);
      }
    }
    // dt summed over the lane's steps, and over those of the 2, 4, ... lanes up to it: the logarithms of the products
    // of decays, but for A, which spares the scan over lanes half of its shuffles.
    float totals[kLevels] = {};
#pragma unroll
    for (int i = 0; i < kScanSteps; ++i) totals[0] += dt[i];
#pragma unroll
    for (int level = 1; level < kLevels; ++level)
      totals[level] = totals[level - 1] + from_lane(totals[level - 1], lane - (kChannels << (level - 1)));
#pragma unroll
    for (int level = 0; level < kLevels; ++level) totals[level] = kept(totals[level]);

    const float* narrow = reinterpret_cast<const float*>(arena + (chunk & 1) * Layout::kNarrow) + k * kScanSteps;
    const float* a_row = as + mine * kChunkStates;
#pragma unroll 1
    for (int n = 0; n < p.states; ++n, ++a_row, narrow += kLength) {
      const float a = *a_row;
      float* const h = const_cast<float*>(a_row) + Layout::kRows / 4;
      float before = 0.0f;
      if (first) before = *h;
      float decay[kScanSteps], in[kScanSteps], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kScanSteps; i += 4) {
        const float4 quad = *reinterpret_cast<const float4*>(narrow + i);
        const float bs[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          decay[i + j] = exp2_approx(dt[i + j] * a);
          in[i + j] = dtx[i + j] * bs[j];
          sum = i + j == 0 ? in[0] : fmaf(decay[i + j], sum, in[i + j]);
        }
      }
      float products[kLevels];
#pragma unroll
      for (int level = 0; level < kLevels; ++level) products[level] = exp2_approx(totals[level] * a);
      sum = fmaf(products[0], before, sum);
#pragma unroll
      for (int level = 0; level < kLevels; ++level) sum = scan_level(products[level], sum, kChannels << level);
      // The lane's state at the end goes to the next lane; that of the last, to the first lane's next chunk.
      const float passed = from_lane(sum, below);
      if (first) *h = passed;
      float state = first ? before : passed;
#pragma unroll
      for (int i = 0; i < kScanSteps; i += 4) {
        const float4 quad = *reinterpret_cast<const float4*>(narrow + Layout::kC / 4 + i);
        const float cs[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          state = fmaf(decay[i + j], state, in[i + j]);
          y[i + j] = fmaf(state, cs[j], y[i + j]);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kScanSteps; ++i) y[i] *= gate_row[tile[at.z + i * kPitch]];
    const int out_size = size_of(p.out_type);
    char* piece = arena + at.out + (chunk & 1) * at.out_bytes + k * Layout::piece(out_size) + mine * out_size;
    switch (p.out_type) {
      case Type::kInt8:  // after so many approximations an exact division by the scale has no point
        stage_results<uint8_t>(piece, kPitch, y, [&](float v) { return round_to_byte(v * reciprocal); });
        break;
      case Type::kHalf:
        stage_results<__half>(piece, kPitch, y, [](float v) { return __float2half_rn(v); });
        break;
      case Type::kBFloat16:
        stage_results<__nv_bfloat16>(piece, kPitch, y, [](float v) { return __float2bfloat16_rn(v); });
        break;
      default:
        stage_results<float>(piece, kPitch, y, [](float v) { return v; });
    }
  }
  __syncthreads();
  write(chunks - 1);
  if (p.state) {
    for (int i = threadIdx.x; i < valid_channels * p.states; i += blockDim.x) {
      const int row = i / p.states, n = i - row * p.states;
      p.state[b * p.state_batch + (c0 + row) * p.state_channel + n * p.state_state] = hs[row * kChunkStates + n];
    }
  }
}

}  // namespace quamba
