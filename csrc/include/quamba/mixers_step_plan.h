// mixers_step: how a launch divides the work and each thread block's shared memory. On the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "op.h"
#include "quamba/mixers_step.cuh"

namespace quamba {

constexpr int kStackLeastSlots = 4;
constexpr int kStackStaticBytes = 1024;  // of shared memory, for the barriers

inline void plan_shared(StackParams* p, int available) {
  const StackFormat& f = p->f;
  StackShared& s = p->s;
  const int sums = f.rank + 2 * f.states, tokens = p->tokens;
  // Within a buffer.
  int at = 0;
  const auto take = [&](int bytes) {
    const int offset = at;
    at += round_up(bytes, 16);
    return offset;
  };
  s.x_weight = take(sums * ((p->channels / 4) | 1) * 4);
  s.dt_weight = take(p->channels * ((f.rank / 4) | 1) * 4);
  s.A = take(p->channels * f.states * 4);
  s.taps = take(p->channels * f.width);
  s.field_bytes = p->channels * 4;
  s.fields = take(kStackFields * s.field_bytes);
  s.dbc = take(3 * sums * 4);
  s.out = take(2 * p->rows * 4);
  s.single = take(kStackSingles * 4);
  s.norm = take(f.model * size_of(f.norm_weight));
  s.block = take(sizeof(StackBlock));
  const int buffer = at;
  // Behind the ring.
  at = 0;
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
inline void plan_transform(StackParams* p) {
  int odd = p->f.inner;
  p->log_power = 0;
  for (; odd % 2 == 0; odd /= 2) ++p->log_power;
  const int twos = odd == 1 ? 0 : 2;
  p->base = odd << twos, p->log_power -= twos, p->power = 1 << std::max(p->log_power, 0);
  p->factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p->f.inner)));
}

inline void plan_stack(StackParams* p, int tokens, int processors, int available) {
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
    plan_shared(p, available);
    if (p->s.slots >= kStackLeastSlots) return;
    QUAMBA_CHECK(p->tokens > 1, "mixers_step: found E=", f.model, ", D=", f.inner, ", N=", f.states, ", R=", f.rank,
                 "; a thread block has ", available, " bytes of shared memory, too few for them");
  }
}

}  // namespace quamba
