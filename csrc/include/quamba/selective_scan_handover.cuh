// Where selective_scan_relay keeps what in shared memory, and how its warps, and those of selective_scan_halves, hand
// each other a state.
#pragma once

#include "quamba/cluster.cuh"
#include "quamba/launch.cuh"
#include "quamba/linear_result.cuh"
#include "quamba/selective_scan.cuh"

namespace quamba {

constexpr int kRelaySteps = 16;     // of a piece
constexpr int kRelayStates = 16;    // four quarters of four
constexpr int kRelayChannels = 8;   // of a group
constexpr int kRelayGroups = 5;     // of a block, at most
constexpr int kPairedGroups = 3;    // of two blocks that take turns

// Pieces of a chunk, and warps to a group of channels. Four are at work on its states at a time, each a state behind
// the one before; where groups are few there is room for more, which meanwhile prepare their piece or finish it. Two
// blocks have twice as many, and four with more registers are faster than five.
constexpr int relay_pieces(int groups, int blocks) { return groups <= 2 ? 8 : groups == 3 && blocks == 1 ? 5 : 4; }

// Where the parts of a block's shared memory begin, in bytes.
template <int GROUPS, int BLOCKS>
struct RelayLayout {
  static constexpr int kPieces = relay_pieces(GROUPS, BLOCKS);
  static constexpr int kThreads = GROUPS * kPieces * 32, kChannels = GROUPS * kRelayChannels;
  static constexpr int kChunk = kRelaySteps * kPieces;
  static constexpr int kPitch = kChunk + 4;  // floats of a row of B or C: the four rows of a warp are on distinct banks
  static constexpr int kSide = kRelayStates * kPitch;           // floats of B, then as many of C
  static constexpr int kRing = 5, kWide = 2 * kSide * 4;        // chunks that are kept as floats, bytes of one
  static constexpr int kWords = 2 * kRelayStates / 4;           // of a step of B and C, as they come from memory
  static constexpr int kUnits = (kChannels + GROUPS % 2 * 8 + 15) / 16;  // of 16 bytes that hold a row of any block
  static constexpr int kRow = 16 * kUnits, kGap = 16;           // bytes of a step of x, dt or z, and after each fourth:
                                                                // a warp's four quarters are on distinct banks
  static constexpr int kTile = kChunk * kRow + kChunk / 4 * kGap;  // a chunk of x, dt or z
  static constexpr int kSlots = 6, kSlot = 3 * kTile;           // chunks of x, dt and z that are kept
  static constexpr int kCopies = 3 * kUnits;                    // of a step of x, dt and z
  static constexpr int kStepsAtOnce =                           // that the block copies: a multiple of 4
      kThreads / kCopies < kChunk ? kThreads / kCopies / 4 * 4 : kChunk;
  static constexpr int kQuadsPitch = (kRelaySteps + 4) * 4;     // bytes of a channel's steps: see relay_channel
  static constexpr int kQuads = kRelayChannels * kQuadsPitch;

