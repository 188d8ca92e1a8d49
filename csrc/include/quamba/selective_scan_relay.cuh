// selective_scan of int8 for 16 states and a long sequence: time across the warps, which hand each other the states.
//
// Time is cut into pieces of kRelaySteps steps. A warp takes eight channels, four lanes each with four of the states,
// and every kPieces-th piece; other warps take the pieces between. A state is handed to the warp of the next piece
// as soon as its steps are run, while this warp goes on with the next state: so four warps run a channel's states, each
// a state behind the one before, and no exponential and no step is computed twice. The word that is handed over
// holds the number of its piece: whoever waits for it looks at nothing else. The warps meet at no barrier; what they
// share beside the states, B and C as floats and the bytes of x, dt and z, is written two or three chunks ahead of its
// use, and counted.
//
// Where whole blocks make for an uneven share of the device, two blocks of a cluster take channels together, each every
// second chunk: the last piece of a chunk hands its states on through distributed shared memory.
//
// Softplus, a function of one byte, is looked up in a table of each channel. The gate is computed: a look-up takes
// three to four wavefronts, for four lanes of a channel share a bank, and shared memory is what limits this kernel.
#pragma once

#include "quamba/selective_scan_handover.cuh"

namespace quamba {

template <int GROUPS, int BLOCKS>
__global__ void __launch_bounds__(RelayLayout<GROUPS, BLOCKS>::kThreads, 1)
    selective_scan_relay_kernel(const __grid_constant__ ScanParams p) {
  using At = RelayLayout<GROUPS, BLOCKS>;
  constexpr int kStatesAtOnce =  // as registers allow
      GROUPS == 3 && BLOCKS == 1 ? 2 : GROUPS < kRelayGroups ? 4 : 1;
  constexpr bool kKeepsSkipped = kStatesAtOnce == 4 && BLOCKS == 1;  // D x, in registers
  extern __shared__ __align__(16) char arena[];
  // A scheduler has every fourth warp: with their groups' pieces turned, its warps are not all at the same point.
  // What is the same in a warp is in uniform registers, where the shuffle shows it.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), group = warp / At::kPieces;
  const int piece = (warp + group) % At::kPieces;
  const int among = relay_channel(lane), row = group * kRelayChannels + among;
  const int quarter = relay_quarter(lane), steps = quarter * 4;  // the four steps that the lane prepares and finishes
  const int length = static_cast<int>(p.length), pieces = (length + kRelaySteps - 1) / kRelaySteps;
  const int rank = BLOCKS > 1 ? static_cast<int>(blockIdx.x % BLOCKS) : 0;
  const int64_t b = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x / BLOCKS) * At::kChannels;
  const auto channel_of = [&](int row) { return c0 + row < p.channels ? c0 + row : c0; };
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(arena + offset); };
  const auto counter = [&](int chunk) {
    return reinterpret_cast<uint64_t*>(arena + At::kCounters) + static_cast<unsigned>(chunk) % 4;
  };

  // A chunk's bytes of x, dt and z of the block's channels: 16 a thread, those of a step in neighbouring threads.
  const int shift = static_cast<int>(c0 % 16);  // of the channels in their rows of 16-byte units
  const auto slot_of = [](unsigned chunk) { return static_cast<int>(chunk % At::kSlots) * At::kSlot; };
  const int first_step = threadIdx.x / At::kCopies, column = threadIdx.x % At::kCopies;
  const int copied_to = kept_offset(At::kTiles + column / At::kUnits * At::kTile + column % At::kUnits * 16 +
                                    first_step * At::kRow + first_step / 4 * At::kGap);
  const int in_rows = kept_offset(At::kInRows + 16 * (first_step < At::kStepsAtOnce ? column : At::kCopies));
  const auto fetch_tiles = [&](int chunk) {
    const RelayRows rows = rows_at(arena + in_rows);
    char* const to = arena + slot_of(chunk) + copied_to;
#pragma unroll
    for (int i = 0; i < At::kChunk; i += At::kStepsAtOnce) {
      const int step = i + threadIdx.x / At::kCopies, t = (chunk * BLOCKS + rank) * At::kChunk + step;
      if ((At::kChunk % At::kStepsAtOnce != 0 && step >= At::kChunk) || t >= rows.count) continue;
      char* const unit = to + i * At::kRow + i / 4 * At::kGap;
      if (p.quads) {
        copy_quad_async(unit, rows.at(t));
      } else {
        const int64_t c = c0 - shift + thread_index() % At::kCopies % At::kUnits * 16;
        copy_pair_async(unit, rows.at(t));
        if (c + 8 < p.channels) copy_pair_async(unit + 8, rows.at(t) + 8);
      }
    }
  };
  // The words of B and C that a thread widens are its own from the copy on.
  const int word_step = kept_offset(threadIdx.x % At::kChunk), first_word = threadIdx.x / At::kChunk;
  const int raw = kept_offset(At::kRaw + 4 * static_cast<int>(threadIdx.x));
  const auto each_word = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < At::kWords; i += 2 * GROUPS)
      if (i + first_word < At::kWords) f(i + first_word, raw + i * At::kChunk * 4);
  };
  const auto fetch_states = [&](int chunk, int place = 0) {
    const int t = (chunk * BLOCKS + rank) * At::kChunk + word_step;
    each_word([&](int k, int word) {
      const RelayRows rows = rows_at(arena + At::kStateRows + 16 * k);
      if (t < rows.count) copy_word_async(arena + word + place, rows.at(t));
    });
  };
  // Finite past the sequence's end, where dt x is zero. State 4 q + r becomes row 4 r + q.
  const auto widen_states = [&](int wide, int place = 0) {
    each_word([&](int k, int word) {
      const float4 scale = *reinterpret_cast<const float4*>(arena + At::kScales + 16 * k);
      float v[4];
      unpack_bytes(*reinterpret_cast<const uint32_t*>(arena + word + place), v);
      float* const to = floats(wide) + (k + k / 4 * 12) * At::kPitch + word_step;
      to[0] = v[0] * scale.x;
      to[4 * At::kPitch] = v[1] * scale.y;
      to[8 * At::kPitch] = v[2] * scale.z;
      to[12 * At::kPitch] = v[3] * scale.w;
    });
  };

  if (threadIdx.x < At::kWords) {
    const Sequence& s = threadIdx.x < At::kWords / 2 ? p.B : p.C;
    const char* const start = static_cast<const char*>(s.data) + b * s.batch + threadIdx.x % 4 * 4;
    put_rows(arena + At::kStateRows + 16 * threadIdx.x, start, s.time, length);
  } else if (threadIdx.x < At::kWords + At::kCopies + 1) {
    const int i = threadIdx.x - At::kWords, which = i / At::kUnits;
    const Sequence& s = which == 0 ? p.x : which == 1 ? p.dt : p.z;
    const int64_t c = c0 - shift + i % At::kUnits * 16;
    const char* const start = static_cast<const char*>(s.data) + b * s.batch + c;
    const bool present = s.data != nullptr && which < 3 && c < p.channels;
    put_rows(arena + At::kInRows + 16 * i, start, s.time, present ? length : 0);
  }
  if (threadIdx.x < At::kChannels) {
    const int64_t c = channel_of(threadIdx.x), size = size_of(p.out_type);
    put_rows(arena + At::kOutRows + 16 * threadIdx.x,
             static_cast<char*>(p.out) + (b * p.length * p.channels + c) * size, p.channels * size,
             c0 + threadIdx.x < p.channels ? length : 0);
  }
  // A word waits for the warp of the next piece where this warp, or the state that the call began with, has put it.
  const auto handed_by = [&](int piece) {
    return kept_offset(At::kHanded + ((piece * GROUPS + group) * 4 * 32 + lane) * 8);
  };
  const auto word_at = [&](int offset) { return reinterpret_cast<uint64_t*>(arena + offset); };
  const int from = handed_by((piece + At::kPieces - 1) % At::kPieces), to = handed_by(piece);
