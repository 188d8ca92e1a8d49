// selective_scan: the recurrence over a whole sequence, channel-last.
//
// LANES neighbouring threads share a channel, each with STATES of its states in registers; a block covers a few
// channels and walks along the sequence in tiles of kScanTile steps that are copied ahead into shared memory. Within
// a tile a group takes LANES steps at a time: its lane j prepares step j (dequantization, softplus), all lanes run
// the recurrence for those steps, and a transposing reduction leaves the output of step j in lane j again, which
// applies skip, gate and quantization. No exponential is computed twice.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kScanTile = 32;
constexpr int kScanPitch = kScanTile + 4;  // floats a row of B or C takes: 16-byte aligned, on distinct banks

// A (B, L, D or N) tensor of a type known at run time, strides in elements.
struct Sequence {
  const void* data = nullptr;
  Type type = Type::kFloat;
  int64_t batch = 0, time = 0, channel = 0;
  Scale scale;
};

struct ScanParams {
  int64_t batch, length, channels;
  int states;
  int block_channels;
  Sequence x, dt, B, C, z;
  AnyVector dt_bias, D;
  const float* A;  // (D, N)
  int64_t a_channel, a_state;
  Scale out_scale;
  Type out_type;
  void* out;  // (B, L, D), contiguous
  float* state;  // (B, D, N) or none
  int64_t state_batch, state_channel, state_state;
};

__device__ __forceinline__ void copy_word_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global));
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One element of a staged tile.
template <bool kBytes>
__device__ __forceinline__ float staged(const char* tile, int index, Type type) {
  if constexpr (kBytes) {
    const uint32_t byte = reinterpret_cast<const uint8_t*>(tile)[index];
    return __uint_as_float((byte ^ 0x80u) | 0x4b000000u) - 8388736.0f;
  } else {
    return AnyVector{tile, type}[index];
  }
}

// Where the parts of a block's shared memory begin, in bytes; the host asks for `total`.
struct ScanLayout {
  int x, dt, z, b, c;  // raw tiles, within one of two buffers
  int buffer;          // size of one buffer
  int bf, cf, steps, out, total;

  __host__ __device__ ScanLayout(const ScanParams& p, int lanes, int padded_states) {
    const int row = kScanTile * p.block_channels, narrow = kScanTile * p.states;
    x = 0;
    dt = x + row * size_of(p.x.type);
    z = dt + row * size_of(p.dt.type);
    b = z + (p.z.data ? row * size_of(p.z.type) : 0);
    c = b + round16(narrow * size_of(p.B.type));
    buffer = c + round16(narrow * size_of(p.C.type));
    bf = 2 * buffer;
    cf = bf + padded_states * kScanPitch * 4;
    steps = cf + padded_states * kScanPitch * 4;
    out = steps + 2 * p.block_channels * step_pitch(lanes) * 4;
    total = out + row * size_of(p.out_type);
  }
  __host__ __device__ static int round16(int v) { return (v + 15) / 16 * 16; }
  __host__ __device__ static constexpr int step_pitch(int lanes) { return 2 * lanes + 4; }
};

// Copies rows [0, valid) of `width` channels of a sequence into shared memory.
template <bool kAsync>
__device__ __forceinline__ void stage(char* tile, const Sequence& s, int64_t b, int64_t t0, int valid, int64_t c0,
                                      int width, int valid_width) {
  const int size = size_of(s.type);
  const char* source = static_cast<const char*>(s.data) + (b * s.batch + t0 * s.time + c0 * s.channel) * size;
  if constexpr (kAsync) {
    const int words = width * size / 4, valid_words = valid_width * size / 4;
    for (int i = threadIdx.x; i < valid * words; i += blockDim.x) {
      const int t = i / words, w = i - t * words;
      if (w < valid_words) copy_word_async(tile + 4 * i, source + t * s.time * size + 4 * w);
    }
  } else {
    for (int i = threadIdx.x; i < valid * width; i += blockDim.x) {
      const int t = i / width, w = i - t * width;
      if (w >= valid_width) continue;
      const char* from = source + (t * s.time + w * s.channel) * size;
      for (int byte = 0; byte < size; ++byte) tile[i * size + byte] = from[byte];
    }
  }
}

