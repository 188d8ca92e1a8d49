// selective_scan_step and selective_scan_dt_step for some sequences and 16 states, with Hopper's bulk copies: the same
// operations in the same order as in selective_scan_step.cuh, so the same bits.
//
// A lane has a channel, a warp 32 neighbours, whose states of a sequence are 2 KB in a row: one copy into a slot of the
// warp's ring, where the lane overwrites its 64 bytes, and one copy back. What belongs to a channel is read and
// prepared once for all sequences of a block; W_dt's product is one of matrices, of eight sequences at a time.
#pragma once

#include <type_traits>

#include "quamba/bulk_copy.cuh"
#include "quamba/selective_scan_step_bulk_product.cuh"

namespace quamba {

constexpr int kBulkStepWarps = 4;       // of a block, several blocks a multiprocessor
constexpr int kBulkStepMostWarps = 11;  // of a block that is alone, which has one more that asks for states
constexpr int kBulkStepBlocks = 3;      // of a multiprocessor
constexpr int kBulkStepStates = 16;
constexpr int kBulkStepSlots = 6;       // of a warp's ring, at most
constexpr int kBulkStepAloneSlots = 8;  // the same in a block that is alone
// Of these, states that are under way: as many as keep memory busy. More would stand in the way of what the kernel
// before waits for.
constexpr int kBulkStepAhead = 2;
constexpr int kBulkStepLag = 2;         // sequences by which a slot is filled again after its states were asked out
constexpr int kBulkStepSequences = 64;  // of a block, at most
constexpr int kBulkStepSlot = 32 * kBulkStepStates * static_cast<int>(sizeof(float));  // bytes

// How the work is cut: a warp has 32 channels, a block those of its warps, of so many sequences at most.
struct BulkStepCut {
  int warps, most, slots;  // slots of a warp's ring, at most
};

// Where the parts of a block's shared memory begin, in bytes.
struct BulkStepLayout {
  int slots;     // of a warp
  int batch;     // sequences that a warp prepares together
  int cells;     // (warp, batch, lane) of dt, dt x, x, gate
  int narrow;    // (most, 32): B and C
  int barriers;  // (warp, slot)
  int total;

