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

__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives once the thread's copies have.
__device__ __forceinline__ void barrier_arrive_copied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
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

  __device__ explicit StackShare(const StackPlan& p) {
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
  __device__ StackCursor(const StackPlan& p, const StackBlock* blocks, const StackShare& share)
      : p_(p), blocks_(blocks), share_(share), in_(2 * share.channels, p.f.model, p.s.slot_columns), out_(share.rows, p.f.inner, p.s.slot_columns) {
    skip_empty();
  }
  __device__ bool done() const { return block_ >= p_.blocks; }
  __device__ int rows() const { return min(now().tile_rows, now().rows - tile_ * now().tile_rows); }
  __device__ int bytes() const { return min(now().slot_columns, now().columns - piece_ * now().slot_columns); }
  __device__ int pitch() const { return operand_pitch(now().slot_columns); }
  // Row `i` of the slot.
  __device__ const int8_t* row(int i) const {
    const StackBlock& b = blocks_[block_];
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

  const StackPlan& p_;
  const StackBlock* const blocks_;
  const StackShare share_;
  const StackTiles in_, out_;
  int block_ = 0, tile_ = 0, piece_ = 0;
  bool second_ = false;
};

__device__ __forceinline__ void stream_weights(const StackPlan& p, const StackBlock* blocks,
                                               const StackShare& share, char* shared, StackBarriers& barriers) {
  const int lane = threadIdx.x & 31;
  int slot = 0, round = 0, late = 0, late_round = 0, issued = 0;
  for (StackCursor now(p, blocks, share); !now.done(); now.next()) {
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

__device__ __forceinline__ void copy_piece(char* to, const char* from, int width) {
  const uint32_t address = shared_address(to);
  if (width == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else if (width == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
  }
}

// Not inline: the workers would lose registers, and room in the cache of instructions.
static __device__ __noinline__ void stage_blocks(const StackPlan& p, const StackBlock* blocks,
                                                 const StackShare& share, char* shared, StackBarriers& barriers) {
  const StackFormat& f = p.f;
  const int thread = threadIdx.x - kStackWorkers, sums = f.rank + 2 * f.states, count = share.channels;
  const int64_t first = share.channel;
  const int x_width = count % 16 == 0 && f.inner % 16 == 0 && p.channels % 16 == 0 ? 16
                      : count % 8 == 0 && p.channels % 8 == 0                    ? 8
                                                                                 : 4;
  const int pieces = count / x_width;
#pragma unroll 1
  for (int l = 0; l < p.blocks; ++l) {
    const StackBlock& b = blocks[l];
    // The states will be read and written by the workers: only the second-level cache may hold them beforehand.
    const int lines = divide_up(count * f.states * 4, 128);
#pragma unroll 1
    for (int i = thread; i < p.tokens * lines; i += kStackStagers)
      prefetch_line(b.ssm_state + i / lines * f.ssm_batch + first * f.states + i % lines * 32);
#pragma unroll 1
    for (int m = thread; m < p.tokens; m += kStackStagers)
#pragma unroll 1
      for (int i = 0; i < count * f.width; i += 128)
        prefetch_line(b.conv_state + m * f.conv_batch + first * f.width + i);

    barrier_wait(&barriers.spent[l & 1], ((l >> 1) & 1) ^ 1);
    char* const buffer = shared + p.s.buffer[l & 1];
    int* const block = reinterpret_cast<int*>(buffer + p.s.block);
#pragma unroll 1
    for (int i = thread; i < static_cast<int>(sizeof(StackBlock) / 4); i += kStackStagers)
      block[i] = reinterpret_cast<const int*>(&b)[i];
#pragma unroll 1
    for (int field = 0; field < kStackFields; ++field) {
      const char* const from = static_cast<const char*>(b.field[field]);
      if (from == nullptr) continue;
      const StackCopy& copy = p.s.copy[field];
      const int begin = blockIdx.x * copy.stride, bytes = min(copy.bytes, copy.total - begin);
#pragma unroll 1
      for (int i = thread * copy.width; i < bytes; i += kStackStagers * copy.width)
        copy_piece(buffer + copy.to + i, from + begin + i, copy.width);
    }
#pragma unroll 1
    for (int i = thread; i < sums * pieces; i += kStackStagers) {
      const int r = i / pieces, at = (i - r * pieces) * x_width;
      copy_piece(buffer + p.s.x_weight + r * p.s.x_weight_pitch * 4 + at,
                 reinterpret_cast<const char*>(b.x_weight) + static_cast<int64_t>(r) * f.inner + first + at, x_width);
    }
    barrier_arrive(&barriers.staged[l & 1]);
    barrier_arrive_copied(&barriers.staged[l & 1]);
  }
}

// What the stagers copied for one block of the stack, as the workers read it.
class StackNumbers {
 public:
  __device__ StackNumbers(const StackPlan& p, const char* buffer) : p_(p), buffer_(buffer) {}
  __device__ const StackBlock& block() const { return *reinterpret_cast<const StackBlock*>(buffer_ + p_.s.block); }
  __device__ const int* x_weight() const { return reinterpret_cast<const int*>(buffer_ + p_.s.x_weight); }
  template <typename T>
  __device__ const T* all(StackField field) const {
    return reinterpret_cast<const T*>(buffer_ + p_.s.copy[field].to);
  }
  __device__ float one(StackField field, int i = 0) const { return all<float>(field)[i]; }
  __device__ float in(bool z, int c) const {
    return __fmul_rn(one(kUScale), one(z ? kInZ : kInX, c * p_.f.in_weight_scale));
  }
  __device__ float bias(bool z, int c) const { return p_.f.has_in_bias ? one(z ? kBiasZ : kBiasX, c) : 0.0f; }
  __device__ float scale(bool z, int c) const { return one(z ? kScaleZ : kScaleX, c); }
  __device__ float conv(int c) const { return one(kScaleX, c) * one(kConvScale, c * p_.f.conv_weight_scale); }
  __device__ float conv_bias(int c) const { return p_.f.has_conv_bias ? one(kConvBias, c) : 0.0f; }
  __device__ float x(int c) const { return one(kXScale, c * p_.f.x_scale); }
  __device__ float scan_x(int c) const { return one(kScanScale, c * p_.f.x_scan_scale); }
  __device__ float dt_weight_scale(int c) const {
    return __fmul_rn(one(kDbcScale), one(kDtWeightScale, c * p_.f.dt_weight_scale));
  }
  __device__ float dt(int c) const { return one(kDtScale, c * p_.f.dt_scale); }
  __device__ float x_sum(int r) const { return __fmul_rn(one(kXInScale), one(kXSumScale, r * p_.f.x_weight_scale)); }
  __device__ float dbc_norm(int r) const {
    const int rank = p_.f.rank, size = p_.f.states;
    return r < rank ? one(kDNorm, r) : r < rank + size ? one(kBNorm, r - rank) : one(kCNorm, r - rank - size);
  }
  __device__ float out(int e) const { return __fmul_rn(one(kGScale), one(kOutScale, e * p_.f.out_weight_scale)); }
  __device__ float out_bias(int e) const { return p_.f.has_out_bias ? one(kOutBias, e) : 0.0f; }

 private:
  const StackPlan& p_;
  const char* buffer_;
};

}  // namespace quamba
