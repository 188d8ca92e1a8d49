// mixers_step: the warps that only fetch. One streams the weights of all blocks of the stack through a ring in shared
// memory, as far ahead as the ring goes and, into the second-level cache, beyond; it never waits for a result. Three
// stage what each block needs beside them, one block ahead.
#pragma once

#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackWorkers = 256, kStackStagers = 96, kStackThreads = kStackWorkers + kStackStagers + 32;
constexpr int kTeamWarps = kStackWorkers / 32 / kTeams;

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

  __device__ StackTiles(int rows, int columns, int most)
      : rows(rows), columns(columns), slot_columns(quamba::slot_columns(columns, most)) {
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
      : p_(p), share_(share), in_(2 * share.channels, p.f.model, p.s.slot_columns), out_(share.rows, p.f.inner, p.s.slot_columns) {
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
  int slot = 0, round = 0, late = 0, late_round = 0, issued = 0;
  for (StackCursor now(p, share); !now.done(); now.next()) {
    // Requests beyond what keeps the memory busy would only delay the workers' own, which share the way to it.
    if (issued >= p.flight) {
      barrier_wait(&barriers.full[late], late_round & 1);
      if (++late == p.s.slots) late = 0, ++late_round;
    }
    barrier_wait(&barriers.empty[slot], (round & 1) ^ 1);
    const int rows = now.rows(), bytes = now.bytes();
    if (lane == 0) barrier_expect(&barriers.full[slot], rows * bytes);
    __syncwarp();
    if (lane < rows)
      copy_row(shared + slot * p.s.slot_bytes + lane * now.pitch(), now.row(lane), bytes, &barriers.full[slot]);
    ++issued;
    if (++slot == p.s.slots) slot = 0, ++round;
  }
}

__device__ __forceinline__ void copy_word(char* to, const char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Copies `bytes`, a multiple of 4, to offset `to` of the buffer; what is absent stays what it was.
static __device__ __noinline__ void stage(char* to, const void* from, int bytes, int thread) {
  if (from == nullptr) return;
#pragma unroll 1
  for (int i = 4 * thread; i < bytes; i += 4 * kStackStagers) copy_word(to + i, static_cast<const char*>(from) + i);
}

// `count` scales from index `first` on, or the one there is.
__device__ __forceinline__ void stage_scale(char* to, const float* from, int stride, int64_t first, int count,
                                            int thread) {
  if (from != nullptr) stage(to, from + first * stride, stride ? 4 * count : 4, thread);
}

__device__ __forceinline__ void stage_vector(char* to, const void* from, Type type, int64_t first, int count,
                                             int thread) {
  const int size = size_of(type);
  if (from != nullptr) stage(to, static_cast<const char*>(from) + first * size, count * size, thread);
}

// Not inline: its addresses would take registers from the workers.
static __device__ __noinline__ void stage_blocks(const StackParams& p, const StackShare& share, char* shared,
                                             StackBarriers& barriers) {
  const StackFormat& f = p.f;
  const int thread = threadIdx.x - kStackWorkers, sums = f.rank + 2 * f.states, count = share.channels;
  const int words = count / 4, pitch = (p.channels / 4) | 1;
  const int dt_words = f.rank / 4, dt_pitch = dt_words | 1;
  const int64_t first = share.channel;
  for (int l = 0; l < p.blocks; ++l) {
    const StackBlock& b = p.block[l];
    // The states will be read and written by the workers: only the second-level cache may hold them beforehand.
    const int lines = divide_up(count * f.states * 4, 128);
    for (int i = thread; i < p.tokens * lines; i += kStackStagers)
      prefetch_line(b.ssm_state + i / lines * f.ssm_batch + first * f.states + i % lines * 32);
    for (int m = thread; m < p.tokens; m += kStackStagers)
      for (int i = 0; i < count * f.width; i += 128)
        prefetch_line(b.conv_state + m * f.conv_batch + first * f.width + i);

    barrier_wait(&barriers.spent[l & 1], ((l >> 1) & 1) ^ 1);
    char* const buffer = shared + p.s.buffer[l & 1];
    const auto field = [&](int i) { return buffer + p.s.fields + i * p.s.field_bytes; };
#pragma unroll 4
    for (int i = thread; i < sums * words; i += kStackStagers) {
      const int r = i / words, w = i - r * words;
      copy_word(buffer + p.s.x_weight + (r * pitch + w) * 4,
                reinterpret_cast<const char*>(b.x_weight + static_cast<int64_t>(r) * f.inner + first) + 4 * w);
    }
    const char* const dt_from = reinterpret_cast<const char*>(b.dt_weight + first * f.rank);
#pragma unroll 4
    for (int i = thread; i < count * dt_words; i += kStackStagers) {
      const int c = i / dt_words, w = i - c * dt_words;
      copy_word(buffer + p.s.dt_weight + (c * dt_pitch + w) * 4, dt_from + 4 * i);
    }
    stage(buffer + p.s.A, b.A + first * f.states, count * f.states * 4, thread);
    stage(buffer + p.s.taps, b.conv_weight + first * f.width, count * f.width, thread);
    stage_scale(field(kInX), b.in_weight_scale, f.in_weight_scale, first, count, thread);
    stage_scale(field(kInZ), b.in_weight_scale, f.in_weight_scale, f.inner + first, count, thread);
    stage_vector(field(kBiasX), b.in_bias, f.in_bias, first, count, thread);
    stage_vector(field(kBiasZ), b.in_bias, f.in_bias, f.inner + first, count, thread);
    stage_scale(field(kScaleX), b.xz_scale, 1, first, count, thread);
    stage_scale(field(kScaleZ), b.xz_scale, 1, f.inner + first, count, thread);
    stage_scale(field(kConvScale), b.conv_weight_scale, f.conv_weight_scale, first, count, thread);
    stage_vector(field(kConvBias), b.conv_bias, f.conv_bias, first, count, thread);
    stage_scale(field(kXScale), b.x_scale, f.x_scale, first, count, thread);
    stage_scale(field(kScanScale), b.x_scan_scale, f.x_scan_scale, first, count, thread);
    stage_scale(field(kDtWeightScale), b.dt_weight_scale, f.dt_weight_scale, first, count, thread);
    stage_scale(field(kDtScale), b.dt_scale, f.dt_scale, first, count, thread);
    stage_vector(field(kDtBias), b.dt_bias, f.dt_bias, first, count, thread);
    stage_vector(field(kSkip), b.D, f.D, first, count, thread);
    stage_scale(buffer + p.s.dbc, b.x_weight_scale, f.x_weight_scale, 0, sums, thread);
    stage_scale(buffer + p.s.dbc + 4 * sums, b.dbc_scale, 1, 0, sums, thread);
    char* const norms = buffer + p.s.dbc + 8 * sums;
    const int size = size_of(f.dbc_norm_weight);
    stage_vector(norms, b.d_norm_weight, f.dbc_norm_weight, 0, f.rank, thread);
    stage_vector(norms + f.rank * size, b.B_norm_weight, f.dbc_norm_weight, 0, f.states, thread);
    stage_vector(norms + (f.rank + f.states) * size, b.C_norm_weight, f.dbc_norm_weight, 0, f.states, thread);
    stage_scale(buffer + p.s.out, b.out_weight_scale, f.out_weight_scale, share.row, share.rows, thread);
    stage_vector(buffer + p.s.out + 4 * p.rows, b.out_bias, f.out_bias, share.row, share.rows, thread);
    stage_scale(buffer + p.s.single + 4 * kUScale, b.u_scale, 0, 0, 1, thread);
    stage_scale(buffer + p.s.single + 4 * kXInScale, b.x_in_scale, 0, 0, 1, thread);
    stage_scale(buffer + p.s.single + 4 * kGScale, b.g_scale, 0, 0, 1, thread);
    stage_vector(buffer + p.s.norm, b.norm_weight, f.norm_weight, 0, f.model, thread);
    int* const block = reinterpret_cast<int*>(buffer + p.s.block);
    for (int i = thread; i < static_cast<int>(sizeof(StackBlock) / 4); i += kStackStagers)
      block[i] = reinterpret_cast<const int*>(&b)[i];
    barrier_arrive(&barriers.staged[l & 1]);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barriers.staged[l & 1]))
                 : "memory");
  }
}

