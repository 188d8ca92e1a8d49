// mixers_step: how a launch divides the work and each thread block's shared memory. On the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "op.h"
#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackLeastSlots = 4;
constexpr int kStackLeastChannels = 16;  // of a thread block, for one sequence
constexpr int kStackWorkersOfColumns = 256;  // of a shared transform, at most: a worker has one

// The largest width of a copy, in bytes, that divides them all.
inline int copy_width(int bits) { return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 4; }

// The fields of a block, as mixers_step_warps.cuh copies them: their places in head and body, whose sizes these are.
// `aligned_to` holds for each the alignment that its pointers share.
struct StackSizes {
  int head, body;
};

inline StackSizes plan_fields(StackPlan* p, const int* aligned_to) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int D = f.inner, N = f.states, R = f.rank, sums = R + 2 * N, channels = p->channels, words = channels / 4;
  StackSizes at = {kStackOnes, 0};
  const auto take = [](int* at, int bytes) {
    const int offset = *at;
    *at += round_up(bytes, 16);
    return offset;
  };
  // Numbers of fields that lie together: a thread block's `own` of `all`, or with own = 0 all. stride = 0: there is
  // one.
  const auto numbers = [&](StackField which, int to, int step, int stride, int own, int all) {
    s.copy[which] = {to, 4 * step, 4, 4 * stride, own ? own : all, 4 * own * stride, 4 * all};
  };
  const auto array = [&](StackField which, int each, int own, int all) {
    const int bytes = each * (own ? own : all), width = copy_width(bytes | each * own | each * all | aligned_to[which]);
    const int to = take(&at.body, bytes);
    s.copy[which] = {to, width, width, width, divide_up(bytes, width), each * own, each * all};
    return to;
  };

  const int first = take(&at.body, 4 * kChannelWords * channels);
  const int strides[kChannelFields] = {f.in_weight_scale,   f.in_weight_scale, 1, 1,           1,
                                       1,                   f.conv_weight_scale, 1, f.x_scale, f.x_scan_scale,
                                       f.dt_weight_scale, f.dt_scale,          1, 1};
  for (int i = 0; i < kChannelFields; ++i)
    numbers(static_cast<StackField>(i), first + 4 * i, kChannelWords, strides[i], channels, D);
  s.sum_numbers = take(&at.body, 4 * kSumWords * sums);
  numbers(kXSumScale, s.sum_numbers, kSumWords, f.x_weight_scale, 0, sums);
  numbers(kDbcScale, s.sum_numbers + 4, kSumWords, 1, 0, sums);
  numbers(kDNorm, s.sum_numbers + 8, kSumWords, 1, 0, R);
  numbers(kBNorm, s.sum_numbers + 8 + 4 * kSumWords * R, kSumWords, 1, 0, N);
  numbers(kCNorm, s.sum_numbers + 8 + 4 * kSumWords * (R + N), kSumWords, 1, 0, N);
  s.row_numbers = take(&at.head, 4 * kRowWords * p->rows);
  numbers(kOutScale, s.row_numbers, kRowWords, f.out_weight_scale, p->rows, f.model);
  numbers(kOutBias, s.row_numbers + 4, kRowWords, 1, p->rows, f.model);
  for (int i = kUScale; i <= kGScale; ++i) numbers(static_cast<StackField>(i), 4 * (i - kUScale), 1, 1, 0, 1);
  s.A = array(kA, 4 * N, channels, D), s.taps = array(kTaps, f.width, channels, D);
  s.dt_weight = array(kDtWeight, R, channels, D);
  // Neighbouring rows begin on different banks, at a multiple of what is copied at a time.
  s.x_weight_pitch = channels % 16 == 0 ? words + 4 : words % 4 == 2 || words % 2 ? words : words + 2;
  s.x_weight_width = copy_width(channels | D);
  s.x_weight = take(&at.body, sums * s.x_weight_pitch * 4);
  s.block = take(&at.head, sizeof(StackBlock));
  return at;
}

// Whether thread blocks can share a transform: each takes some columns of the (base, power) matrix, then some of its
// rows.
inline bool can_share_transform(const StackPlan& p) { return p.base > 1 && p.power <= kStackWorkersOfColumns; }

// Whether the transform's memory serves the other parts of a block between transforms. Where thread blocks write into
// each other's they do not know of what else is in it.
inline bool shares_memory(const StackPlan& p) { return p.tokens >= kStackDistributed && !can_share_transform(p); }

