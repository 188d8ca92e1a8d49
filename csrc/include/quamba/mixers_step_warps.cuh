// mixers_step: the warps that only fetch. Two stream the weights of all blocks of the stack through a ring in shared
// memory, as far ahead as the ring goes; they never wait for a result. Two stage what each block needs beside them, one
// block ahead.
#pragma once

#include "quamba/barrier.cuh"
#include "quamba/leaves_first.cuh"
#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackWorkers = 256, kStackStagers = 64, kStackStreams = 2;  // the last: warps
constexpr int kStackManyWorkers = 512;
constexpr int kStackThreads = kStackWorkers + kStackStagers + 32 * kStackStreams;
constexpr int kTeamWarps = kStackWorkers / 32 / kTeams;

// All of a thread block's numbers fit one register's address: the compiler would otherwise work out where shared memory
// begins at every use, from a special register, some fifty cycles each.
__device__ __forceinline__ char* kept_address(char* memory) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  asm volatile("" : "+r"(address));
  return static_cast<char*>(__cvta_shared_to_generic(address));
}

struct StackBarriers {
  uint64_t full[kStackSlots], empty[kStackSlots];
  uint64_t staged[2], spent[2], body_staged, body_spent;  // of the heads, of the body
  uint64_t turned, rounded;
  // For many sequences; `quick` is passed when the stream should be quick, and when it should not be any more.
  uint64_t gathered, quick;
};

