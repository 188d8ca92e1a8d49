// mixers_step: how a launch divides the work and each thread block's shared memory. On the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "op.h"
#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackLeastSlots = 4;
constexpr int kStackStaticBytes = 2048;  // of shared memory, for the barriers and the plan

// The fields of a block, as mixers_step_warps.cuh copies them: their places in a buffer, which begins with the columns of
// W_x. `aligned_to` holds for each the alignment that its pointers share. Returns the buffer's size.
inline int plan_buffer(StackPlan* p, const int* aligned_to) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int sums = f.rank + 2 * f.states, channels = p->channels, words = channels / 4;
  int at = 0;
  const auto take = [&](int bytes) {
    const int offset = at;
    at += round_up(bytes, 16);
    return offset;
  };
  // Neighbouring rows begin on different banks, at a multiple of what is copied at a time.
  s.x_weight_pitch = channels % 16 == 0 ? words + 4 : words % 4 == 2 || words % 2 ? words : words + 2;
  s.x_weight = take(sums * s.x_weight_pitch * 4);
  s.block = take(sizeof(StackBlock));
  // A field with `each` bytes for each of the thread block's `own` of `all`; own = 0: all is every thread block's.
  const auto field = [&](StackField which, int each, int own, int all) {
    StackCopy& copy = s.copy[which];
    copy.bytes = each * (own ? own : all), copy.stride = each * own, copy.total = each * all;
    copy.width = 4;
    for (int width = 16; width > 4; width /= 2)
      if (copy.bytes % width == 0 && copy.stride % width == 0 && copy.total % width == 0 &&
          aligned_to[which] % width == 0) {
        copy.width = width;
        break;
      }
    copy.to = take(copy.bytes);
  };
  const auto scale = [&](StackField which, int stride, int own, int all) {
    if (stride) {
      field(which, 4, own, all);
    } else {
      field(which, 4, 0, 1);
    }
  };
  const int D = f.inner;
  scale(kInX, f.in_weight_scale, channels, D), scale(kInZ, f.in_weight_scale, channels, D);
  scale(kConvScale, f.conv_weight_scale, channels, D), scale(kXScale, f.x_scale, channels, D);
  scale(kScanScale, f.x_scan_scale, channels, D), scale(kDtWeightScale, f.dt_weight_scale, channels, D);
  scale(kDtScale, f.dt_scale, channels, D), scale(kXSumScale, f.x_weight_scale, 0, sums);
  scale(kOutScale, f.out_weight_scale, p->rows, f.model);
  for (const StackField which : {kBiasX, kBiasZ, kScaleX, kScaleZ, kConvBias, kDtBias, kSkip}) field(which, 4, channels, D);
  field(kA, 4 * f.states, channels, D), field(kTaps, f.width, channels, D), field(kDtWeight, f.rank, channels, D);
  field(kDbcScale, 4, 0, sums), field(kDNorm, 4, 0, f.rank), field(kBNorm, 4, 0, f.states), field(kCNorm, 4, 0, f.states);
  field(kOutBias, 4, p->rows, f.model), field(kNormWeight, size_of(f.norm_weight), 0, f.model);
  for (const StackField which : {kUScale, kXInScale, kGScale}) field(which, 4, 0, 1);
  return at;
}

inline void plan_shared(StackPlan* p, const int* aligned_to, int available) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int sums = f.rank + 2 * f.states, tokens = p->tokens, buffer = plan_buffer(p, aligned_to);
  int at = 0;
  const auto take = [&](int bytes) {
    const int offset = at;
    at += round_up(bytes, 16);
    return offset;
  };
  // Behind the ring.
  const int act = take(tokens * std::max(operand_pitch(f.model), operand_pitch(f.inner)));
  const int groups = tokens <= 8 ? 8 : 16;
  const int acc = take(std::max(round_up(2 * p->channels, 16), round_up(p->rows, 16)) * groups * 4);
  const int scratch = tokens * (sums * 4 + p->channels * 5 + f.rank);
  const int rows = 4 * std::max(f.model, f.rotate ? f.inner + f.inner / 16 + 1 : 0);
  const int raw = take(std::max(scratch, rows));
  const int kept = take(tokens * p->rows * 4);
  const int first = take(buffer), second = take(buffer);
  // Of the ways to cut rows, the one that has most in the ring; a slot always is the same team's. Copies of less than
  // 1280 bytes leave half of the memory's speed, so they are for those who have no room.
  s.slots = s.slot_bytes = 0;
  for (int columns = kSlotColumns; columns >= 256 && (columns >= 1280 || s.slots == 0); columns /= 2) {
    const int bytes = kTileWeightRows * std::max(operand_pitch(slot_columns(f.model, columns)),
                                                 operand_pitch(slot_columns(f.inner, columns)));
    const int slots = std::min((available - kStackStaticBytes - at) / bytes, kStackSlots) / kTeams * kTeams;
    if (slots >= kStackLeastSlots && slots * bytes > s.slots * s.slot_bytes)
      s.slots = slots, s.slot_bytes = bytes, s.slot_columns = columns;
  }
  const int ring = s.slots * s.slot_bytes;
  s.act = ring + act, s.acc = ring + acc, s.raw = ring + raw, s.kept = ring + kept, s.buffer[0] = ring + first, s.buffer[1] = ring + second;
  s.total = ring + at;
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

inline void plan_stack(StackPlan* p, const int* aligned_to, int tokens, int processors, int available) {
  const StackFormat& f = p->f;
  QUAMBA_CHECK(f.model % 16 == 0 && f.model <= kStackWidth && f.inner % 16 == 0 && f.states % 4 == 0 &&
                   f.rank % 4 == 0,
               "mixers_step: found E=", f.model, ", D=", f.inner, ", N=", f.states, ", R=", f.rank,
               "; expected multiples of 16, 16, 4, 4 and E up to ", kStackWidth, " on CUDA");
  if (f.rotate) {
    plan_transform(p);
    const bool known = std::count(std::begin(kStackHadamards), std::end(kStackHadamards), p->base) > 0;
    QUAMBA_CHECK(known && p->log_power >= 4, "mixers_step: found D=", f.inner,
                 "; expected a power of two of at least 16, or 12 or 20 times one, where g is rotated");
  }
  p->channels = round_up(divide_up(f.inner, processors), 4);
  p->grid = divide_up(f.inner, p->channels);
  p->rows = round_up(divide_up(f.model, p->grid), 2);
  for (p->tokens = tokens;; p->tokens = (p->tokens + 1) / 2) {
    plan_shared(p, aligned_to, available);
    if (p->s.slots >= kStackLeastSlots) return;
    QUAMBA_CHECK(p->tokens > 1, "mixers_step: found E=", f.model, ", D=", f.inner, ", N=", f.states, ", R=", f.rank,
                 "; a thread block has ", available, " bytes of shared memory, too few for them");
  }
}

}  // namespace quamba
