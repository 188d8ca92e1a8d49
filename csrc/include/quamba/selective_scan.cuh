// What the scan's kernels are told, and how tiles of its inputs reach shared memory.
#pragma once

#include "quamba/types.cuh"

namespace quamba {

constexpr int kScanTile = 32;              // time steps of a tile: one a lane
constexpr int kScanPitch = kScanTile + 4;  // floats a row of B or C takes: 16-byte aligned, on distinct banks
constexpr int kScanThreads = 384;          // of a block, at most
constexpr int kStepPitch = 2 * kScanTile + 4;  // floats a channel's pairs (dt, dt x) take
constexpr int kSumPitch = kScanTile + 8;       // floats a channel's sums take

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
  bool quads;  // selective_scan_relay: the rows of x, dt and z can be copied in 16-byte pieces
};

// Where the parts of a block's shared memory begin, in bytes; the host asks for `total`.
struct ScanLayout {
  int x, dt, z, b, c;  // raw tiles, within one of three buffers
  int buffer;          // size of one buffer
  int bf, cf;          // B and C as floats, two buffers of `narrow` bytes each
  int narrow;
  int scales;  // of B and of C
  int steps, sums;
  int out;          // two buffers of `out_bytes` each
  int out_bytes;
  int total;

  __host__ __device__ ScanLayout(const ScanParams& p, int padded_states) {
    const int row = kScanTile * p.block_channels, states = kScanTile * p.states;
    x = 0;
    dt = x + row * size_of(p.x.type);
    z = dt + row * size_of(p.dt.type);
    b = z + (p.z.data ? row * size_of(p.z.type) : 0);
    c = b + round16(states * size_of(p.B.type));
    buffer = c + round16(states * size_of(p.C.type));
    narrow = padded_states * kScanPitch * 4;
    bf = 3 * buffer;
    cf = bf + 2 * narrow;
    scales = cf + 2 * narrow;
    steps = scales + 2 * padded_states * 4;
    sums = steps + p.block_channels * kStepPitch * 4;
    out = sums + p.block_channels * kSumPitch * 4;
    out_bytes = row * size_of(p.out_type);
    total = out + 2 * out_bytes;
  }
  __host__ __device__ static int round16(int v) { return (v + 15) / 16 * 16; }
};

__device__ __forceinline__ void copy_word_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global));
}

__device__ __forceinline__ void copy_pair_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(global));
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A thread's share of a tile of `width` neighbouring channels: the same unit of every `step`-th row. A unit is a word
// where all rows are aligned to words, else an element.
struct Share {
  int time;  // first row, or past the tile where the thread has no share
  int step;
  int shared;         // byte offset in the tile
  int unit, element;  // bytes
  int64_t row;        // bytes from row to row in memory
  const char* memory;

  // `origin`: row 0 of the sequence, first channel of the tile.
  __device__ __forceinline__ Share(const void* origin, int64_t row, int64_t channel_bytes, int element, int width,
                                   int valid_width, bool words)
      : unit(words ? 4 : element), element(element), row(row) {
    const int units = width * element / unit, index = static_cast<int>(threadIdx.x);
    const int t = index / units, u = index - t * units;
    step = static_cast<int>(blockDim.x) / units;
    time = t < step && u < valid_width * element / unit ? t : kScanTile;
    shared = index * unit;
    memory = static_cast<const char*>(origin) + t * row + (words ? 4 * u : u * channel_bytes);
  }

  // Calls f(shared offset, address) for the thread's units of the tile, and moves on to the next.
  template <typename F>
  __device__ __forceinline__ void next(int valid, int row_bytes, F&& f) {
    const char* address = memory;
    int offset = shared;
    for (int t = time; t < valid; t += step, offset += step * row_bytes, address += step * row) f(offset, address);
    memory += kScanTile * row;
  }
};

template <bool kAsync>
struct Stage {
  Share share;
  int row_bytes;

