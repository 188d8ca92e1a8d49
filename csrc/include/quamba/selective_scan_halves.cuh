// selective_scan of int8 for 16 states and a long sequence on Hopper: selective_scan_relay with two lanes a channel.
//
// A warp takes 16 channels, two lanes each with eight of the states, and pieces of kHalvesSteps steps; warps hand each
// other the states. What a warp does once for a piece serves twice the channels of selective_scan_relay, and y is the
// sum of two lanes, not of four. A multiprocessor's share of the channels is rarely a whole number of 16: so two blocks
// of a cluster take channels together, each every second chunk, and eight warps of both are at work on a channel's
// states. Both lanes of a channel prepare all of its steps, as there is no room to exchange them.
//
// The groups of a block take turns at bringing a chunk: a warp's share of every chunk would be mostly addresses.
#pragma once

#include "quamba/selective_scan_handover.cuh"

namespace quamba {

constexpr int kHalvesSteps = 16;                     // of a piece
constexpr int kHalvesChannels = 16;                  // of a group
constexpr int kHalvesFewest = 3, kHalvesGroups = 5;  // of two blocks
constexpr int kHalf = kRelayStates / 2;

// Where the parts of a block's shared memory begin, in bytes.
template <int GROUPS>
struct HalvesLayout {
  static constexpr int kPieces = 4;  // of a chunk, and warps to a group
  static constexpr int kWarps = GROUPS * kPieces, kThreads = kWarps * 32, kChannels = GROUPS * kHalvesChannels;
  static constexpr int kFeeders = kPieces * 32;  // threads that bring a chunk: a group's
  static constexpr int kChunk = kHalvesSteps * kPieces;
  static constexpr int kPitch = kChunk + 4;  // floats of a row of B or C: the two rows of a warp are on distinct banks
  static constexpr int kSide = kRelayStates * kPitch;     // floats of B, then as many of C
  static constexpr int kRing = 3, kWide = 2 * kSide * 4;  // chunks that are kept as floats, bytes of one
  static constexpr int kWords = 2 * kRelayStates / 4;     // of a step of B and C, as they come from memory
  static constexpr int kWordSteps = kFeeders / kChunk;    // words of a step at once
  static constexpr int kMine = kWords / kWordSteps;       // of a feeder
  static constexpr int kRow = kChannels, kGap = 16;  // bytes of a step of x, dt or z, and after each fourth: a warp's
  static constexpr int kQuad = 4 * kRow + kGap;      // two halves are on distinct banks
  static constexpr int kTile = kChunk / 4 * kQuad;               // a chunk of x, dt or z
  static constexpr int kSlots = 4, kSlot = 3 * kTile;            // chunks of x, dt and z that are kept
  static constexpr int kCopies = 3 * GROUPS;                     // of 16 bytes, of a step of x, dt and z
  static constexpr int kStepsAtOnce = kFeeders / kCopies / 4 * 4;  // that a group copies
  static constexpr int kRawSize = kWords * kChunk * 4;