// The ring of weight tiles in so many bytes, or less: of the ways to cut rows, the one that has most in it. Copies of
// less than 1280 bytes leave half of the memory's speed, so they are for those who have no room.
inline int plan_ring(StackPlan* p, int available) {
  StackShared& s = p->s;
  s.slots = s.slot_bytes = 0;
  for (int columns = kSlotColumns; columns >= 256 && (columns >= 1280 || s.slots == 0); columns /= 2) {
    const int bytes = kTileWeightRows * std::max(operand_pitch(slot_columns(p->f.model, columns)),
                                                 operand_pitch(slot_columns(p->f.inner / p->parts, columns)));
    const int slots = std::min((available - kStackFixedBytes) / bytes, kStackSlots);
    if (slots >= kStackLeastSlots && slots * bytes > s.slots * s.slot_bytes)
      s.slots = slots, s.slot_bytes = bytes, s.slot_columns = columns;
  }
  return s.slots * s.slot_bytes;
}

inline void plan_shared(StackPlan* p, const int* aligned_to, int available) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int sums = f.rank + 2 * f.states, tokens = p->tokens;
  const StackSizes sizes = plan_fields(p, aligned_to);
  int at = 0;
  const auto take = [&](int bytes) {
    const int offset = at;
    at += round_up(bytes, 16);
    return offset;
  };
  // Behind the ring.
  const int act = take(tokens * std::max(operand_pitch(f.model), operand_pitch(f.inner)));
  const int acc = take(4 * kAccPitch * std::max(round_up(2 * p->channels, 16), round_up(p->rows, 16)));
  const int scratch = tokens * (sums * 4 + p->channels * 5 + f.rank);
  const int row = f.rotate ? 4 * (f.inner + f.inner / 16) : 0;  // with padded_index
  const int raw = take(shares_memory(*p) ? std::max(scratch, row) : row), own = shares_memory(*p) ? raw : take(scratch);
  const int kept = take(tokens * p->rows * 4);
  const int first = take(sizes.head), second = take(sizes.head), body = take(sizes.body);
  const int ring = plan_ring(p, available - at);
  s.act = ring + act, s.acc = ring + acc, s.raw = ring + raw, s.kept = ring + kept;
  s.scratch = ring + own;
  s.head[0] = ring + first, s.head[1] = ring + second, s.body = ring + body;
  s.total = kStackFixedBytes + ring + at;
}

// The same for many sequences: slots of eight rows, cut into as few pieces as the warps can have the columns of in
// registers, or into twice as many where there is no room for these.
inline int plan_ring_many(StackPlan* p, int available) {
  StackShared& s = p->s;
  s.slots = s.slot_bytes = 0;
  for (int most = kManyPieceColumns; s.slots < kStackLeastSlots && most >= kManyPieceColumns / 4; most /= 2) {
    for (int i = 0; i < 2; ++i) {
      const int all = i ? p->f.inner / p->parts : p->f.model;
      s.piece_columns[i] = round_up(divide_up(all, divide_up(all, most)), 32);
    }
    s.slot_bytes = kManyTileRows * many_slot_pitch(std::max(s.piece_columns[0], s.piece_columns[1]));
    s.slots = std::min((available - kManyFixedBytes) / s.slot_bytes, kStackSlots), s.slot_columns = most;
  }
  return s.slots * s.slot_bytes;
}

// The same for many sequences. The numbers of d, B and C before their norms lie where a transform's will.
inline void plan_shared_many(StackPlan* p, const int* aligned_to, int available) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int sums = f.rank + 2 * f.states, tokens = p->tokens, groups = divide_up(tokens, 8);
  const StackSizes sizes = plan_fields(p, aligned_to);
  int at = 0;
  const auto take = [&](int* offset, int bytes) {
    *offset = at;
    at += round_up(bytes, 16);
  };
  const int row = f.rotate ? 4 * (f.inner + f.inner / 16) : 0;  // with padded_index
  // What comes of the cluster's other thread blocks does so when nothing is left there of the transform.
  const int gathered = p->parts > 1 ? 4 * p->parts * tokens * p->rows : 0;
  take(&s.raw, std::max({row, gathered, f.norm_dbc ? 4 * tokens * sums : 0}));
  s.gathered = s.raw;
  // Here W_x's sums are added up, too.
  const int rows = std::max(round_up(2 * p->channels, 16), round_up(p->parts * p->rows, 16));
  take(&s.acc, std::max(4 * many_pitch(groups) * rows, 16 * p->over_quads.by));
  // Eight rows of these, four bytes each, hit all banks; matrix instructions take 32 columns at a time.
  s.x_pitch = round_up(p->channels, 32) + 16, s.d_pitch = round_up(f.rank, 32) + 16;
  take(&s.x, 8 * groups * s.x_pitch);
  take(&s.d, 8 * groups * s.d_pitch);
  take(&s.bc, 4 * tokens * 2 * f.states);
  take(&s.items, 8 * tokens * p->channels);
  take(&s.kept, 4 * tokens * p->rows);
  take(&s.head[0], sizes.head);
  take(&s.head[1], sizes.head);
  take(&s.body, sizes.body + 64);  // the last rows of weights are read beyond their ends
  const int ring = plan_ring_many(p, available - at);
  for (int* offset : {&s.raw, &s.acc, &s.x, &s.d, &s.bc, &s.items, &s.kept, &s.gathered, &s.head[0],
                      &s.head[1], &s.body})
    *offset += ring;
  s.total = kManyFixedBytes + ring + at;
}

