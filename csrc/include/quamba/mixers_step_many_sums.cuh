// mixers_step for many sequences: W_x, whose sums run over all thread blocks. Each has some of the sums to add up, of
// which the others write down their parts, and gives d, B or C to all. Additions in memory, 128 for each sum, would
// take longer: the second-level cache does 33 a cycle.
#pragma once

#include "quamba/mixers_step_many_scan.cuh"

namespace quamba {

// Four sums of a sequence are a quad, the quads of eight or sixteen sequences follow each other. A part of a sum is
// shifted to be positive; above it stands for which block of the stack it is.
constexpr int kPartBits = 24;
constexpr int kPartShift = 128 * 127;  // a channel; the least product of two int8 of which one is a weight

// The thread block's columns of W_x, as parts of all sums.
template <int GROUPS>
__device__ __forceinline__ void write_parts(const StackPlan& p, int l, const StackShare& share,
                                            const StackNumbers& numbers, const ManyScratch& scratch) {
  const int sums = p.over_sums.by, g = (threadIdx.x & 31) / 4, q = threadIdx.x & 3, pitch = p.s.x_weight_pitch;
  const int shift = kPartShift * share.channels, steps = divide_up(share.channels, 32);
  const int* const x = reinterpret_cast<const int*>(scratch.x + g * p.s.x_pitch) + q;
  const int next = 8 * p.s.x_pitch / 4;
#pragma unroll 1
  for (int row = threadIdx.x / 32 * 8; row < sums; row += 8 * kManyWarps) {
    const int* const weight = numbers.x_weight() + min(row + g, sums - 1) * pitch + q;
    int sum[4] = {};
#pragma unroll 2
    for (int k = 0; k < 8 * steps; k += 8)
      mma(sum, x[k], GROUPS > 1 ? x[next + k] : 0, x[k + 4], GROUPS > 1 ? x[next + k + 4] : 0, weight[k],
          weight[k + 4]);
    const int r = row + 2 * q;
#pragma unroll
    for (int f = 0; f < GROUPS; ++f) {
      const int m = 8 * f + g, quad = r / 4 * 8 * GROUPS + m, owner = p.over_quads.of(quad);
      const int at = (owner * p.grid + static_cast<int>(blockIdx.x)) * p.over_quads.by + quad - owner * p.over_quads.by;
      if (r < sums && m < p.tokens)
        publish_two(p.parts_of_sums + 4 * at + r % 4,
                    make_uint2(static_cast<unsigned>(sum[2 * f] + shift) | (l + 1u) << kPartBits,
                               static_cast<unsigned>(sum[2 * f + 1] + shift) | (l + 1u) << kPartBits));
    }
  }
}

// The sums that are this thread block's, from their parts; to all, quantized, or as they are where norms are to come.
// `totals`: zeros.
template <int GROUPS>
__device__ __forceinline__ void add_parts(const StackPlan& p, int l, const StackNumbers& numbers, ManyGrid& grid,
                                          int* totals) {
  constexpr int kRow = 8 * GROUPS, kBatch = 2;
  const int quads = p.over_sums.by / 4 * kRow, own = p.over_quads.by, first = blockIdx.x * own;
  const int mine = max(0, min(own, quads - first)), count = mine > 0 ? p.grid * own : 0;
  const unsigned* const from = p.parts_of_sums + 4 * static_cast<int>(blockIdx.x) * p.grid * own;
  constexpr unsigned kMask = (1u << kPartBits) - 1;
  // `own` is a power of two: a worker's parts are all of the same quad, but where that is more than there are workers.
  const int quad = threadIdx.x & (own - 1);
  uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 - static_cast<int>(threadIdx.x & 31) < count; i0 += kBatch * kManyWorkers) {
    uint4 words[kBatch];
    unsigned missing = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kManyWorkers, at = i & (own - 1);
      words[u] = make_uint4(0, 0, 0, 0);
      if (i < count && at < mine && (first + at) % kRow < p.tokens) missing |= 1u << u;
    }
    const auto there = [&](unsigned word) { return word >> kPartBits == l + 1u; };
#pragma unroll 1
    while (missing != 0) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (missing >> u & 1) words[u] = load_published(from + 4 * (i0 + u * kManyWorkers));
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (there(words[u].x) && there(words[u].y) && there(words[u].z) && there(words[u].w)) missing &= ~(1u << u);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const uint4 w = make_uint4(words[u].x & kMask, words[u].y & kMask, words[u].z & kMask, words[u].w & kMask);
      if (own > kManyWorkers) {
        int* const to = totals + 4 * ((i0 + u * kManyWorkers) & (own - 1));
        if (i0 + u * kManyWorkers < count)
          atomicAdd(to, static_cast<int>(w.x)), atomicAdd(to + 1, static_cast<int>(w.y)),
              atomicAdd(to + 2, static_cast<int>(w.z)), atomicAdd(to + 3, static_cast<int>(w.w));
      } else {
        sum.x += w.x, sum.y += w.y, sum.z += w.z, sum.w += w.w;
      }
    }
  }
  if (own <= kManyWorkers && count > 0) {
#pragma unroll 1
    for (int offset = 16; offset >= own; offset /= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset), sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
      sum.z += __shfl_xor_sync(0xffffffffu, sum.z, offset), sum.w += __shfl_xor_sync(0xffffffffu, sum.w, offset);
    }
    if ((threadIdx.x & 31) < own) {
      int* const to = totals + 4 * quad;
      atomicAdd(to, static_cast<int>(sum.x)), atomicAdd(to + 1, static_cast<int>(sum.y));
      atomicAdd(to + 2, static_cast<int>(sum.z)), atomicAdd(to + 3, static_cast<int>(sum.w));
    }
  }
  many_sync();
  const float x_scale = numbers.one(kXInScale);
  unsigned* const to = p.sums + turn(l, 4 * quads);