  static constexpr int kScales = kRing * kWide;                     // of B and of C
  static constexpr int kCounters = kScales + 2 * kRelayStates * 4;  // warps that have widened their part of a chunk
  static constexpr int kRaw = kCounters + 4 * 8;                    // (kWords, time)
  static constexpr int kStateRows = kRaw + kWords * kChunk * 4;     // RelayRows of the words
  static constexpr int kInRows = kStateRows + kWords * 16;          // RelayRows: (x dt z, unit), and none
  static constexpr int kOutRows = kInRows + (kCopies + 1) * 16;        // RelayRows: (channels)
  static constexpr int kConstants = kOutRows + kChannels * 16;      // scale of x, D, 1 / scale of result, scale of z
  static constexpr int kA = kConstants + kChannels * 16;            // log2(e) A: (group, state of a quarter, lane)
  static constexpr int kHanded = kA + GROUPS * 4 * 32 * 4;          // (piece, group, state of a quarter, lane)
  static constexpr int kTiles = kHanded + kThreads * 4 * 8;         // (chunk % kSlots, x dt z)
  static constexpr int kPrepared = kTiles + kSlots * kSlot;         // (warp, dt | dt x | D x, channel, step)
  static constexpr int kSoftplus = kPrepared + kThreads / 32 * 3 * kQuads;  // (channels, 256)
  static constexpr int kTotal = kSoftplus + kChannels * 1024;
};

// A lane's channel of the eight and its quarter of the states. A 128-bit load takes two wavefronts where lanes i and
// i ^ 1 read the same, as of B and C, or lanes i and i ^ 2, as of dt and dt x, and four elsewhere. Eight lanes in a row
// have four channels, two apart, and two quarters: their 16-byte parts of the steps are on distinct banks.
__device__ __forceinline__ int relay_channel(int lane) { return (lane & 1) << 1 | (lane & 4) | (lane >> 3 & 1); }
__device__ __forceinline__ int relay_quarter(int lane) { return (lane >> 1 & 1) | (lane >> 3 & 2); }

// Rows of a tensor: where the first is, bytes from one to the next, and how many may be touched.
struct alignas(16) RelayRows {
  uint64_t first;
  unsigned stride;
  int count;

  __device__ __forceinline__ char* at(int i) const {
    return reinterpret_cast<char*>(first + static_cast<uint64_t>(static_cast<unsigned>(i)) * stride);
  }
};

__device__ __forceinline__ void put_rows(void* to, const void* first, int64_t stride, int count) {
  *static_cast<RelayRows*>(to) = {reinterpret_cast<uint64_t>(first), static_cast<unsigned>(stride), count};
}

// In one access.
__device__ __forceinline__ RelayRows rows_at(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {static_cast<uint64_t>(v.y) << 32 | v.x, v.z, static_cast<int>(v.w)};
}

__device__ __forceinline__ void copy_quad_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}

// What belongs to a channel, into the second-level cache.
__device__ __forceinline__ void prefetch_channel(const ScanParams& p, int64_t c) {
  prefetch(p.A + c * p.a_channel);
  prefetch(static_cast<const char*>(p.dt_bias.data) + c * size_of(p.dt_bias.type));
  prefetch(static_cast<const char*>(p.D.data) + c * size_of(p.D.type));
  for (const Scale* s : {&p.x.scale, &p.dt.scale, &p.z.scale, &p.out_scale})
    if (s->data != nullptr) prefetch(s->data + c * s->stride);
}

// The scale, or 1, asked for where this is written.
__device__ __forceinline__ float scale_early(const Scale& s, int64_t i) {
  return s ? load_early(s.data + i * s.stride) : 1.0f;
}

// What preparing and finishing a channel take, asked for likewise.
struct ChannelConstants {
  float x_scale, out_scale, z_scale;
  uint32_t skip;

  __device__ __forceinline__ ChannelConstants(const ScanParams& p, int64_t c)
      : x_scale(scale_early(p.x.scale, c)),
        out_scale(scale_early(p.out_scale, c)),
        z_scale(scale_early(p.z.scale, c)),
        skip(load_bits_early(p.D, c)) {}
};

// A state and the number of the piece that it is for: one access, so that either tells about the other.
__device__ __forceinline__ uint64_t look(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.volatile.shared.b64 %0, [%1];"
               : "=l"(value)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(word))));
  return value;
}

__device__ __forceinline__ void hand_on(uint64_t* word, float state, unsigned piece) {
  const uint64_t value = static_cast<uint64_t>(piece) << 32 | __float_as_uint(state);
  asm volatile("st.volatile.shared.b64 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(word))),
               "l"(value));
}