__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives once the thread's copies have.
__device__ __forceinline__ void barrier_arrive_copied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void copy_row(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ unsigned cycles() {
  unsigned now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// How one of the two large weights is cut into slots: tiles of 16 of the thread block's rows, then one of the rest,
// each cut along K. The rest, of fewer rows, is cut into longer pieces, so that slots are full.
struct StackTiles {
  int rows, columns;
  int first_column, pitch;                      // in memory
  int whole, pieces = 0, slot_columns = 0;      // tiles of 16 rows, the slots of each and their columns
  int rest, rest_pieces = 0, rest_columns = 0;  // rows of the last tile, its slots and their columns

  StackTiles() = default;
  __host__ __device__ constexpr StackTiles(int rows, int columns, const StackShared& s, int parts = 1, int part = 0)
      : rows(rows),
        columns(columns / parts),
        first_column(part * (columns / parts)),
        pitch(columns),
        whole(rows / kTileWeightRows),
        rest(rows % kTileWeightRows) {
    columns = this->columns;
    slot_columns = quamba::slot_columns(columns, s.slot_columns);
    pieces = divide_up(columns, slot_columns);
    rest_pieces = 0, rest_columns = slot_columns;
    if (rest == 0) return;
    int most = (s.slot_bytes / rest - 64) / 64 * 64;
    if (most < slot_columns) most = slot_columns;
    const int even = round_up(divide_up(columns, kTeams), 64);
    if (whole == 0 && most > even) most = even;  // for each team some
    rest_columns = quamba::slot_columns(columns, most), rest_pieces = divide_up(columns, rest_columns);
  }
  __host__ __device__ constexpr int slots() const { return whole * pieces + rest_pieces; }
  __device__ int pieces_of(int tile) const { return tile < whole ? pieces : rest_pieces; }
  __device__ int rows_of(int tile) const { return tile < whole ? kTileWeightRows : rest; }
  __device__ int columns_of(int tile) const { return tile < whole ? slot_columns : rest_columns; }
};

// What of the stack is this thread block's. In shared memory: one thread computes it.
struct StackShare {
  int channel, channels;  // the first of D, and how many
  int row, rows;          // of E
  int product_row;        // of W_out's tiles the first: a cluster's with many sequences, of which each has some columns
  StackDivisor over_channels, over_rows;
  int at_once;            // sequences that many workers have at a time, four for a channel; 0: not all channels
  StackTiles tiles[2];  // of W_in, of W_out

  StackShare() = default;
  __device__ explicit StackShare(const StackPlan& p) {
    channel = blockIdx.x * p.channels;
    channels = max(0, min(p.channels, p.f.inner - channel));
    row = blockIdx.x * p.rows;
    rows = max(0, min(p.rows, p.f.model - row));
    over_channels = StackDivisor(channels), over_rows = StackDivisor(rows);
    at_once = kStackManyWorkers / 4 / max(1, channels);
    tiles[0] = StackTiles(2 * channels, p.f.model, p.s);
    const int parts = p.parts, rank = blockIdx.x & (parts - 1);
    product_row = (blockIdx.x - rank) * p.rows;
    tiles[1] = StackTiles(max(0, min(parts * p.rows, p.f.model - product_row)), p.f.inner, p.s, parts, rank);
  }
};

// What a thread block has in front of the ring.
struct StackFixed {
  float signs[20 * 20];                // of the base matrix
  float partial[kStackManyWorkers / 32];  // of a sum over the workers
  StackBarriers barriers;
  StackShare share;
  StackPlan plan;  // for those who only fetch: constants are many there, and rare
};

static_assert(sizeof(StackFixed) <= kManyFixedBytes && kManyFixedBytes <= kStackFixedBytes,
              "the ring begins behind it");

// A warp issues copies one lane after the other, sixty cycles each, so that two share the rows of a slot. Not inline,
// as stage_blocks: the workers would lose registers.
static __device__ __noinline__ void stream_weights(const StackPlan& p, const StackBlock* blocks,
                                                   const StackShare& share, char* shared, StackBarriers& barriers) {
  const int lane = threadIdx.x & 31, first = threadIdx.x / 32 % kStackStreams, own = first + kStackStreams * lane;
  const int slots = p.s.slots, slot_bytes = p.s.slot_bytes, flight = p.flight;
  int slot = 0, round = 0, late = 0, late_round = 0, issued = 0;
  const unsigned pace = p.pace;
  const uint64_t policy = leaves_first();
  unsigned last = cycles() - pace;
  // Asked for half a block ahead: a constant that is read once comes from far.
  const int8_t* ahead = blocks[0].in_weight;
#pragma unroll 1
  for (int half = 0; half < 2 * p.blocks; ++half) {
    const bool second = half & 1;
    const StackTiles now = share.tiles[second];
    const int8_t* const weight = ahead;
    const int following = min((half + 1) / 2, p.blocks - 1);
    ahead = second ? blocks[following].in_weight : blocks[following].out_weight;
#pragma unroll 1
    for (int tile = 0; tile * kTileWeightRows < now.rows; ++tile) {
      const int rows = now.rows_of(tile), most = now.columns_of(tile), mine = tile * kTileWeightRows + own;
      const int row = second                   ? share.product_row + mine
                      : mine < share.channels ? share.channel + mine
                                              : p.f.inner + share.channel + mine - share.channels;
      const int8_t* const from = weight + static_cast<int64_t>(row) * now.pitch + now.first_column;
      char* const to = shared + own * operand_pitch(most);
      const int copies = max(0, divide_up(rows - first, kStackStreams));
#pragma unroll 1
      for (int column = 0; column < now.columns; column += most) {
        const int bytes = min(most, now.columns - column);
        // Requests beyond what keeps the memory busy would only delay the workers' own, which share the way to it.
        if (issued >= flight) {
          barrier_wait(&barriers.full[late], late_round & 1);
          if (++late == slots) late = 0, ++late_round;
        }
        barrier_wait(&barriers.empty[slot], (round & 1) ^ 1);
        // In bursts they would too: a slot is asked for when the one before has had its time.
        while (cycles() - last < pace) continue;
        last = cycles();
        if (lane == 0) barrier_expect(&barriers.full[slot], copies * bytes);
        __syncwarp();
        if (own < rows) copy_row(to + slot * slot_bytes, from + column, bytes, &barriers.full[slot], policy);
        ++issued;
        if (++slot == slots) slot = 0, ++round;
      }
    }
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

// Where the numbers begin that are published for block `l` of the stack, which are `count`.
__device__ __forceinline__ int turn(int l, int count) { return l % kStackTurns * count; }

// Not inline: the workers would lose registers.
template <int WORKERS, bool MANY>
static __device__ __noinline__ void stage_blocks(const StackPlan& p, const StackBlock* blocks,
                                                 const StackShare& share, char* shared, StackBarriers& barriers) {
  const StackFormat& f = p.f;
  const int thread = threadIdx.x - WORKERS, sums = p.over_sums.by, count = share.channels;
  const int64_t first = share.channel;
  const int x_width = p.s.x_weight_width, x_pieces = count / x_width;
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

    // To find out how a field is copied takes longer than to copy it: each warp has some of the fields.
    const auto copy_fields = [&](char* to, bool head) {
#pragma unroll 1
      for (int field = thread / 32; field < kStagedFields; field += kStackStagers / 32) {
        const char* const from = static_cast<const char*>(b.field[field]);
        if (from == nullptr || in_head(field) != head) continue;
        const StackCopy& copy = p.s.copy[field];
        const int begin = blockIdx.x * copy.stride;
        const int pieces = copy.stride ? min(copy.count, (copy.total - begin) / copy.width) : copy.count;
#pragma unroll 1
        for (int i = thread % 32; i < pieces; i += 32)
          copy_piece(to + copy.to + i * copy.step, from + begin + i * copy.from_step, copy.width);
      }
    };
    const int norm_lines = divide_up(f.model * size_of(f.norm_weight), 128);
#pragma unroll 1
    for (int i = blockIdx.x + thread * p.grid; i < norm_lines; i += kStackStagers * p.grid)
      prefetch_line(static_cast<const char*>(b.field[kNormWeight]) + 128 * i);
    barrier_wait(&barriers.spent[l & 1], ((l >> 1) & 1) ^ 1);
    char* const head = shared + p.s.head[l & 1];
    int* const block = reinterpret_cast<int*>(head + p.s.block);
#pragma unroll 1
    for (int i = thread; i < static_cast<int>(sizeof(StackBlock) / 4); i += kStackStagers)
      block[i] = reinterpret_cast<const int*>(&b)[i];
    copy_fields(head, true);
    // What the workers will publish in this block of the stack goes where block l - 4's g was, and block l - 3's
    // residual stream: all have read these, as they all contributed to what the workers of block l - 2 needed. All will
    // see them cleared before they wait for the new ones, as they need other things of this block before.
#pragma unroll 1
    for (int m = 0; m < p.tokens; ++m) {
#pragma unroll 1
      for (int i = thread; i < count; i += kStackStagers)
        p.g[turn(l, p.tokens * f.inner) + m * f.inner + share.channel + i] = 0;
#pragma unroll 1
      for (int i = thread; i < share.rows; i += kStackStagers)
        p.residual[turn(l + 1, p.tokens * f.model) + m * f.model + share.row + i] = 0;
    }
    if constexpr (MANY) {
      // The same for the bytes, whoever writes them: what all contribute to comes before.
      const int groups = divide_up(p.tokens, 8), own = blockIdx.x * kStackStagers + thread, step = kStackStagers * p.grid;
      const auto clear = [&](unsigned* words, int count) {
#pragma unroll 1
        for (int i = own; i < count; i += step) words[i] = 0;
      };
      const int values = p.over_sums.by * 8 * groups, u = many_bytes(groups, f.model) / 4,
                g = many_bytes(groups, f.inner) / 4;
      clear(p.sums + turn(l, values), values);
      clear(p.u_words + turn(l + 1, u), u);
      clear(p.g_words + turn(l, g), g);
    }
    __threadfence();
    barrier_arrive(&barriers.staged[l & 1]);
    barrier_arrive_copied(&barriers.staged[l & 1]);

    barrier_wait(&barriers.body_spent, (l & 1) ^ 1);
    char* const body = shared + p.s.body;
    copy_fields(body, false);
#pragma unroll 1
    for (int i = thread; i < sums * x_pieces; i += kStackStagers) {
      const int r = i / x_pieces, at = (i - r * x_pieces) * x_width;
      copy_piece(body + p.s.x_weight + r * p.s.x_weight_pitch * 4 + at,
                 reinterpret_cast<const char*>(b.x_weight) + static_cast<int64_t>(r) * f.inner + first + at, x_width);
    }
    barrier_arrive_copied(&barriers.body_staged);
  }
}

// What the stagers copied for one block of the stack, as the workers read it.
class StackNumbers {
 public:
  __device__ StackNumbers(const StackPlan& p, const char* head, const char* body) : p_(p), head_(head), body_(body) {}
  __device__ const StackBlock& block() const { return *at<StackBlock>(head_ + p_.s.block); }
  // One of kUScale, kXInScale, kGScale.
  __device__ float one(StackField field) const { return at<float>(head_)[field - kUScale]; }
  // Of a row of W_out: the scale, the bias.
  __device__ const float* row(int e) const { return at<float>(head_ + p_.s.row_numbers) + e * kRowWords; }

  __device__ const int* x_weight() const { return at<int>(body_ + p_.s.x_weight); }
  __device__ const float* A() const { return at<float>(body_ + p_.s.A); }
  __device__ const int8_t* taps() const { return at<int8_t>(body_ + p_.s.taps); }
  __device__ const int* dt_weight() const { return at<int>(body_ + p_.s.dt_weight); }
  // Of a channel: by field up to kSkip.
  __device__ const float* channel(int c) const { return at<float>(body_) + c * kChannelWords; }
  // Of a sum of W_x: the weight's scale, the result's, the norm's weight.
  __device__ const float* sum(int r) const { return at<float>(body_ + p_.s.sum_numbers) + r * kSumWords; }

 private:
  template <typename T>
  __device__ static const T* at(const char* place) {
    return reinterpret_cast<const T*>(place);
  }

  const StackPlan& p_;
  const char *head_, *body_;
};

}  // namespace quamba