#pragma unroll
  for (int j = 0; j < 4; ++j) hand_on(word_at(to + 256 * j), 0.0f, ~0u);
  if (threadIdx.x < 4) expect_warps(counter(threadIdx.x), At::kThreads / 32);
  __syncthreads();
  if constexpr (BLOCKS > 1) {
    if (threadIdx.x == 0) show_to_cluster();
    cluster_arrive_relaxed();
  }
  if (threadIdx.x < At::kChannels) prefetch_channel(p, channel_of(threadIdx.x));
  wait_for_previous();
  // The few numbers that all depends on come before the chunks, behind which they would wait.
  constexpr int kWarps = At::kThreads / 32, kTables = (At::kChannels + kWarps - 1) / kWarps;  // of a warp
  float dt_scale[kTables];
  uint32_t dt_bias[kTables];
#pragma unroll
  for (int i = 0; i < kTables; ++i) {
    const int64_t c = channel_of(warp + i * kWarps);
    dt_scale[i] = scale_early(p.dt.scale, c), dt_bias[i] = load_bits_early(p.dt_bias, c);
  }
  const ChannelConstants constants(p, channel_of(static_cast<int>(threadIdx.x) % At::kChannels));
  const int last = threadIdx.x - (At::kThreads - 2 * kRelayStates);  // those of the states, of B and of C
  float state_scale = 1.0f;
  if (last >= 0) state_scale = scale_early((last < kRelayStates ? p.B : p.C).scale, last % kRelayStates);
  const int64_t channel = channel_of(row);
  const bool first = piece == At::kPieces - 1 && rank == 0;
  float a[4] = {}, initial[4] = {};
  if (piece == 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = load_early(p.A + channel * p.a_channel + (4 * quarter + j) * p.a_state);
  }
  if (first && p.state) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      initial[j] =
          load_early(p.state + b * p.state_batch + channel * p.state_channel + (4 * quarter + j) * p.state_state);
  }
  constexpr int kSecond = At::kPrepared - At::kRaw;  // where the second chunk of B and C waits, unused as yet
  fetch_states(0);
  fetch_states(1, kSecond);
  for (int chunk = 0; chunk < 3; ++chunk) fetch_tiles(chunk);
  if (threadIdx.x < At::kChannels)
    reinterpret_cast<float4*>(arena + At::kConstants)[threadIdx.x] =
        make_float4(constants.x_scale, from_bits(constants.skip, p.D.type), reciprocal_approx(constants.out_scale),
                    constants.z_scale);
  if (last >= 0) floats(At::kScales)[last] = state_scale;

  const int as = kept_offset(At::kA + (group * 4 * 32 + lane) * 4);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (piece == 0) *floats(as + 128 * j) = a[j] * kLog2E;
    if (first) hand_on(word_at(to + 256 * j), initial[j], 0);
  }
