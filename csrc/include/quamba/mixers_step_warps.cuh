// mixers_step: the warps that only fetch. One streams the weights of all blocks of the stack through a ring in shared
// memory, as far ahead as the ring goes and, into the second-level cache, beyond; it never waits for a result. Three
// stage what each block needs beside them, one block ahead.
#pragma once

#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackWorkers = 256, kStackStagers = 96, kStackThreads = kStackWorkers + kStackStagers + 32;
constexpr int kSlotWarps = 2;  // that share the products of a slot

struct StackBarriers {
  uint64_t full[kStackSlots], empty[kStackSlots], staged[2], spent[2];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_row(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void prefetch_row(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// What of the stack is this thread block's.
struct StackShare {
  int channel, channels;  // the first of D, and how many
  int row, rows;          // of E

  __device__ explicit StackShare(const StackParams& p) {
    channel = blockIdx.x * p.channels;
    channels = max(0, min(p.channels, p.f.inner - channel));
    row = blockIdx.x * p.rows;
    rows = max(0, min(p.rows, p.f.model - row));
  }
};

// How one of the two large weights is cut into slots: tiles of at most 16 of the thread block's rows, each cut along K.
struct StackTiles {
  int rows, columns, tile_rows, tiles, slot_columns, pieces;

  __device__ StackTiles(int rows, int columns)
      : rows(rows), columns(columns), slot_columns(quamba::slot_columns(columns)) {
    tiles = divide_up(rows, kTileWeightRows);
    tile_rows = tiles ? divide_up(rows, tiles) : 0;
    pieces = divide_up(columns, slot_columns);
  }
  __device__ int slots() const { return tiles * pieces; }
};

// Walks over the slots of the whole stack.
class StackCursor {
 public:
  __device__ StackCursor(const StackParams& p, const StackShare& share)
      : p_(p), share_(share), in_(2 * share.channels, p.f.model), out_(share.rows, p.f.inner) {
    skip_empty();
  }
  __device__ bool done() const { return block_ >= p_.blocks; }
  __device__ int rows() const { return min(now().tile_rows, now().rows - tile_ * now().tile_rows); }
  __device__ int bytes() const { return min(now().slot_columns, now().columns - piece_ * now().slot_columns); }
  __device__ int pitch() const { return operand_pitch(now().slot_columns); }
  // Row `i` of the slot.
  __device__ const int8_t* row(int i) const {
    const StackBlock& b = p_.block[block_];
    const int mine = tile_ * now().tile_rows + i;
    const int64_t column = piece_ * now().slot_columns;
    if (second_) return b.out_weight + static_cast<int64_t>(share_.row + mine) * p_.f.inner + column;
    const int half = mine >= share_.channels;
    const int64_t row = half * p_.f.inner + share_.channel + mine - half * share_.channels;
    return b.in_weight + row * p_.f.model + column;
  }
  __device__ void next() {
    if (++piece_ < now().pieces) return;
    piece_ = 0;
    if (++tile_ < now().tiles) return;
    tile_ = 0;
    advance();
    skip_empty();
  }

 private:
  __device__ const StackTiles& now() const { return second_ ? out_ : in_; }
  __device__ void advance() {
    block_ += second_;
    second_ = !second_;
  }
  __device__ void skip_empty() {
    for (int i = 0; i < 2 && now().tiles == 0; ++i) advance();
    if (now().tiles == 0) block_ = p_.blocks;
  }

  const StackParams& p_;
  const StackShare share_;
  const StackTiles in_, out_;
  int block_ = 0, tile_ = 0, piece_ = 0;
  bool second_ = false;
};

__device__ __forceinline__ void stream_weights(const StackParams& p, const StackShare& share, char* shared,
                                               StackBarriers& barriers) {
  const int lane = threadIdx.x & 31;
  StackCursor now(p, share), ahead(p, share);
  for (int i = 0; i < p.s.slots && !ahead.done(); ++i) ahead.next();
  const auto ask = [&] {
    if (lane < ahead.rows()) prefetch_row(ahead.row(lane), ahead.bytes());
    ahead.next();
  };
  for (int i = 0; i < p.prefetch && !ahead.done(); ++i) ask();
  int slot = 0, round = 0;
  for (; !now.done(); now.next()) {
    barrier_wait(&barriers.empty[slot], (round & 1) ^ 1);
    const int rows = now.rows(), bytes = now.bytes();
    if (lane == 0) barrier_expect(&barriers.full[slot], rows * bytes);
    __syncwarp();
    if (lane < rows)
      copy_row(shared + slot * p.s.slot_bytes + lane * now.pitch(), now.row(lane), bytes, &barriers.full[slot]);
    if (p.prefetch && !ahead.done()) ask();
    if (++slot == p.s.slots) slot = 0, ++round;
  }
}

__device__ __forceinline__ float any_or(const void* data, Type type, int64_t i, float otherwise) {
  return data ? AnyVector{data, type}[i] : otherwise;
}

// What a channel's products and rounding need. All of it is asked for before the first number is used.
__device__ __forceinline__ void stage_channel(const StackFormat& f, const StackBlock& b, int64_t c, int stride,
                                              float* to) {
  const auto bits = [](const void* data, Type type, int64_t i) { return data ? load_bits({data, type}, i) : 0u; };
  const uint32_t bias_x = bits(b.in_bias, f.in_bias, c), bias_z = bits(b.in_bias, f.in_bias, f.inner + c);
  const uint32_t conv_bias = bits(b.conv_bias, f.conv_bias, c), dt_bias = bits(b.dt_bias, f.dt_bias, c);
  const uint32_t skip = bits(b.D, f.D, c);
  const float in_x = b.in_weight_scale[c * f.in_weight_scale];
  const float in_z = b.in_weight_scale[(f.inner + c) * f.in_weight_scale];
  const float scale_x = b.xz_scale[c], scale_z = b.xz_scale[f.inner + c];
  const float conv = b.conv_weight_scale[c * f.conv_weight_scale];
  const float x_scale = b.x_scale[c * f.x_scale], scan_scale = b.x_scan_scale[c * f.x_scan_scale];
  const float dt = b.dt_weight_scale[c * f.dt_weight_scale], u = *b.u_scale, d = *b.dbc_scale;
  const float dt_scale = b.dt_scale ? b.dt_scale[c * f.dt_scale] : 1.0f;
  to[kInX * stride] = __fmul_rn(u, in_x);
  to[kInZ * stride] = __fmul_rn(u, in_z);
  to[kBiasX * stride] = from_bits(bias_x, f.in_bias);
  to[kBiasZ * stride] = from_bits(bias_z, f.in_bias);
  to[kScaleX * stride] = scale_x;
  to[kScaleZ * stride] = scale_z;
  to[kConvFactor * stride] = scale_x * conv;
  to[kConvBias * stride] = from_bits(conv_bias, f.conv_bias);
  to[kXScale * stride] = x_scale;
  to[kScanScale * stride] = scan_scale;
  to[kDtFactor * stride] = __fmul_rn(d, dt);
  to[kDtScale * stride] = dt_scale;
  to[kDtBias * stride] = from_bits(dt_bias, f.dt_bias);
  to[kSkip * stride] = from_bits(skip, f.D);
  for (int k = 0; k < f.width; ++k) to[(kTaps + k) * stride] = static_cast<float>(b.conv_weight[c * f.width + k]);
}

__device__ __forceinline__ float dbc_number(const StackFormat& f, const StackBlock& b, int field, int r) {
  switch (field) {
    case kDbcFactor:
      return __fmul_rn(*b.x_in_scale, b.x_weight_scale[r * f.x_weight_scale]);
    case kDbcScale:
      return b.dbc_scale[r];
    default: {
      const int rank = f.rank, size = f.states;
      const void* const data = r < rank ? b.d_norm_weight : r < rank + size ? b.B_norm_weight : b.C_norm_weight;
      return any_or(data, f.dbc_norm_weight, r < rank ? r : (r - rank) % size, 1.0f);
    }
  }
}

// Copies words; several loads are under way before the first store.
template <typename From, typename Put>
__device__ __forceinline__ void stage_words(int count, int thread, From&& from, Put&& put) {
  constexpr int kBatch = 8;
  for (int i0 = thread; i0 < count; i0 += kBatch * kStackStagers) {
    int word[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackStagers;
      word[u] = i < count ? __ldg(from(i)) : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kStackStagers;
      if (i < count) put(i, word[u]);
    }
  }
}

__device__ __forceinline__ void stage_blocks(const StackParams& p, const StackShare& share, char* shared,
                                             StackBarriers& barriers) {
  const StackFormat& f = p.f;
  const int thread = threadIdx.x - kStackWorkers, sums = f.rank + 2 * f.states;
  const int words = share.channels / 4, pitch = (p.channels / 4) | 1;
  const int dt_words = f.rank / 4, dt_pitch = dt_words | 1;
  for (int l = 0; l < p.blocks; ++l) {
    const StackBlock& b = p.block[l];
    // The states will be read and written by the workers: only the second-level cache may hold them beforehand.
    const int lines = divide_up(share.channels * f.states * 4, 128);
    for (int i = thread; i < p.tokens * lines; i += kStackStagers) {
      const float* state = b.ssm_state + i / lines * f.ssm_batch + static_cast<int64_t>(share.channel) * f.states;
      prefetch_line(state + i % lines * 32);
    }
    for (int m = thread; m < p.tokens; m += kStackStagers) {
      const int8_t* state = b.conv_state + m * f.conv_batch + static_cast<int64_t>(share.channel) * f.width;
      for (int i = 0; i < share.channels * f.width; i += 128) prefetch_line(state + i);
    }

    barrier_wait(&barriers.spent[l & 1], ((l >> 1) & 1) ^ 1);
    char* const buffer = shared + p.s.buffer[l & 1];
    int* const x_weight = reinterpret_cast<int*>(buffer + p.s.x_weight);
    stage_words(
        sums * words, thread,
        [&](int i) {
          return reinterpret_cast<const int*>(b.x_weight + static_cast<int64_t>(i / words) * f.inner + share.channel) +
                 i % words;
        },
        [&](int i, int word) { x_weight[i / words * pitch + i % words] = word; });
    int* const dt_weight = reinterpret_cast<int*>(buffer + p.s.dt_weight);
    const int* const dt_from = reinterpret_cast<const int*>(b.dt_weight + static_cast<int64_t>(share.channel) * f.rank);
    stage_words(
        share.channels * dt_words, thread, [&](int i) { return dt_from + i; },
        [&](int i, int word) { dt_weight[i / dt_words * dt_pitch + i % dt_words] = word; });
    float* const A = reinterpret_cast<float*>(buffer + p.s.A);
    const int* const A_from = reinterpret_cast<const int*>(b.A + static_cast<int64_t>(share.channel) * f.states);
    stage_words(
        share.channels * f.states, thread, [&](int i) { return A_from + i; },
        [&](int i, int word) { A[i] = __int_as_float(word) * kLog2E; });
    float* const channel = reinterpret_cast<float*>(buffer + p.s.channel);
    for (int c = thread; c < share.channels; c += kStackStagers)
      stage_channel(f, b, share.channel + c, p.channels, channel + c);
    float* const dbc = reinterpret_cast<float*>(buffer + p.s.dbc);
    for (int field = 0; field < kDbcFields; ++field)
      for (int r = thread; r < sums; r += kStackStagers) dbc[field * sums + r] = dbc_number(f, b, field, r);
    float* const out = reinterpret_cast<float*>(buffer + p.s.out);
    for (int e = thread; e < share.rows; e += kStackStagers) {
      const int64_t row = share.row + e;
      out[e] = __fmul_rn(*b.g_scale, b.out_weight_scale[row * f.out_weight_scale]);
      out[p.rows + e] = any_or(b.out_bias, f.out_bias, row, 0.0f);
    }
    barrier_arrive(&barriers.staged[l & 1]);
  }
}

}  // namespace quamba