// What the stagers copied for one block of the stack, as the workers read it.
class StackNumbers {
 public:
  __device__ StackNumbers(const StackParams& p, const char* buffer)
      : p_(p), b_(*reinterpret_cast<const StackBlock*>(buffer + p.s.block)), buffer_(buffer) {}
  __device__ const StackBlock& block() const { return b_; }
  __device__ AnyVector norm_weight() const { return {buffer_ + p_.s.norm, p_.f.norm_weight}; }
  __device__ const int* x_weight() const { return reinterpret_cast<const int*>(buffer_ + p_.s.x_weight); }
  __device__ const int* dt_weight() const { return reinterpret_cast<const int*>(buffer_ + p_.s.dt_weight); }
  __device__ const float* A() const { return reinterpret_cast<const float*>(buffer_ + p_.s.A); }
  __device__ const int8_t* taps() const { return reinterpret_cast<const int8_t*>(buffer_ + p_.s.taps); }
  __device__ float single(int which) const { return floats(p_.s.single)[which]; }
  __device__ float in(bool z, int c) const {
    return __fmul_rn(single(kUScale), field(z ? kInZ : kInX, c * p_.f.in_weight_scale));
  }
  __device__ float bias(bool z, int c) const { return vector(z ? kBiasZ : kBiasX, b_.in_bias, p_.f.in_bias, c); }
  __device__ float scale(bool z, int c) const { return field(z ? kScaleZ : kScaleX, c); }
  __device__ float conv(int c) const { return scale(false, c) * field(kConvScale, c * p_.f.conv_weight_scale); }
  __device__ float conv_bias(int c) const { return vector(kConvBias, b_.conv_bias, p_.f.conv_bias, c); }
  __device__ float x(int c) const { return field(kXScale, c * p_.f.x_scale); }
  __device__ float scan_x(int c) const { return field(kScanScale, c * p_.f.x_scan_scale); }
  __device__ float dt_weight_scale(int c) const {
    return __fmul_rn(dbc(0), field(kDtWeightScale, c * p_.f.dt_weight_scale));
  }
  __device__ float dt(int c) const { return field(kDtScale, c * p_.f.dt_scale); }
  __device__ float dt_bias(int c) const { return vector(kDtBias, b_.dt_bias, p_.f.dt_bias, c); }
  __device__ float skip(int c) const { return vector(kSkip, b_.D, p_.f.D, c); }
  __device__ float x_sum(int r) const {
    return __fmul_rn(single(kXInScale), floats(p_.s.dbc)[r * p_.f.x_weight_scale]);
  }
  __device__ float dbc(int r) const { return floats(p_.s.dbc)[p_.f.rank + 2 * p_.f.states + r]; }
  __device__ float dbc_norm(int r) const {
    const int offset = p_.s.dbc + 8 * (p_.f.rank + 2 * p_.f.states);
    return AnyVector{buffer_ + offset, p_.f.dbc_norm_weight}[r];
  }
  __device__ float out(int e) const {
    return __fmul_rn(single(kGScale), floats(p_.s.out)[e * p_.f.out_weight_scale]);
  }
  __device__ float out_bias(int e) const {
    return b_.out_bias ? AnyVector{buffer_ + p_.s.out + 4 * p_.rows, p_.f.out_bias}[e] : 0.0f;
  }

 private:
  __device__ const float* floats(int offset) const { return reinterpret_cast<const float*>(buffer_ + offset); }
  __device__ float field(int i, int c) const { return floats(p_.s.fields + i * p_.s.field_bytes)[c]; }
  __device__ float vector(int i, const void* data, Type type, int c) const {
    return data ? AnyVector{buffer_ + p_.s.fields + i * p_.s.field_bytes, type}[c] : 0.0f;
  }

  const StackParams& p_;
  const StackBlock& b_;
  const char* buffer_;
};

}  // namespace quamba