#pragma unroll
  for (int i = 0; i < kTables; ++i) {
    const int channel = warp + i * kWarps;
    if (channel >= At::kChannels) break;
    const float bias = from_bits(dt_bias[i], p.dt_bias.type);
#pragma unroll 4
    for (int k = lane; k < 256; k += 32) {
      const float v = static_cast<float>(static_cast<int8_t>(k));
      floats(At::kSoftplus)[channel * 256 + k] = softplus(fmaf(v, dt_scale[i], bias));
    }
  }
  wait_copies();
  __syncthreads();  // the scales of B and C
  widen_states(0);
  widen_states(At::kWide, kSecond);
  fetch_states(2);
  __syncthreads();
  if constexpr (BLOCKS > 1) cluster_wait();

  const int own = kept_offset(At::kPrepared + warp * 3 * At::kQuads + among * At::kQuadsPitch + steps * 4);
  const int bytes = kept_offset(At::kTiles + (piece * kRelaySteps + steps) * At::kRow +
                                (piece * 4 + quarter) * At::kGap + shift + row);
  const int piece_steps = (quarter * At::kPitch + piece * kRelaySteps) * 4;

  int wide = 0;
  for (int chunk = 0;; ++chunk) {
    const int now = (chunk * BLOCKS + rank) * At::kPieces + piece;
    if (now >= pieces) break;
    const bool away = BLOCKS > 1 && piece == At::kPieces - 1 && now + 1 < pieces;  // the next piece is another block's
    wait_copies();
    // When all warps have begun chunk - 2, this one's bytes, B and C are there, and none reads those of chunk - 3 any
    // more, whose places are those of the bytes of chunk + 3, and of B and C of chunk + 2.
    if (chunk >= 2)
      while (!counted(counter(chunk - 2), static_cast<unsigned>(chunk - 2) / 4 % 2)) continue;
    __syncwarp();
    const uint8_t* const tile = reinterpret_cast<const uint8_t*>(arena) + bytes + slot_of(chunk);
    const float4 kept = reinterpret_cast<const float4*>(arena + At::kConstants)[row];
    float skipped[4];
    {
      const int valid = length - now * kRelaySteps - steps;
      float dt[4], dtx[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dt[i] = floats(At::kSoftplus)[row * 256 + tile[At::kTile + i * At::kRow]];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = small_to_float(static_cast<int8_t>(tile[i * At::kRow])) * kept.x;
        dtx[i] = dt[i] * x;
        skipped[i] = kept.y * x;
      }
      if (valid < 4) {  // past the end the state must stand still
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i >= valid) dt[i] = dtx[i] = 0.0f;
      }
      store_quad(floats(own), dt);
      store_quad(floats(own + At::kQuads), dtx);
      if constexpr (!kKeepsSkipped) store_quad(floats(own + 2 * At::kQuads), skipped);
    }
    widen_states(wide >= (At::kRing - 2) * At::kWide ? wide - (At::kRing - 2) * At::kWide : wide + 2 * At::kWide);
    __syncwarp();
    if (lane == 0) count_warp(counter(chunk));
    fetch_states(chunk + 3);
    fetch_tiles(chunk + 3);

    float dt[kRelaySteps], dtx[kRelaySteps], y[kRelaySteps] = {};
    load_quads(floats(own) - steps, dt);
    load_quads(floats(own + At::kQuads) - steps, dtx);

    int bs = wide + piece_steps, looked = from, handed = to, factor = as;