// The same in the shared memory of another block of a cluster, which has the word at the same place. On Hopper.
__device__ __forceinline__ void hand_on_away(const uint64_t* word, int rank, float state, unsigned piece) {
#if __CUDA_ARCH__ >= 900
  const uint64_t value = static_cast<uint64_t>(piece) << 32 | __float_as_uint(state);
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.volatile.shared::cluster.b64 [there], %2;\n"
      "}\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(word))),
      "r"(rank), "l"(value));
#endif
}

// The same place in the shared memory of another block of a cluster. On Hopper.
template <typename T>
__device__ __forceinline__ T* in_block(T* place, int rank) {
  uint64_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
#endif
  return reinterpret_cast<T*>(there);
}

// hand_on() to a place that may be in_block(): one instruction for both.
__device__ __forceinline__ void hand_on_anywhere(uint64_t* word, float state, unsigned piece) {
  const uint64_t value = static_cast<uint64_t>(piece) << 32 | __float_as_uint(state);
  asm volatile("st.volatile.b64 [%0], %1;" ::"l"(word), "l"(value));
}

// What the threads of a block wrote before they met is there behind a barrier of the cluster, cluster_arrive_relaxed(),
// when one of them calls this before all arrive. Each thread by itself would wait for its copies from memory, too.
__device__ __forceinline__ void show_to_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#endif
}

// A counter of so many warps, over and over.
__device__ __forceinline__ void expect_warps(uint64_t* counter, int warps) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(counter))),
               "r"(warps)
               : "memory");
}

// Counts the warp, whose lanes have met, and what they wrote before. As a barrier: an atomic addition with the same
// meaning waits for the warp's results to be on their way to memory, some 500 cycles.
__device__ __forceinline__ void count_warp(uint64_t* counter) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(counter)))
               : "memory");
}

// Whether all warps were counted for the first time (parity 0), the second (1), the third (0)..., and what they wrote.
__device__ __forceinline__ bool counted(const uint64_t* counter, unsigned parity) {
  unsigned done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(counter))), "r"(parity)
      : "memory");
  return done != 0;
}

// Four neighbouring rows' results, from row `t` on.
template <typename T, typename F>
__device__ __forceinline__ void write_results(const RelayRows& rows, int t, const float (&v)[4], F&& convert) {
  char* to = rows.at(t);
  __builtin_assume(__isGlobal(to));
  if (t + 4 <= rows.count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, to += rows.stride) *reinterpret_cast<T*>(to) = static_cast<T>(convert(v[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 3; ++i, to += rows.stride)
      if (t + i < rows.count) *reinterpret_cast<T*>(to) = static_cast<T>(convert(v[i]));
  }
}

// A small integer as float, without the conversion unit.
__device__ __forceinline__ float small_to_float(int v) { return __uint_as_float(0x4b400000u + v) - 12582912.0f; }

// As from 32 bits: from 8 or 16 the conversion is that of the special-function unit.
__device__ __forceinline__ float word_to_float(int v) {
  asm("" : "+r"(v));
  return static_cast<float>(v);
}

// exp2_approx() that keeps its place among others and the looks at words.
__device__ __forceinline__ float exp2_in_order(float v) {
  float r;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

template <int COUNT>
__device__ __forceinline__ void load_quads(const float* from, float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(from + i);
    v[i] = quad.x, v[i + 1] = quad.y, v[i + 2] = quad.z, v[i + 3] = quad.w;
  }
}

__device__ __forceinline__ void store_quad(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}

// A value that the compiler must keep in a register instead of computing it anew.
__device__ __forceinline__ int kept_offset(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// The sum with the lane `other` bits away, which has the other value of `upper`, of the half that is this lane's.
__device__ __forceinline__ float add_half(float lower_half, float upper_half, int upper, int other) {
  const float kept = upper ? upper_half : lower_half, given = upper ? lower_half : upper_half;
  return kept + __shfl_xor_sync(0xffffffffu, given, other);
}

// threadIdx.x read anew, so that the compiler keeps nothing that it could compute from it.
__device__ __forceinline__ unsigned thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

}  // namespace quamba