  __host__ __device__ explicit BulkStepLayout(const BulkStepCut& cut) {
    slots = cut.most < cut.slots ? cut.most : cut.slots;
    batch = cut.most < kBulkStepBatch ? cut.most : kBulkStepBatch;
    cells = cut.warps * slots * kBulkStepSlot;
    narrow = cells + 32 * cut.warps * batch * static_cast<int>(sizeof(float4));
    barriers = narrow + cut.most * 2 * kBulkStepStates * static_cast<int>(sizeof(float));
    total = barriers + cut.warps * slots * 8;
  }
};

// blockIdx.x: the channels of its warps; blockIdx.y: one of gridDim.y equal parts of the sequences, cut.most at most. N
// is 16, the states of a sequence are contiguous and aligned, rows of A are aligned; so are those of d and W_dt, of a
// multiple of 16. kUsual: x, dt, z, B and C are int8, dt_bias and D float32. kAlone: one block a multiprocessor, with
// one more warp, which asks for states. early, for such ones: the states, and what belongs to a channel, are as they are to
// be when the kernel begins, whatever runs before it.
template <bool kProduct, bool kUsual, bool kAlone>
__global__ void __launch_bounds__(32 * (kAlone ? kBulkStepMostWarps + 1 : kBulkStepWarps),
                                  kAlone ? 1 : kBulkStepBlocks)
    selective_scan_step_bulk_kernel(const ScanParams p, const DtProduct product, const BulkStepCut cut,
                                    const bool early) {
  const bool at_once = kAlone && early;
  extern __shared__ __align__(128) char parts[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const BulkStepLayout layout(cut);
  const int warps = kAlone ? cut.warps : kBulkStepWarps;
  const int slots = layout.slots;
  char* const ring = parts + warp * slots * kBulkStepSlot;
  float4* const cells = reinterpret_cast<float4*>(parts + layout.cells) + warp * layout.batch * 32 + lane;
  float* const narrow = reinterpret_cast<float*>(parts + layout.narrow);
  uint64_t* const full = reinterpret_cast<uint64_t*>(parts + layout.barriers) + warp * slots;

  const int c0 = 32 * (static_cast<int>(blockIdx.x) * warps + warp);
  const int valid = min(max(static_cast<int>(p.channels) - c0, 0), 32);
  const bool live = lane < valid;
  const int c = live ? c0 + lane : 0;
  const auto part = [&](unsigned i) { return static_cast<int>(static_cast<unsigned>(p.batch) * i / gridDim.y); };
  const int b0 = part(blockIdx.y), count = part(blockIdx.y + 1) - b0;
  const auto bytes = static_cast<uint32_t>(valid * kBulkStepStates * sizeof(float));
  float* const state = p.state + times(b0, p.state_batch) + times(c0, kBulkStepStates);
  const float* const A = p.A + times(c, p.a_channel);
  const auto type = [](Type known) { return kUsual ? Type::kInt8 : known; };
  let_next_start();
  if (blockIdx.y == 0 && lane == 0 && valid > 0) {
    if (p.a_channel == kBulkStepStates) prefetch(A, bytes);
    if (kProduct && product.weight_row == product.rank)
      prefetch(product.weight + times(c, product.weight_row), static_cast<uint32_t>(valid * product.rank));
    prefetch(static_cast<const char*>(p.dt_bias.data) + c * size_of(p.dt_bias.type));
    prefetch(static_cast<const char*>(p.D.data) + c * size_of(p.D.type));
    if (kProduct) prefetch(product.weight_scale.data + c * product.weight_scale.stride);
    if (p.x.scale.stride) prefetch(p.x.scale.data + c);
    if (p.dt.scale.stride) prefetch(p.dt.scale.data + c);
    if (p.z.scale.stride) prefetch(p.z.scale.data + c);
    if (p.out_scale.stride) prefetch(p.out_scale.data + c);
  }
  const uint64_t policy = leaves_first();  // the states, which the next token's step reads
  const bool asks = lane < slots && lane < count && valid > 0;
  if (lane == 0 && (!kAlone || warp < warps)) {
    for (int i = 0; i < slots; ++i) barrier_init(full + i, 1);
    show_to_bulk_copies();
  }
  __syncwarp();
  const auto fetch_states = [&] {
    if (asks) bulk_fetch(ring + lane * kBulkStepSlot, state + times(lane, p.state_batch), bytes, full + lane, policy);
  };
  if constexpr (kAlone) {
    __syncthreads();
    if (warp == warps) {
      if (!early) wait_for_previous();
      // A lane for a warp.
      const int base = 32 * (static_cast<int>(blockIdx.x) * warps + lane);
      const int channels = lane < warps ? min(max(static_cast<int>(p.channels) - base, 0), 32) : 0;
      const float* const from = p.state + times(b0, p.state_batch) + times(base, kBulkStepStates);
      char* const to = parts + lane * slots * kBulkStepSlot;
      uint64_t* const there = reinterpret_cast<uint64_t*>(parts + layout.barriers) + lane * slots;
      const auto size = static_cast<uint32_t>(channels * kBulkStepStates * sizeof(float));
      if (channels > 0)
        for (int i = 0; i < slots && i < count; ++i) {
          if (i >= kBulkStepAhead) barrier_wait(there + i - kBulkStepAhead, 0);
          bulk_fetch(to + i * kBulkStepSlot, from + times(i, p.state_batch), size, there + i, policy);
        }
      return;
    }
  }
  // What memory has time for while the kernel before leaves it alone.
  if (!kAlone && asks && in_first_wave(kBulkStepBlocks)) prefetch(state + times(lane, p.state_batch), bytes);
  const AnyVector bias_of{p.dt_bias.data, kUsual ? Type::kFloat : p.dt_bias.type};
  const AnyVector skip_of{p.D.data, kUsual ? Type::kFloat : p.D.type};
  const int8_t* const weight = product.weight + times(valid > 0 ? c0 : 0, product.weight_row);
  const int pieces = kProduct ? product.pieces() : 0;
  // Lane i < 16 has element i of B of some sequences, the others have C.
  const Sequence& side = lane < kBulkStepStates ? p.B : p.C;
  uint32_t bias_bits, skip_bits;
  float narrow_scale, xs, dt_scale, zs, os, d_scale = 1.0f, weight_scale = 1.0f;
  const auto load_constants = [&] {
    if constexpr (kProduct) {
      d_scale = product.d_scale[0], weight_scale = at_channel(product.weight_scale, c);
    }
    bias_bits = load_bits(bias_of, c), skip_bits = load_bits(skip_of, c);
    narrow_scale = at_channel(side.scale, lane & 15);
    xs = at_channel(p.x.scale, c), dt_scale = at_channel(p.dt.scale, c), zs = at_channel(p.z.scale, c);
    os = at_channel(p.out_scale, c);
  };
  if (at_once) load_constants();
  wait_for_previous();

  // Everything is asked for before the first wait, what comes from afar first.
  if (!at_once) {
    if (!kAlone) fetch_states();
    load_constants();
  }
  const AnyVector narrow_from{side.data, type(side.type)};
  const int64_t narrow_stride = side.batch, narrow_at = times(b0, narrow_stride) + times(lane & 15, side.channel);
  const auto narrow_bits = [&](int s) {
    return load_bits(narrow_from, narrow_at + times(s < count ? s : 0, narrow_stride));
  };
  uint32_t ahead[2] = {narrow_bits(warp), narrow_bits(warp + warps)};
  // The four quads of a row in an order of the lane's own: eight lanes at a time are on distinct banks.
  const int turn = lane / 2 & 3;

  int slot = 0;
  unsigned parity = 0;
  for (int first = 0; first < count; first += kBulkStepBatch) {
    const int batch = count - first < kBulkStepBatch ? count - first : kBulkStepBatch;
    BulkStepProduct dots;
    const int own_sequence = first + (lane / 4 < batch ? lane / 4 : 0);
    const int8_t* const d = product.d + times(b0 + own_sequence, product.d_batch);
    int chunk = 0;
    asm volatile("" : "+r"(chunk));  // or the addresses of all its loads would be kept for the next batch
    if constexpr (kProduct) {
      dots.fetch_weight(weight, product.weight_row, valid, chunk, pieces);
      dots.fetch_sequence(d, chunk, pieces);
    }
    uint32_t x_bits[kBulkStepBatch], z_bits[kBulkStepBatch] = {}, dt_bits[kBulkStepBatch] = {};
    const auto load = [&](uint32_t (&bits)[kBulkStepBatch], const Sequence& s) {
      load_batch(bits, s, type(s.type), times(b0 + first, s.batch) + times(c, s.channel), batch);
    };
    load(x_bits, p.x);
    if (p.z.data) load(z_bits, p.z);
    if (!kProduct) load(dt_bits, p.dt);
    if (first == 0) {
#pragma unroll 1
      for (int s = warp; s < count; s += warps) {
        const uint32_t now = ahead[0];
        ahead[0] = ahead[1], ahead[1] = narrow_bits(s + 2 * warps);
        narrow[s * 32 + lane] = from_bits(now, narrow_from.type) * narrow_scale;
      }
      if constexpr (kAlone) {
        asm volatile("bar.sync 1, %0;" ::"r"(32 * warps) : "memory");
      } else {
        __syncthreads();
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBulkStepBatch; ++i)
      if (i < batch) {
        float4* const cell = cells + i * 32;
        reinterpret_cast<float2*>(cell)[1] = make_float2(__uint_as_float(x_bits[i]), __uint_as_float(z_bits[i]));
        if (!kProduct) cell->x = __uint_as_float(dt_bits[i]);
      }
    if constexpr (kProduct) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) dots.sums[m][r] = 0;
      dots.multiply();
      for (chunk = BulkStepProduct::kChunks; 4 * chunk < pieces; chunk += BulkStepProduct::kChunks) {
        dots.fetch_weight(weight, product.weight_row, valid, chunk, pieces);
        dots.fetch_sequence(d, chunk, pieces);
        dots.multiply();
      }
      __syncwarp();
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int s = 2 * (lane & 3) + (r & 1), channel = 16 * m + 8 * (r / 2) + lane / 4;
          if (s < batch) cells[s * 32 + channel - lane].x = __uint_as_float(static_cast<uint32_t>(dots.sums[m][r]));
        }
      __syncwarp();
    }
    float4 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = load_four(A + 4 * (i ^ turn));
    // Rescaled step by step as linear does it: multiply-adds would give other integers.
    const float sum_scale = __fmul_rn(from_here(d_scale), from_here(weight_scale));
    const auto vector = [](uint32_t bits, Type of) {
      return from_bits(__float_as_uint(from_here(__uint_as_float(bits))), of);
    };
    const float bias = vector(bias_bits, bias_of.type), skip = vector(skip_bits, skip_of.type);
    const float out_reciprocal = reciprocal_approx(from_here(os));
    const float dt_reciprocal = reciprocal_approx(from_here(dt_scale));
#pragma unroll(kAlone ? 4 : 2)
    for (int i = 0; i < batch; ++i) {
      const float4 bits = cells[i * 32];
      float raw;
      if constexpr (kProduct) {
        raw = __fmul_rn(static_cast<float>(static_cast<int>(__float_as_uint(bits.x))), sum_scale);
        if (p.dt.scale) {
          int8_t rounded;
          Store<int8_t>::one(&rounded, raw, dt_scale, dt_reciprocal);
          raw = to_float(rounded);
        }
      } else {
        raw = from_bits(__float_as_uint(bits.x), type(p.dt.type));
      }
      const float dt = softplus(fmaf(raw, dt_scale, bias)), x = from_bits(__float_as_uint(bits.z), type(p.x.type)) * xs;
      const float gate = p.z.data ? silu(from_bits(__float_as_uint(bits.w), type(p.z.type)) * zs) : 1.0f;
      cells[i * 32] = make_float4(dt, dt * x, x, gate);
    }

#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = make_float4(a[i].x * kLog2E, a[i].y * kLog2E, a[i].z * kLog2E, a[i].w * kLog2E);
    // Some sequences from i on, whose instructions wait for each other's.
    const auto take = [&](int i, auto sequences) {
      constexpr int kCount = decltype(sequences)::value;
      const auto slot_of = [&](int u) { return slot + u < slots ? slot + u : slot + u - slots; };
#pragma unroll
      for (int u = 0; u < kCount; ++u) barrier_wait(full + slot_of(u), parity ^ (slot + u < slots ? 0 : 1));
      float y[kCount][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (j ^ turn);
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const float4 cell = cells[(i + u - first) * 32];
          const float* const bc = narrow + (i + u) * 32;
          float* const own = reinterpret_cast<float*>(ring + slot_of(u) * kBulkStepSlot) + lane * kBulkStepStates;
          const float4 b4 = *reinterpret_cast<const float4*>(bc + at);
          const float4 c4 = *reinterpret_cast<const float4*>(bc + kBulkStepStates + at);
          float4 h = *reinterpret_cast<const float4*>(own + at);
          h.x = fmaf(exp2_approx(cell.x * a[j].x), h.x, cell.y * b4.x);
          h.y = fmaf(exp2_approx(cell.x * a[j].y), h.y, cell.y * b4.y);
          h.z = fmaf(exp2_approx(cell.x * a[j].z), h.z, cell.y * b4.z);
          h.w = fmaf(exp2_approx(cell.x * a[j].w), h.w, cell.y * b4.w);
          *reinterpret_cast<float4*>(own + at) = h;
          y[u][j] = fmaf(h.x, c4.x, fmaf(h.y, c4.y, fmaf(h.z, c4.z, fmaf(h.w, c4.w, 0.0f))));
        }
        if (j == 1) asm volatile("" ::: "memory");  // or registers run out
      }
      show_to_bulk_copies();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int u = 0; u < kCount; ++u)
          bulk_write(state + times(i + u, p.state_batch), ring + slot_of(u) * kBulkStepSlot, bytes, policy);
        // The slots of those before, whose states are on their way out, or there.
        if (i >= kBulkStepLag && i - kBulkStepLag + slots < count) bulk_writes_read<kBulkStepLag>();
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const int next = i + u - kBulkStepLag + slots;
          if (i < kBulkStepLag || next >= count) continue;
          const int after = slot_of(u);
          const int free = after < kBulkStepLag ? after + slots - kBulkStepLag : after - kBulkStepLag;
          bulk_fetch(ring + free * kBulkStepSlot, state + times(next, p.state_batch), bytes, full + free, policy);
        }
      }
      if ((slot += kCount) >= slots) slot -= slots, parity ^= 1;
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const float4 cell = cells[(i + u - first) * 32];
        // Pairs of pairs, as the lanes of the other kernel add: their order within is the same to the bit.
        const float sum = fmaf(skip, cell.z, (y[u][0] + y[u][1]) + (y[u][2] + y[u][3])) * cell.w;
        if (!live) continue;
        const int64_t at = times(b0 + i + u, p.channels) + c;
        switch (p.out_type) {
          case Type::kInt8:
            Store<int8_t>::one(static_cast<int8_t*>(p.out) + at, sum, os, out_reciprocal);
            break;
          case Type::kHalf:
            Store<__half>::one(static_cast<__half*>(p.out) + at, sum, os, 1.0f);
            break;
          case Type::kBFloat16:
            Store<__nv_bfloat16>::one(static_cast<__nv_bfloat16*>(p.out) + at, sum, os, 1.0f);
            break;
          default:
            Store<float>::one(static_cast<float*>(p.out) + at, sum, os, 1.0f);
        }
      }
    };
    int i = first;
    if (valid > 0) {
      if constexpr (kAlone) {
#pragma unroll 1
        for (; i + 1 < first + batch; i += 2) take(i, std::integral_constant<int, 2>());
      }
#pragma unroll 1
      for (; i < first + batch; ++i) take(i, std::integral_constant<int, 1>());
    }
  }
  if (lane == 0) bulk_writes_read<0>();
}

}  // namespace quamba