// B or C as floats, (states, time), dequantized; zero past the sequence's end and past the last state.
template <bool kBytes>
__device__ __forceinline__ void widen(float* to, const char* tile, const Sequence& s, int states, int padded_states,
                                      int valid) {
  if (kBytes && states == padded_states) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(tile);
    for (int i = threadIdx.x; i < kScanTile * states / 4; i += blockDim.x) {
      const int t = i % kScanTile, w = i / kScanTile;
      float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (t < valid) unpack_bytes(words[t * (states / 4) + w], v);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[(4 * w + k) * kScanPitch + t] = v[k] * s.scale.or_one(4 * w + k);
    }
  } else {
    for (int i = threadIdx.x; i < kScanTile * padded_states; i += blockDim.x) {
      const int t = i % kScanTile, n = i / kScanTile;
      const bool inside = t < valid && n < states;
      to[n * kScanPitch + t] = inside ? staged<false>(tile, t * states + n, s.type) * s.scale.or_one(n) : 0.0f;
    }
  }
}

template <bool kAsync>
__device__ __forceinline__ void stage_all(char* buffer, const ScanLayout& at, const ScanParams& p, int64_t b,
                                          int64_t t0, int64_t c0, int valid_channels) {
  const int valid = static_cast<int>(p.length - t0 < kScanTile ? p.length - t0 : kScanTile);
  stage<kAsync>(buffer + at.x, p.x, b, t0, valid, c0, p.block_channels, valid_channels);
  stage<kAsync>(buffer + at.dt, p.dt, b, t0, valid, c0, p.block_channels, valid_channels);
  if (p.z.data) stage<kAsync>(buffer + at.z, p.z, b, t0, valid, c0, p.block_channels, valid_channels);
  stage<kAsync>(buffer + at.b, p.B, b, t0, valid, 0, p.states, p.states);
  stage<kAsync>(buffer + at.c, p.C, b, t0, valid, 0, p.states, p.states);
}

__device__ __forceinline__ void write_out(const char* tile, const ScanParams& p, int64_t b, int64_t t0, int64_t c0,
                                          int valid_channels, bool words_allowed) {
  const int size = size_of(p.out_type);
  const int valid = static_cast<int>(p.length - t0 < kScanTile ? p.length - t0 : kScanTile);
  char* to = static_cast<char*>(p.out) + ((b * p.length + t0) * p.channels + c0) * size;
  const int unit = words_allowed ? 4 : 1;
  const int units = p.block_channels * size / unit, valid_units = valid_channels * size / unit;
  for (int i = threadIdx.x; i < valid * units; i += blockDim.x) {
    const int t = i / units, u = i - t * units;
    if (u >= valid_units) continue;
    char* address = to + t * p.channels * size + u * unit;
    if (words_allowed) {
      *reinterpret_cast<uint32_t*>(address) = reinterpret_cast<const uint32_t*>(tile)[i];
    } else {
      *address = tile[i];
    }
  }
}

template <int LANES, int STATES, bool kBytes, bool kAsync>
__global__ void __launch_bounds__(512) selective_scan_kernel(const ScanParams p) {
  static_assert(LANES % 4 == 0, "steps are taken four at a time");
  constexpr int kPadded = LANES * STATES, kPerWarp = 32 / LANES;
  extern __shared__ __align__(16) char shared[];
  const ScanLayout at(p, LANES, kPadded);
  float* bf = reinterpret_cast<float*>(shared + at.bf);
  float* cf = reinterpret_cast<float*>(shared + at.cf);

  // Channels sit in the low bits of the lane, so that the lanes that read one address of B or C are neighbours.
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int j = lane / kPerWarp, local = warp * kPerWarp + lane % kPerWarp;
  const int64_t b = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x) * p.block_channels;
  const int valid_channels =
      static_cast<int>(p.channels - c0 < p.block_channels ? p.channels - c0 : p.block_channels);
  const bool live = local < valid_channels;
  const int64_t c = live ? c0 + local : c0;
  float* steps = reinterpret_cast<float*>(shared + at.steps) + local * ScanLayout::step_pitch(LANES);
  const int steps_buffer = p.block_channels * ScanLayout::step_pitch(LANES);

  const float xs = p.x.scale.or_one(c), ds = p.dt.scale.or_one(c), zs = p.z.scale.or_one(c);
  const float os = p.out_scale.or_one(c), reciprocal = __frcp_rn(os);
  const float bias = p.dt_bias[c], skip = p.D[c];
  float a[STATES], h[STATES];