  static constexpr int kScales = kRing * kWide;                     // of B and of C
  static constexpr int kCounters = kScales + 2 * kRelayStates * 4;  // warps that have begun a chunk, of four
  static constexpr int kRaw = kCounters + 4 * 8;                    // (chunk % 2, word of a feeder, feeder)
  static constexpr int kOutRows = kRaw + 2 * kRawSize;              // RelayRows: (channels)
  static constexpr int kConstants = kOutRows + kChannels * 16;  // scale of x, D / 2, 1 / scale of result, scale of z
  static constexpr int kA = kConstants + kChannels * 16;        // log2(e) A: (group, state of a half, lane)
  static constexpr int kHanded = kA + GROUPS * kHalf * 32 * 4;  // (piece, group, state of a half, lane)
  static constexpr int kTiles = kHanded + kThreads * kHalf * 8;  // (chunk % kSlots, x dt z)
  static constexpr int kSoftplus = kTiles + kSlots * kSlot;      // (group, 256, channel): a channel a bank
  static constexpr int kTotal = kSoftplus + kChannels * 1024;
  static_assert(kTotal <= 227 * 1024 && kFeeders % kChunk == 0 && kStepsAtOnce > 0);
};

template <int GROUPS>
__global__ void __launch_bounds__(HalvesLayout<GROUPS>::kThreads, 1)
    selective_scan_halves_kernel(const __grid_constant__ ScanParams p) {
  using At = HalvesLayout<GROUPS>;
  extern __shared__ __align__(16) char arena[];
  // A scheduler has every fourth warp: with their groups' pieces turned, its warps are not all at the same point.
  // What is the same in a warp is in uniform registers, where the shuffle shows it.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
  const int group = warp / At::kPieces, piece = (warp + group) % At::kPieces;
  // A 128-bit load takes two wavefronts where lanes i and i ^ 1 read the same, as of B and C.
  const int among = (lane & 1) | (lane >> 1 & 14), half = lane >> 1 & 1, row = group * kHalvesChannels + among;
  const int length = static_cast<int>(p.length), pieces = (length + kHalvesSteps - 1) / kHalvesSteps;
  const int rank = static_cast<int>(blockIdx.x % 2);
  const int64_t b = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x / 2) * At::kChannels;
  const auto channel_of = [&](int row) { return c0 + row < p.channels ? c0 + row : c0; };
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(arena + offset); };
  const auto counter = [&](unsigned chunk) { return reinterpret_cast<uint64_t*>(arena + At::kCounters) + chunk % 4; };

  // 16 bytes a thread of x, dt and z, those of a step in neighbouring threads; and the words of B and C that the thread
  // widens when these copies are there.
  const int feeder = static_cast<int>(threadIdx.x) % At::kFeeders;
  const auto fetch = [&](int chunk) {
    const int step = feeder / At::kCopies, column = feeder % At::kCopies, unit = column % GROUPS;
    const int t0 = (chunk * 2 + rank) * At::kChunk;
    const Sequence& s = column / GROUPS == 0 ? p.x : column / GROUPS == 1 ? p.dt : p.z;
    const bool present = s.data != nullptr && c0 + unit * 16 < p.channels && step < At::kStepsAtOnce;
    const int end = present ? min(length, t0 + At::kChunk) : 0;
    const char* from = static_cast<const char*>(s.data) + b * s.batch + c0 + unit * 16 + (t0 + step) * s.time;
    char* to = arena + At::kTiles + column / GROUPS * At::kTile + unit * 16 + step * At::kRow + step / 4 * At::kGap +
               chunk % At::kSlots * At::kSlot;
#pragma unroll 2
    for (int t = t0 + step; t < end; t += At::kStepsAtOnce) {
      if (p.quads) {
        copy_quad_async(to, from);
      } else {
        copy_pair_async(to, from);
        if (c0 + unit * 16 + 8 < p.channels) copy_pair_async(to + 8, from + 8);
      }
      from += s.time * At::kStepsAtOnce, to += At::kStepsAtOnce / 4 * At::kQuad;
    }
    const int word_step = t0 + feeder % At::kChunk, word = feeder / At::kChunk * 4;
    char* const raw = arena + At::kRaw + chunk % 2 * At::kRawSize + feeder * 4;
    if (word_step >= length) return;
    const char* const in_b = static_cast<const char*>(p.B.data) + b * p.B.batch + word + word_step * p.B.time;
    const char* const in_c = static_cast<const char*>(p.C.data) + b * p.C.batch + word + word_step * p.C.time;
#pragma unroll
    for (int i = 0; i < At::kMine / 2; ++i) {
      copy_word_async(raw + i * At::kFeeders * 4, in_b + i * At::kWordSteps * 4);
      copy_word_async(raw + (i + At::kMine / 2) * At::kFeeders * 4, in_c + i * At::kWordSteps * 4);
    }
  };
  // Finite past the sequence's end, where dt x is zero. State 8 h + r becomes row 2 r + h.
  const auto widen = [&](int chunk) {
    const char* const raw = arena + At::kRaw + chunk % 2 * At::kRawSize + feeder * 4;
    float* const wide = floats(chunk % At::kRing * At::kWide) + feeder % At::kChunk;
#pragma unroll
    for (int i = 0; i < At::kMine; ++i) {
      const int k = feeder / At::kChunk + i * At::kWordSteps;
      const float4 scale = *reinterpret_cast<const float4*>(arena + At::kScales + 16 * k);
      float v[4];
      unpack_bytes(*reinterpret_cast<const uint32_t*>(raw + i * At::kFeeders * 4), v);
      float* const to = wide + (k / 4 * 16 + k % 2 * 8 + k / 2 % 2) * At::kPitch;
      to[0] = v[0] * scale.x;
      to[2 * At::kPitch] = v[1] * scale.y;
      to[4 * At::kPitch] = v[2] * scale.z;
      to[6 * At::kPitch] = v[3] * scale.w;
    }
  };

  if (threadIdx.x < 4) expect_warps(counter(threadIdx.x), At::kWarps);
  if (threadIdx.x < At::kChannels) {
    const int64_t c = channel_of(threadIdx.x), size = size_of(p.out_type);
    put_rows(arena + At::kOutRows + 16 * threadIdx.x,
             static_cast<char*>(p.out) + (b * p.length * p.channels + c) * size, p.channels * size,
             c0 + threadIdx.x < p.channels ? length : 0);
  }
  // A word waits for the warp of the next piece where this warp, or the state that the call began with, has put it.
  const auto handed_by = [&](int piece) {
    return kept_offset(At::kHanded + ((piece * GROUPS + group) * kHalf * 32 + lane) * 8);
  };
  const auto word_at = [&](int offset) { return reinterpret_cast<uint64_t*>(arena + offset); };
  const int from = handed_by((piece + At::kPieces - 1) % At::kPieces), to = handed_by(piece);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) hand_on(word_at(to + 256 * j), 0.0f, ~0u);
  __syncthreads();
  if (threadIdx.x == 0) show_to_cluster();
  cluster_arrive_relaxed();
  if (threadIdx.x < At::kChannels) prefetch_channel(p, channel_of(threadIdx.x));
  wait_for_previous();
  // The few numbers that all depends on come before the chunks, behind which they would wait. Of the tables a thread
  // has four neighbouring channels of the group.
  const int table_channel = lane % 4 * 4;
  float dt_scale[4];
  uint32_t dt_bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t c = channel_of(group * kHalvesChannels + table_channel + i);
    dt_scale[i] = scale_early(p.dt.scale, c), dt_bias[i] = load_bits_early(p.dt_bias, c);
  }
  const ChannelConstants constants(p, channel_of(static_cast<int>(threadIdx.x) % At::kChannels));
  const int last = threadIdx.x - (At::kThreads - 2 * kRelayStates);  // those of the states, of B and of C
  float state_scale = 1.0f;
  if (last >= 0) state_scale = scale_early((last < kRelayStates ? p.B : p.C).scale, last % kRelayStates);
  const int64_t channel = channel_of(row);
  const bool first = piece == At::kPieces - 1 && rank == 0;
  float a[kHalf] = {}, initial[kHalf] = {};
  if (piece == 0) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j) a[j] = load_early(p.A + channel * p.a_channel + (kHalf * half + j) * p.a_state);
  }
  if (first && p.state) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      initial[j] =
          load_early(p.state + b * p.state_batch + channel * p.state_channel + (kHalf * half + j) * p.state_state);
  }
  if (group == 0) fetch(0);
  if (group == 1) fetch(1);
  if (threadIdx.x < At::kChannels)
    reinterpret_cast<float4*>(arena + At::kConstants)[threadIdx.x] =
        make_float4(constants.x_scale, 0.5f * from_bits(constants.skip, p.D.type),
                    reciprocal_approx(constants.out_scale), constants.z_scale);
  if (last >= 0) floats(At::kScales)[last] = state_scale;

  const int as = kept_offset(At::kA + (group * kHalf * 32 + lane) * 4);
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    if (piece == 0) *floats(as + 128 * j) = a[j] * kLog2E;
    if (first) hand_on(word_at(to + 256 * j), initial[j], 0);
  }
  for (int i = warp % At::kPieces; i < 32; i += At::kPieces) {
    const int k = i * 8 + lane / 4;
    float v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      v[c] = softplus(
          fmaf(static_cast<float>(static_cast<int8_t>(k)), dt_scale[c], from_bits(dt_bias[c], p.dt_bias.type)));
    float* const entries = floats(At::kSoftplus) + (group * 256 + k) * kHalvesChannels + table_channel;
    store_quad(entries, v);
  }
  wait_copies();
  __syncthreads();  // the scales of B and C, the tables of all threads
  if (group == 0) widen(0);
  __syncthreads();
  cluster_wait();

  const int bytes = kept_offset(At::kTiles + piece * (kHalvesSteps / 4) * At::kQuad + row);
  const int table = kept_offset(At::kSoftplus + (group * 256 * kHalvesChannels + among) * 4);
  const int piece_steps = (half * At::kPitch + piece * kHalvesSteps) * 4;
  uint64_t* const there = in_block(word_at(to), rank ^ 1);

  for (unsigned chunk = 0;; ++chunk) {
    const int now = (static_cast<int>(chunk) * 2 + rank) * At::kPieces + piece;
    if (now >= pieces) break;
    wait_copies();
    // When all warps have begun chunk - 1, this one's bytes, B and C are there, and none reads those of chunk - 2 any
    // more, whose places are those of the bytes of chunk + 2, and of B and C of chunk + 1.
    if (chunk >= 1)
      while (!counted(counter(chunk - 1), (chunk - 1) / 4 % 2)) continue;
    __syncwarp();
    if ((chunk + 1) % GROUPS == group) widen(chunk + 1);
    if ((chunk + 2) % GROUPS == group) fetch(chunk + 2);
    __syncwarp();
    if (lane == 0) count_warp(counter(chunk));
    const uint8_t* const tile = reinterpret_cast<const uint8_t*>(arena) + bytes + chunk % At::kSlots * At::kSlot;
    const float4 kept = reinterpret_cast<const float4*>(arena + At::kConstants)[row];
    float dt[kHalvesSteps], dtx[kHalvesSteps], y[kHalvesSteps];
#pragma unroll
    for (int i = 0; i < kHalvesSteps; ++i) {
      const uint8_t* const at = tile + i / 4 * At::kQuad + i % 4 * At::kRow;
      dt[i] = floats(table)[at[At::kTile] * kHalvesChannels];
      const float x = word_to_float(static_cast<int8_t>(*at)) * kept.x;
      dtx[i] = dt[i] * x;
      y[i] = kept.y * x;
    }
    const int valid = length - now * kHalvesSteps;
    if (valid < kHalvesSteps) {  // past the end the state must stand still
#pragma unroll
      for (int i = 0; i < kHalvesSteps; ++i)
        if (i >= valid) dt[i] = dtx[i] = 0.0f;
    }

    const float* const bs = floats(chunk % At::kRing * At::kWide + piece_steps);
    // The piece after a chunk's last is the other block's.
    uint64_t* const target = piece == At::kPieces - 1 && now + 1 < pieces ? there : word_at(to);
    float decay[kHalvesSteps];
#pragma unroll
    for (int i = 0; i < kHalvesSteps; ++i) decay[i] = exp2_in_order(dt[i] * *floats(as));
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float* const row = bs + 2 * At::kPitch * j;
      uint64_t word = look(word_at(from + 256 * j));
      while (__any_sync(0xffffffffu, static_cast<int>(word >> 32) != now)) word = look(word_at(from + 256 * j));
      float state = __uint_as_float(static_cast<unsigned>(word));
      const float a = j + 1 < kHalf ? *floats(as + 128 * (j + 1)) : 0.0f;  // the next state's
#pragma unroll
      for (int i = 0; i < kHalvesSteps; i += 4) {
        float b[4], c[4];
        load_quads(row + i, b);
        load_quads(row + At::kSide + i, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          state = fmaf(decay[i + k], state, dtx[i + k] * b[k]);
          y[i + k] = fmaf(state, c[k], y[i + k]);
          if (j + 1 < kHalf) decay[i + k] = exp2_in_order(dt[i + k] * a);
        }
      }
      hand_on_anywhere(target + 32 * j, state, now + 1);
    }

    // The lane has every second four steps' results.
    const RelayRows rows = rows_at(arena + At::kOutRows + 16 * row);
    float result[kHalvesSteps / 2];