#pragma unroll kStatesAtOnce
    for (int j = 0; j < 4; ++j) {
      uint64_t word = look(word_at(looked));
      const float a = *floats(factor);
      float decay[kRelaySteps];
#pragma unroll
      for (int i = 0; i < kRelaySteps; ++i) decay[i] = exp2_approx(dt[i] * a);
      float b[4];
      load_quads(floats(bs), b);
      while (__any_sync(0xffffffffu, static_cast<int>(word >> 32) != now)) word = look(word_at(looked));
      float state = __uint_as_float(static_cast<unsigned>(word));
#pragma unroll
      for (int i = 0; i < kRelaySteps; i += 4) {
        float c[4];
        load_quads(floats(bs) + At::kSide + i, c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          state = fmaf(decay[i + k], state, dtx[i + k] * b[k]);
          y[i + k] = fmaf(state, c[k], y[i + k]);
        }
        if (i + 4 < kRelaySteps) load_quads(floats(bs) + i + 4, b);
      }
      if (away)
        hand_on_away(word_at(handed), (rank + 1) % BLOCKS, state, now + 1);
      else
        hand_on(word_at(handed), state, now + 1);
      bs += 4 * At::kPitch * 4, looked += 256, handed += 256, factor += 128;
    }

    // Gate and place of the results, independent of them; a sequence without a gate has some bytes there, too.
    const int t = now * kRelaySteps + steps;
    const RelayRows rows = rows_at(arena + At::kOutRows + 16 * row);
    const float z_scale = floats(At::kConstants)[4 * row + 3];
    const bool gated = p.z.data != nullptr;
    float gate[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = small_to_float(static_cast<int8_t>(tile[2 * At::kTile + i * At::kRow])) * z_scale;
      gate[i] = select(gated, silu(z), 1.0f);
    }
    // The sums of the four quarters: twice a lane keeps half of the steps and gives another quarter's the other half.
    float half[kRelaySteps / 2], result[4];
#pragma unroll
    for (int i = 0; i < kRelaySteps / 2; ++i) half[i] = add_half(y[i], y[kRelaySteps / 2 + i], quarter / 2, 16);
    if constexpr (!kKeepsSkipped) load_quads(floats(own + 2 * At::kQuads), skipped);
#pragma unroll
    for (int i = 0; i < 4; ++i) result[i] = (skipped[i] + add_half(half[i], half[4 + i], quarter % 2, 2)) * gate[i];
    switch (p.out_type) {
      case Type::kInt8: {  // after so many approximations an exact division by the scale has no point
        const float reciprocal = floats(At::kConstants)[4 * row + 2];
        write_results<uint8_t>(rows, t, result, [&](float v) { return round_to_byte(v * reciprocal); });
        break;
      }
      case Type::kHalf:
        write_results<__half>(rows, t, result, [](float v) { return __float2half_rn(v); });
        break;
      case Type::kBFloat16:
        write_results<__nv_bfloat16>(rows, t, result, [](float v) { return __float2bfloat16_rn(v); });
        break;
      default:
        write_results<float>(rows, t, result, [](float v) { return v; });
    }
    wide = wide == (At::kRing - 1) * At::kWide ? 0 : wide + At::kWide;
  }
  let_next_start();  // not before: the first of its blocks would gather on multiprocessors that are free
  wait_copies();  // of chunks that do not come
  if (p.state && c0 + row < p.channels && (pieces - 1) % (At::kPieces * BLOCKS) == rank * At::kPieces + piece) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      p.state[b * p.state_batch + (c0 + row) * p.state_channel + (4 * quarter + j) * p.state_state] =
          __uint_as_float(static_cast<unsigned>(look(word_at(to + 256 * j))));
  }
}

}  // namespace quamba