#pragma unroll
  for (int s = 0; s < STATES; ++s) {
    const int n = j + s * LANES;
    const bool inside = n < p.states;
    a[s] = inside ? p.A[c * p.a_channel + n * p.a_state] * kLog2E : 0.0f;
    h[s] = inside && p.state ? p.state[b * p.state_batch + c * p.state_channel + n * p.state_state] : 0.0f;
  }

  stage_all<kAsync>(shared, at, p, b, 0, c0, valid_channels);
  for (int64_t t0 = 0; t0 < p.length; t0 += kScanTile) {
    char* buffer = shared + ((t0 / kScanTile) & 1) * at.buffer;
    const int valid = static_cast<int>(p.length - t0 < kScanTile ? p.length - t0 : kScanTile);
    if constexpr (kAsync) wait_copies();
    __syncthreads();  // the tile is there, and everyone is done with the one before
    if (t0 + kScanTile < p.length) {
      char* next = shared + (((t0 / kScanTile) & 1) ^ 1) * at.buffer;
      stage_all<kAsync>(next, at, p, b, t0 + kScanTile, c0, valid_channels);
    }
    if (t0 > 0) write_out(shared + at.out, p, b, t0 - kScanTile, c0, valid_channels, kAsync);
    widen<kBytes>(bf, buffer + at.b, p.B, p.states, kPadded, valid);
    widen<kBytes>(cf, buffer + at.c, p.C, p.states, kPadded, valid);
    __syncthreads();

#pragma unroll 1
    for (int k0 = 0; k0 < kScanTile; k0 += LANES) {
      const int index = (k0 + j) * p.block_channels + local;
      const float x = staged<kBytes>(buffer + at.x, index, p.x.type) * xs;
      float dt = softplus(fmaf(staged<kBytes>(buffer + at.dt, index, p.dt.type), ds, bias));
      // Past the end the state must stand still; what was staged there is anything, NaN included.
      const bool inside = k0 + j < valid;
      dt = inside ? dt : 0.0f;
      float* mine = steps + ((k0 / LANES) & 1) * steps_buffer;
      reinterpret_cast<float2*>(mine)[j] = make_float2(dt, inside ? dt * x : 0.0f);
      __syncwarp();

      float y[LANES];
#pragma unroll
      for (int k = 0; k < LANES; k += 4) {
        const float4 first = reinterpret_cast<const float4*>(mine)[k / 2];
        const float4 second = reinterpret_cast<const float4*>(mine)[k / 2 + 1];
        const float dts[4] = {first.x, first.z, second.x, second.z};
        const float dtx[4] = {first.y, first.w, second.y, second.w};
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
          const int row = (j + s * LANES) * kScanPitch + k0 + k;
          const float4 b4 = *reinterpret_cast<const float4*>(bf + row);
          const float4 c4 = *reinterpret_cast<const float4*>(cf + row);
          const float bs[4] = {b4.x, b4.y, b4.z, b4.w}, cs[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            h[s] = fmaf(exp2_approx(dts[i] * a[s]), h[s], dtx[i] * bs[i]);
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
          y[i] = keep + __shfl_xor_sync(0xffffffffu, send, half * kPerWarp);
        }
      }
      float v = fmaf(skip, x, y[0]);
      if (p.z.data) v *= silu(staged<kBytes>(buffer + at.z, index, p.z.type) * zs);
      char* out = shared + at.out;
      switch (p.out_type) {
        case Type::kInt8:
          Store<int8_t>::one(reinterpret_cast<int8_t*>(out) + index, v, os, reciprocal);
          break;
        case Type::kHalf:
          Store<__half>::one(reinterpret_cast<__half*>(out) + index, v, os, reciprocal);
          break;
        case Type::kBFloat16:
          Store<__nv_bfloat16>::one(reinterpret_cast<__nv_bfloat16*>(out) + index, v, os, reciprocal);
          break;
        default:
          Store<float>::one(reinterpret_cast<float*>(out) + index, v, os, reciprocal);
      }
    }
  }
  __syncthreads();
  write_out(shared + at.out, p, b, (p.length - 1) / kScanTile * kScanTile, c0, valid_channels, kAsync);
  if (p.state && live) {
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
      const int n = j + s * LANES;
      if (n < p.states) p.state[b * p.state_batch + c * p.state_channel + n * p.state_state] = h[s];
    }
  }
}

}  // namespace quamba