#pragma unroll
    for (int i = 0; i < kHalvesSteps / 2; ++i)
      result[i] = add_half(y[i / 4 * 8 + i % 4], y[i / 4 * 8 + i % 4 + 4], half, 2);
    if (p.z.data != nullptr) {
      const uint8_t* const zs = tile + 2 * At::kTile + half * At::kQuad;
      const float z_scale = floats(At::kConstants)[4 * row + 3];
#pragma unroll
      for (int i = 0; i < kHalvesSteps / 2; ++i) {
        const uint8_t z = zs[i / 4 * 2 * At::kQuad + i % 4 * At::kRow];
        result[i] *= silu(word_to_float(static_cast<int8_t>(z)) * z_scale);
      }
    }
    const auto write = [&](auto&& write_four) {
#pragma unroll
      for (int i = 0; i < kHalvesSteps / 2; i += 4) {
        const float four[4] = {result[i], result[i + 1], result[i + 2], result[i + 3]};
        write_four(now * kHalvesSteps + 4 * half + 2 * i, four);
      }
    };
    switch (p.out_type) {
      case Type::kInt8: {  // after so many approximations an exact division by the scale has no point
        const float reciprocal = floats(At::kConstants)[4 * row + 2];
        write([&](int t, const float(&v)[4]) {
          write_results<uint8_t>(rows, t, v, [&](float v) { return round_to_byte(v * reciprocal); });
        });
        break;
      }
      case Type::kHalf:
        write([&](int t, const float(&v)[4]) {
          write_results<__half>(rows, t, v, [](float v) { return __float2half_rn(v); });
        });
        break;
      case Type::kBFloat16:
        write([&](int t, const float(&v)[4]) {
          write_results<__nv_bfloat16>(rows, t, v, [](float v) { return __float2bfloat16_rn(v); });
        });
        break;
      default:
        write([&](int t, const float(&v)[4]) { write_results<float>(rows, t, v, [](float v) { return v; }); });
    }
  }
  let_next_start();  // not before: the first of its blocks would gather on multiprocessors that are free
  wait_copies();  // of chunks that do not come
  if (p.state && c0 + row < p.channels && (pieces - 1) % (At::kPieces * 2) == rank * At::kPieces + piece) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      p.state[b * p.state_batch + (c0 + row) * p.state_channel + (kHalf * half + j) * p.state_state] =
          __uint_as_float(static_cast<unsigned>(look(word_at(to + 256 * j))));
  }
}

}  // namespace quamba