#pragma unroll 1
  for (int i = threadIdx.x; i < round_up(4 * mine, 32); i += kManyWorkers) {
    const bool live = i < 4 * mine;
    const int quad = first + (live ? i / 4 : 0), r = quad / kRow * 4 + i % 4;
    const float* const number = numbers.sum(r);
    const int sum = live ? take(totals + i) - kPartShift * p.f.inner : 0;
    const float v = __fmul_rn(static_cast<float>(sum), __fmul_rn(x_scale, number[0]));
    if (p.f.norm_dbc) {
      if (live) publish(to + 4 * quad + i % 4, v);
    } else {
      unsigned word = static_cast<uint8_t>(byte_of(v, number[1])) << 8 * (i % 4);
      word |= __shfl_xor_sync(0xffffffffu, word, 1);
      word |= __shfl_xor_sync(0xffffffffu, word, 2);
      if (live && i % 4 == 0) publish_word(to + quad, word ^ kThere);
    }
  }
  grid.tell();
}

// d, B and C before their norms, as add_parts gave them to all, and then their norms.
template <int GROUPS>
__device__ __forceinline__ void norm_sums(const StackPlan& p, int l, const StackNumbers& numbers,
                                          const ManyScratch& scratch) {
  constexpr int kRow = 8 * GROUPS;
  const int rank = p.f.rank, size = p.f.states, sums = p.over_sums.by, quads = sums / 4 * kRow, lane = threadIdx.x & 31;
  const unsigned* const from = p.sums + turn(l, 4 * quads);
#pragma unroll 1
  for (int i = threadIdx.x; i < quads; i += kManyWorkers) {
    const int m = i % kRow;
    if (m >= p.tokens) continue;
    uint4 words;
    do {
      words = load_published(from + 4 * i);
    } while (!arrived(words));
    put(scratch.wide + m * sums + i / kRow * 4, words);
  }
  many_sync();
#pragma unroll 1
  for (int task = threadIdx.x / 32; task < 3 * p.tokens; task += kManyWarps) {
    const int m = task / 3, part = task % 3;
    const int begin = part == 0 ? 0 : rank + (part - 1) * size, end = part == 0 ? rank : begin + size;
    const float* const row = scratch.wide + m * sums;
    float squares = 0.0f;
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) squares = fmaf(row[r], row[r], squares);
    squares = warp_sum(squares);
    const float size_wide = static_cast<float>(end - begin);
    const float factor = rsqrtf(divide(squares, size_wide, reciprocal_approx(size_wide)) + numbers.block().dbc_eps);
#pragma unroll 1
    for (int r = begin + lane; r < end; r += 32) {
      const float* const number = numbers.sum(r);
      float v = row[r] * factor;
      if (p.f.has_norms) v *= number[2];
      const int8_t byte = byte_of(v, number[1]);
      if (r < rank) {
        scratch.d[m * p.s.d_pitch + r] = byte;
      } else {
        scratch.bc[m * 2 * size + r - rank] = static_cast<float>(byte) * number[1];
      }
    }
  }
}

// d, B and C, for all thread blocks' channels need them.
template <int GROUPS>
__device__ __forceinline__ void fetch_sums(const StackPlan& p, int l, const StackNumbers& numbers, const ManyGrid& grid,
                                           const ManyScratch& scratch) {
  if (p.f.norm_dbc) {
    norm_sums<GROUPS>(p, l, numbers, scratch);
    many_sync();
    return;
  }
  constexpr int kRow = 8 * GROUPS, kBatch = 2;
  const int rank = p.f.rank, quads = p.over_sums.by / 4 * kRow;
  const unsigned* const from = p.sums + turn(l, 4 * quads);
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 - static_cast<int>(threadIdx.x & 31) < quads; i0 += kBatch * kManyWorkers) {
    uint32_t words[kBatch] = {};
    const auto live = [&](int u) { return i0 + u * kManyWorkers < quads && (i0 + u * kManyWorkers) % kRow < p.tokens; };
#pragma unroll 1
    for (int tries = 0; tries < kManyTries; ++tries) {
      if (tries + 1 == kManyTries) grid.sure();
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (live(u) && words[u] == 0) words[u] = load_published_one(from + i0 + u * kManyWorkers);
      bool all = true;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) all &= !live(u) || words[u] != 0;
      if (__all_sync(0xffffffffu, all)) break;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = i0 + u * kManyWorkers, m = i % kRow, r = i / kRow * 4;
      const uint32_t word = words[u] ^ kThere;
      if (!live(u)) continue;
      if (r < rank) {
        *reinterpret_cast<uint32_t*>(scratch.d + m * p.s.d_pitch + r) = word;
      } else {
        float values[4];
        unpack_bytes(word, values);
        float* const to = scratch.bc + m * 2 * p.f.states + r - rank;
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = values[k] * numbers.sum(r + k)[1];
      }
    }
  }
  many_sync();
}

}  // namespace quamba