// The transform's order, power times the base matrix's, as quamba.hadamard.decompose finds it.
inline void plan_transform(StackPlan* p) {
  int odd = p->f.inner;
  p->log_power = 0;
  for (; odd % 2 == 0; odd /= 2) ++p->log_power;
  const int twos = odd == 1 ? 0 : 2;
  p->base = odd << twos, p->log_power -= twos, p->power = 1 << std::max(p->log_power, 0);
  p->factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p->f.inner)));
}

// How many thread blocks share a transform, 1, 2 or 4, at most `most`.
inline int plan_cluster(const StackPlan& p, int most) {
  int cluster = can_share_transform(p) && most > 1 ? (most < 4 ? 2 : 4) : 1;
  while (cluster > 1 && (p.grid % cluster || p.base % cluster || p.power / cluster < 16 || p.tokens > p.grid / cluster))
    cluster /= 2;
  return cluster;
}

// The same for many sequences, where a cluster shares W_out, too; a power of two is transformed by one thread block.
inline int plan_cluster_many(const StackPlan& p, int most) {
  int cluster = p.base == 1 ? (most < 4 ? std::min(most, 2) : 4) : plan_cluster(p, most);
  while (cluster > 1 && (p.grid % cluster || p.f.inner % (64 * cluster))) cluster /= 2;
  return cluster;
}

// The least power of two that is no less.
inline int power_up(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Fours of W_x's sums for many sequences.
inline int many_quads(const StackPlan& p) { return p.over_sums.by / 4 * 8 * divide_up(p.tokens, 8); }

// MANY: for the kernel for many sequences. `room`: thread blocks that may be a cluster there, 1, 2 or 4.
template <bool MANY>
void plan_stack(StackPlan* p, const int* aligned_to, int tokens, int processors, int available, int room = 1) {
  const StackFormat& f = p->f;
  QUAMBA_CHECK(f.model % 16 == 0 && f.model <= kStackWidth && f.inner % 16 == 0 && f.states % 4 == 0 &&
                   f.rank % 4 == 0,
               "mixers_step: found E=", f.model, ", D=", f.inner, ", N=", f.states, ", R=", f.rank,
               "; expected multiples of 16, 16, 4, 4 and E up to ", kStackWidth, " on CUDA");
  p->base = 0;
  if (f.rotate) {
    plan_transform(p);
    const bool known = std::count(std::begin(kStackHadamards), std::end(kStackHadamards), p->base) > 0;
    QUAMBA_CHECK(known && p->log_power >= 4, "mixers_step: found D=", f.inner,
                 "; expected a power of two of at least 16, or 12 or 20 times one, where g is rotated");
  }
  p->over_sums = StackDivisor(f.rank + 2 * f.states);
  p->channels = round_up(divide_up(f.inner, processors), 4);
  // For one sequence, fewer thread blocks that wait for each other and columns of W_x that are copied by 16 bytes are
  // worth more than all multiprocessors.
  if (!MANY && tokens == 1) p->channels = std::max(p->channels, kStackLeastChannels);
  p->grid = divide_up(f.inner, p->channels);
  p->rows = round_up(divide_up(f.model, p->grid), 2);
  p->parts = p->cluster = MANY ? plan_cluster_many(*p, room) : 1;
  for (p->tokens = tokens;; p->tokens = (p->tokens + 1) / 2) {
    if (MANY) p->over_quads = StackDivisor(power_up(divide_up(many_quads(*p), p->grid)));
    MANY ? plan_shared_many(p, aligned_to, available) : plan_shared(p, aligned_to, available);
    if (p->s.slots >= kStackLeastSlots) return;
    QUAMBA_CHECK(p->tokens > 1, "mixers_step: found E=", f.model, ", D=", f.inner, ", N=", f.states, ", R=", f.rank,
                 "; a thread block has ", available, " bytes of shared memory, too few for them");
  }
}

// How many slots may be under way at a time, where so many bytes should be; two at least. Where the teams do not share
// the slots evenly, each slot goes from team to team. A team that waits for one must not take the round before for its
// own:
// what is as many slots as there are teams behind the one it had last has to be there.
inline int plan_flight(const StackShared& s, int bytes, int teams) {
  return std::min(std::max(bytes / s.slot_bytes, 2), s.slots % teams == 0 ? s.slots : s.slots - teams);
}

}  // namespace quamba