  __device__ __forceinline__ Stage(const Sequence& s, int64_t b, int64_t c0, int width, int valid_width)
      : share(static_cast<const char*>(s.data) + (b * s.batch + c0 * s.channel) * size_of(s.type),
              s.time * size_of(s.type), s.channel * size_of(s.type), size_of(s.type), width, valid_width, kAsync),
        row_bytes(width * size_of(s.type)) {}

  __device__ __forceinline__ void operator()(char* tile, int valid) {
    share.next(valid, row_bytes, [&](int offset, const char* address) {
      if constexpr (kAsync) {
        copy_word_async(tile + offset, address);
      } else {
        for (int byte = 0; byte < share.element; ++byte) tile[offset + byte] = address[byte];
      }
    });
  }
};

// B and C as floats, (states, time), dequantized; zero past the sequence's end and past the last state.
// `scales` holds those of B and those of C, padded_states each.
template <bool kBytes>
__device__ __forceinline__ void widen(float* bf, float* cf, const char* b, const char* c, const float* scales,
                                      const ScanParams& p, int padded_states, int valid) {
  if (kBytes && p.states == padded_states) {
    const int quads = padded_states / 4;
    for (int i = threadIdx.x; i < 2 * kScanTile * quads; i += blockDim.x) {
      const int t = i % kScanTile, side = i / kScanTile, w = side < quads ? side : side - quads;
      const uint32_t word = reinterpret_cast<const uint32_t*>(side < quads ? b : c)[t * quads + w];
      const float4 scale = reinterpret_cast<const float4*>(scales)[side];
      float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (t < valid) unpack_bytes(word, v);
      float* to = (side < quads ? bf : cf) + 4 * w * kScanPitch + t;
      to[0] = v[0] * scale.x;
      to[kScanPitch] = v[1] * scale.y;
      to[2 * kScanPitch] = v[2] * scale.z;
      to[3 * kScanPitch] = v[3] * scale.w;
    }
  } else {
    for (int i = threadIdx.x; i < kScanTile * padded_states; i += blockDim.x) {
      const int t = i % kScanTile, n = i / kScanTile;
      const bool inside = t < valid && n < p.states;
      bf[n * kScanPitch + t] = inside ? AnyVector{b, p.B.type}[t * p.states + n] * scales[n] : 0.0f;
      cf[n * kScanPitch + t] = inside ? AnyVector{c, p.C.type}[t * p.states + n] * scales[padded_states + n] : 0.0f;
    }
  }
}

// COUNT neighbouring elements of a staged tile.
template <int COUNT, bool kBytes>
__device__ __forceinline__ void staged(const char* tile, int index, Type type, float (&v)[COUNT]) {
  if constexpr (kBytes) {
    if constexpr (COUNT % 4 == 0) {
      load<COUNT, true>(reinterpret_cast<const int8_t*>(tile) + index, 1, COUNT, v);
    } else {
      static_assert(COUNT == 2, "2 or a multiple of 4 channels");
      const uint32_t pair = *reinterpret_cast<const uint16_t*>(tile + index) ^ 0x8080u;
      v[0] = byte_to_float<0>(pair);
      v[1] = byte_to_float<1>(pair);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = AnyVector{tile, type}[index + i];
  }
}

// COUNT neighbouring results into the staged output. After so many approximations an exact division has no point.
template <int COUNT>
__device__ __forceinline__ void stage_out(char* tile, int index, Type type, const float (&v)[COUNT],
                                          const float (&reciprocal)[COUNT]) {
  if (type == Type::kInt8) {
    uint32_t bytes[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) bytes[i] = round_to_byte(v[i] * reciprocal[i]);
    store_bytes<COUNT, COUNT % 4 == 0>(reinterpret_cast<int8_t*>(tile) + index, COUNT, bytes);
  } else if (type == Type::kFloat) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) reinterpret_cast<float*>(tile)[index + i] = v[i];
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      uint32_t* word = reinterpret_cast<uint32_t*>(tile) + (index + i) / 2;
      if (type == Type::kHalf) {
        const __half2 pair = __floats2half2_rn(v[i], v[i + 1]);
        *word = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(v[i], v[i + 1]);
        *word = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
}

}  // namespace quamba
