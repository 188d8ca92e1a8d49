// mixers_step: the kernel. A thread block a multiprocessor, all there at a time; each owns some channels (their rows of
// W_in and W_dt, columns of W_x, states) and some rows of W_out. They meet after the sums of W_x, after the gate and
// after W_out; with several sequences, also after each norm and each transform, which then are one thread block's work.
//
// The sums are integers and exact, so W_x may be cut along K and added up in any order.
#pragma once

#include "quamba/linear_rows.cuh"
#include "quamba/mixers_step_warps.cuh"
#include "quamba/mixers_step_hadamard.cuh"
#include "quamba/rms_norm_quant.cuh"

namespace quamba {

// The workers meet.
__device__ __forceinline__ void team_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kStackWorkers) : "memory"); }

// The grid meets: what any worker wrote before arriving is there for all workers after waiting.
class StackGrid {
 public:
  __device__ explicit StackGrid(const StackParams& p) : counter_(p.counter), grid_(p.grid) {}
  __device__ void arrive() {
    goal_ += grid_;
    team_sync();
    if (threadIdx.x == 0) {
      __threadfence();
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
    }
  }
  __device__ void wait() {
    if (threadIdx.x == 0) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter_) : "memory");
      } while (seen < goal_);
    }
    team_sync();
  }

 private:
  unsigned* counter_;
  unsigned goal_ = 0, grid_;
};

__device__ __forceinline__ float4 load4(const void* data, Type type, int64_t i) {
  if (type == Type::kFloat) return __ldcg(static_cast<const float4*>(data) + i);
  const uint2 words = __ldcg(static_cast<const uint2*>(data) + i);
  const auto half = [&](uint32_t bits) { return from_bits(bits, type); };
  return make_float4(half(words.x & 0xffff), half(words.x >> 16), half(words.y & 0xffff), half(words.y >> 16));
}

__device__ __forceinline__ float rounded_to(float v, Type type) {
  if (type == Type::kHalf) return __half2float(__float2half_rn(v));
  if (type == Type::kBFloat16) return __bfloat162float(__float2bfloat16_rn(v));
  return v;
}

__device__ __forceinline__ float team_sum(float v, float* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  team_sync();
  v = 0.0f;
#pragma unroll
  for (int i = 0; i < kStackWorkers / 32; ++i) v += partial[i];
  team_sync();
  return v;
}

__device__ __forceinline__ uint32_t rounded4(float4 v, float scale) {
  const float r = reciprocal_approx(scale);
  return pack_bytes(round_to_byte(divide(v.x, scale, r)), round_to_byte(divide(v.y, scale, r)),
                    round_to_byte(divide(v.z, scale, r)), round_to_byte(divide(v.w, scale, r)));
}

// The norm of a row of the residual stream, quantized.
__device__ __forceinline__ void norm_row(const StackParams& p, const StackBlock& b, const void* row, Type type,
                                         float* partial, uint32_t* out) {
  constexpr int kMine = kStackWidth / 4 / kStackWorkers;
  const int count = p.f.model / 4;
  float4 v[kMine], w[kMine];
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < kMine; ++u) {
    const int i = threadIdx.x + u * kStackWorkers;
    v[u] = i < count ? load4(row, type, i) : make_float4(0, 0, 0, 0);
  }
  const float scale = *b.u_scale;
#pragma unroll
  for (int u = 0; u < kMine; ++u) {
    const int i = threadIdx.x + u * kStackWorkers;
    w[u] = i < count ? load4(b.norm_weight, p.f.norm_weight, i) : v[u];
  }
#pragma unroll
  for (int u = 0; u < kMine; ++u)
    squares = fmaf(v[u].x, v[u].x, fmaf(v[u].y, v[u].y, fmaf(v[u].z, v[u].z, fmaf(v[u].w, v[u].w, squares))));
  const float factor = rsqrtf(team_sum(squares, partial) / static_cast<float>(p.f.model) + b.norm_eps);
#pragma unroll
  for (int u = 0; u < kMine; ++u) {
    const int i = threadIdx.x + u * kStackWorkers;
    if (i < count)
      out[i] = rounded4(make_float4(v[u].x * factor * w[u].x, v[u].y * factor * w[u].y, v[u].z * factor * w[u].z,
                                    v[u].w * factor * w[u].w),
                        scale);
  }
}

// Rows of p.bytes to the operand in shared memory.
__device__ __forceinline__ void fetch_operand(const StackParams& p, int columns, char* act) {
  const int pieces = columns / 16, pitch = operand_pitch(columns);
  const int4* from = reinterpret_cast<const int4*>(p.bytes);
#pragma unroll 4
  for (int i = threadIdx.x; i < p.tokens * pieces; i += kStackWorkers)
    *reinterpret_cast<int4*>(act + i / pieces * pitch + i % pieces * 16) = __ldcg(from + i);
}

// The columns between the last and the next multiple of 64 meet bytes of the ring that mean nothing.
__device__ __forceinline__ void clear_tail(const StackParams& p, int columns, char* act) {
  const int tail = (round_up(columns, 64) - columns) / 4;
  for (int i = threadIdx.x; i < p.tokens * tail; i += kStackWorkers)
    *reinterpret_cast<int*>(act + i / tail * operand_pitch(columns) + columns + i % tail * 4) = 0;
}

// The slots' state, as the workers see it.
struct StackRing {
  char* slots;
  StackBarriers* barriers;
  int base = 0;  // slots before this product's
};

// acc[row][token] += weight[row] . operand[token] over the thread block's rows of one weight.
template <int GROUPS>
__device__ __forceinline__ void multiply(const StackParams& p, const StackTiles& tiles, StackRing& ring,
                                         const char* act, int* acc) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, q = lane % 4;
  const int act_pitch = operand_pitch(tiles.columns), pitch = operand_pitch(tiles.slot_columns);
  const int4 zero = make_int4(0, 0, 0, 0);
  for (int i = warp / kSlotWarps; i < tiles.slots(); i += kStackWorkers / 32 / kSlotWarps) {
    const int at = ring.base + i, round = at / p.s.slots, slot = at - round * p.s.slots;
    const int tile = i / tiles.pieces, column = (i - tile * tiles.pieces) * tiles.slot_columns;
    const int steps = divide_up(min(tiles.slot_columns, tiles.columns - column), 64);
    const char* low = ring.slots + slot * p.s.slot_bytes + g * pitch + q * 16;
    const char* x = act + g * act_pitch + column + q * 16;
    barrier_wait(&ring.barriers->full[slot], round & 1);
    int sum[GROUPS][4] = {};
#pragma unroll 4
    for (int s = warp % kSlotWarps; s < steps; s += kSlotWarps) {
      const int4 a = *reinterpret_cast<const int4*>(low + s * 64);
      const int4 b = *reinterpret_cast<const int4*>(low + 8 * pitch + s * 64);
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int4 v = 8 * j + g < p.tokens ? *reinterpret_cast<const int4*>(x + 8 * j * act_pitch + s * 64) : zero;
        mma(sum[j], a.x, b.x, a.y, b.y, v.x, v.y);
        mma(sum[j], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&ring.barriers->empty[slot]);
    const int first = tile * tiles.tile_rows, rows = min(tiles.tile_rows, tiles.rows - first);
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r / 2), m = 8 * j + 2 * q + r % 2;
        if (row < rows && m < p.tokens) atomicAdd(acc + (first + row) * 8 * GROUPS + m, sum[j][r]);
      }
  }
  ring.base += tiles.slots();
}

// A sum, taken away so that the next product finds zero.
__device__ __forceinline__ int take(int* acc) {
  const int sum = *acc;
  *acc = 0;
  return sum;
}

__device__ __forceinline__ int8_t byte_of(float v, float scale) {
  return static_cast<int8_t>(round_to_byte(divide(v, scale, reciprocal_approx(scale))) & 0xff);
}

// Of one thread block, between the parts of a block of the stack.
struct StackScratch {
  int8_t* x;    // (tokens, channels), for W_x and the scan
  float* z;     // (tokens, channels), SiLU's argument
  int8_t* d;    // (tokens, R)
  float* bc;    // (tokens, R + 2 N): d, B and C before and after their norms; of d nothing is left
  float* partial;
};

// x0 and z from their sums, the convolution, x.
template <int GROUPS>
__device__ __forceinline__ void convolve(const StackParams& p, const StackBlock& b, const StackShare& share,
                                         const float* channel, int* acc, const StackScratch& scratch) {
  const int width = p.f.width;
  for (int i = threadIdx.x; i < p.tokens * share.channels; i += kStackWorkers) {
    const int m = i / share.channels, c = i - m * share.channels;
    int8_t* const state =
        b.conv_state + m * p.f.conv_batch + static_cast<int64_t>(share.channel + c) * width;
    const auto number = [&](int field) { return channel[field * p.channels + c]; };
    const uint32_t before = width == 4 ? __ldcg(reinterpret_cast<const unsigned*>(state)) : 0;
    const int x_sum = take(acc + c * 8 * GROUPS + m), z_sum = take(acc + (share.channels + c) * 8 * GROUPS + m);
    const float x0_wide = __fadd_rn(__fmul_rn(static_cast<float>(x_sum), number(kInX)), number(kBiasX));
    const float z_wide = __fadd_rn(__fmul_rn(static_cast<float>(z_sum), number(kInZ)), number(kBiasZ));
    const int8_t x0 = byte_of(x0_wide, number(kScaleX));
    scratch.z[m * p.channels + c] = static_cast<float>(byte_of(z_wide, number(kScaleZ))) * number(kScaleZ);
    float sum = 0.0f;
    if (width == 4) {
      const uint32_t word = __byte_perm(before, static_cast<uint8_t>(x0), 0x4321);
      *reinterpret_cast<uint32_t*>(state) = word;
      float window[4];
      unpack_bytes(word, window);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum = fmaf(number(kTaps + k), window[k], sum);
    } else {
      for (int k = 0; k < width; ++k) {
        const int8_t value = k + 1 < width ? state[k + 1] : x0;
        state[k] = value;
        sum = fmaf(number(kTaps + k), static_cast<float>(value), sum);
      }
    }
    const float y = silu(fmaf(sum, number(kConvFactor), number(kConvBias)));
    scratch.x[m * p.channels + c] =
        static_cast<int8_t>(round_to_byte(y * reciprocal_approx(number(kXScale))) & 0xff);
  }
}

// The thread block's columns of W_x, added to the sums of all.
__device__ __forceinline__ void add_products(const StackParams& p, int l, const StackShare& share,
                                             const int* x_weight, const StackScratch& scratch) {
  const int sums = p.f.rank + 2 * p.f.states, words = share.channels / 4, pitch = (p.channels / 4) | 1;
  const int* const x = reinterpret_cast<const int*>(scratch.x);
  for (int i = threadIdx.x; i < sums * p.tokens; i += kStackWorkers) {
    const int m = i / sums, r = i - m * sums;
    int sum = 0;
#pragma unroll 4
    for (int w = 0; w < words; ++w) sum = __dp4a(x_weight[r * pitch + w], x[m * (p.channels / 4) + w], sum);
    atomicAdd(p.dbc + (static_cast<int64_t>(l) * p.tokens + m) * sums + r, sum);
  }
}

// d, B and C from the sums of W_x: in every thread block, for all of its channels need them.
__device__ __forceinline__ void split_sums(const StackParams& p, const StackBlock& b, int l, const float* dbc,
                                           const StackScratch& scratch) {
  const int rank = p.f.rank, size = p.f.states, sums = rank + 2 * size;
  const int* const from = p.dbc + static_cast<int64_t>(l) * p.tokens * sums;
  const auto put = [&](int m, int r, float v) {
    const float scale = dbc[kDbcScale * sums + r];
    const int8_t byte = byte_of(v, scale);
    if (r < rank) {
      scratch.d[m * rank + r] = byte;
    } else {
      scratch.bc[m * sums + r] = static_cast<float>(byte) * scale;
    }
  };
  for (int i = threadIdx.x; i < p.tokens * sums; i += kStackWorkers) {
    const int m = i / sums, r = i - m * sums;
    const float v = __fmul_rn(static_cast<float>(__ldcg(from + i)), dbc[kDbcFactor * sums + r]);
    if (p.f.norm_dbc) {
      scratch.bc[i] = v;
    } else {
      put(m, r, v);
    }
  }
  team_sync();
  if (!p.f.norm_dbc) return;
  const int lane = threadIdx.x & 31;
  for (int task = threadIdx.x / 32; task < 3 * p.tokens; task += kStackWorkers / 32) {
    const int m = task / 3, part = task % 3;
    const int begin = part == 0 ? 0 : rank + (part - 1) * size, end = part == 0 ? rank : begin + size;
    float squares = 0.0f;
    for (int r = begin + lane; r < end; r += 32) squares = fmaf(scratch.bc[m * sums + r], scratch.bc[m * sums + r], squares);
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float factor = rsqrtf(squares / static_cast<float>(end - begin) + b.dbc_eps);
    for (int r = begin + lane; r < end; r += 32) {
      float v = scratch.bc[m * sums + r] * factor;
      if (b.d_norm_weight) v *= dbc[kDbcWeight * sums + r];
      put(m, r, v);
    }
  }
  team_sync();
}

// W_dt, softplus, the recurrence and the gate; four lanes a channel.
__device__ __forceinline__ void scan(const StackParams& p, const StackBlock& b, const StackShare& share,
                                     const char* buffer, const StackScratch& scratch) {
  const int size = p.f.states, rank = p.f.rank, sums = rank + 2 * size;
  const float* const channel = reinterpret_cast<const float*>(buffer + p.s.channel);
  const float* const A = reinterpret_cast<const float*>(buffer + p.s.A);
  const int* const dt_weight = reinterpret_cast<const int*>(buffer + p.s.dt_weight);
  const int words = rank / 4, pitch = words | 1, j = threadIdx.x & 3;
  for (int i0 = 0; i0 < p.tokens * share.channels; i0 += kStackWorkers / 4) {
    const int i = i0 + threadIdx.x / 4;
    const bool live = i < p.tokens * share.channels;
    const int m = live ? i / share.channels : 0, c = live ? i - m * share.channels : 0;
    float* const state = b.ssm_state + m * p.f.ssm_batch + static_cast<int64_t>(share.channel + c) * size;
    float4 h = make_float4(0, 0, 0, 0);
    if (4 * j < size && share.channels) h = __ldcg(reinterpret_cast<const float4*>(state + 4 * j));
    const auto number = [&](int field) { return channel[field * p.channels + c]; };
    const int* const d = reinterpret_cast<const int*>(scratch.d + m * rank);
    int sum = 0;
#pragma unroll 4
    for (int w = j; w < words; w += 4) sum = __dp4a(dt_weight[c * pitch + w], d[w], sum);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    float dt = __fmul_rn(static_cast<float>(sum), number(kDtFactor));
    if (b.dt_scale) dt = static_cast<float>(byte_of(dt, number(kDtScale)));
    dt = softplus(fmaf(dt, number(kDtScale), number(kDtBias)));
    const float x = static_cast<float>(scratch.x[m * p.channels + c]) * number(kScanScale), dtx = dt * x;
    float y = 0.0f;
    for (int n = 4 * j; n < size; n += 16) {
      if (n >= 16) h = __ldcg(reinterpret_cast<const float4*>(state + n));
      const float4 a = *reinterpret_cast<const float4*>(A + c * size + n);
      const float* const B = scratch.bc + m * sums + rank + n;
      const float* const C = B + size;
      h.x = fmaf(exp2_approx(dt * a.x), h.x, dtx * B[0]);
      h.y = fmaf(exp2_approx(dt * a.y), h.y, dtx * B[1]);
      h.z = fmaf(exp2_approx(dt * a.z), h.z, dtx * B[2]);
      h.w = fmaf(exp2_approx(dt * a.w), h.w, dtx * B[3]);
      if (live) *reinterpret_cast<float4*>(state + n) = h;
      y = fmaf(h.x, C[0], fmaf(h.y, C[1], fmaf(h.z, C[2], fmaf(h.w, C[3], y))));
    }
    y += __shfl_xor_sync(0xffffffffu, y, 1);
    y += __shfl_xor_sync(0xffffffffu, y, 2);
    if (!live || j != 0) continue;
    y = fmaf(number(kSkip), x, y);
    y *= silu(scratch.z[m * p.channels + c]);
    const int64_t at = static_cast<int64_t>(m) * p.f.inner + share.channel + c;
    if (p.f.rotate) {
      p.g[at] = y;
    } else {
      p.bytes[at] = byte_of(y, *b.g_scale);
    }
  }
}

// The result of W_out, added to the residual stream.
template <int GROUPS>
__device__ __forceinline__ void add_rows(const StackParams& p, int l, const StackShare& share, const float* numbers,
                                         int* acc) {
  const bool first = l == 0, last = l + 1 == p.blocks;
  for (int i = threadIdx.x; i < p.tokens * share.rows; i += kStackWorkers) {
    const int m = i / share.rows, e = i - m * share.rows;
    const int64_t at = static_cast<int64_t>(m) * p.f.model + share.row + e;
    float v = __fadd_rn(__fmul_rn(static_cast<float>(take(acc + e * 8 * GROUPS + m)), numbers[e]),
                        numbers[p.rows + e]);
    if (p.f.residual) {
      const float before =
          first ? AnyVector{p.hidden, p.hidden_type}[m * p.hidden_row + share.row + e] : __ldcg(p.stream + at);
      v = __fadd_rn(v, before);
    }
    if (!last) {
      p.stream[at] = rounded_to(v, p.out_type);
    } else if (p.out_type == Type::kFloat) {
      static_cast<float*>(p.out)[at] = v;
    } else if (p.out_type == Type::kHalf) {
      static_cast<__half*>(p.out)[at] = __float2half_rn(v);
    } else {
      static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(v);
    }
  }
}

template <int GROUPS>
__device__ __forceinline__ void work(const StackParams& p, const StackShare& share, char* shared,
                                     StackBarriers& barriers) {
  const StackFormat& f = p.f;
  char* const act = shared + p.s.act;
  int* const acc = reinterpret_cast<int*>(shared + p.s.acc);
  float* const raw = reinterpret_cast<float*>(shared + p.s.raw);
  __shared__ float partial[kStackWorkers / 32];
  const int sums = f.rank + 2 * f.states;
  // The transform's memory serves the other parts of a block between transforms.
  StackScratch scratch;
  scratch.bc = raw;
  scratch.z = scratch.bc + p.tokens * sums;
  scratch.x = reinterpret_cast<int8_t*>(scratch.z + p.tokens * p.channels);
  scratch.d = scratch.x + p.tokens * p.channels;
  scratch.partial = partial;
  const bool distributed = p.tokens >= kStackDistributed;
  const StackTiles in(2 * share.channels, f.model), out(share.rows, f.inner);
  StackRing ring{shared, &barriers};
  StackGrid grid(p);
  for (int i = threadIdx.x; i < max(round_up(2 * p.channels, 16), round_up(p.rows, 16)) * 8 * GROUPS; i += kStackWorkers)
    acc[i] = 0;

  for (int l = 0; l < p.blocks; ++l) {
    const StackBlock& b = p.block[l];
    const char* const buffer = shared + p.s.buffer[l & 1];
    const auto row_of = [&](int m) -> const void* {
      if (l > 0) return p.stream + static_cast<int64_t>(m) * f.model;
      return static_cast<const char*>(p.hidden) + m * p.hidden_row * size_of(p.hidden_type);
    };
    const Type type = l > 0 ? Type::kFloat : p.hidden_type;
    if (distributed) {
      if (blockIdx.x < p.tokens)
        norm_row(p, b, row_of(blockIdx.x), type, partial,
                 reinterpret_cast<uint32_t*>(p.bytes + static_cast<int64_t>(blockIdx.x) * f.model));
      grid.arrive();
      grid.wait();
      fetch_operand(p, f.model, act);
    } else {
      for (int m = 0; m < p.tokens; ++m)
        norm_row(p, b, row_of(m), type, partial, reinterpret_cast<uint32_t*>(act + m * operand_pitch(f.model)));
    }
    clear_tail(p, f.model, act);
    team_sync();
    multiply<GROUPS>(p, in, ring, act, acc);
    barrier_wait(&barriers.staged[l & 1], (l >> 1) & 1);
    team_sync();
    convolve<GROUPS>(p, b, share, reinterpret_cast<const float*>(buffer + p.s.channel), acc, scratch);
    team_sync();
    add_products(p, l, share, reinterpret_cast<const int*>(buffer + p.s.x_weight), scratch);
    grid.arrive();
    grid.wait();
    split_sums(p, b, l, reinterpret_cast<const float*>(buffer + p.s.dbc), scratch);
    scan(p, b, share, buffer, scratch);
    grid.arrive();
    grid.wait();
    if (f.rotate) {
      if (distributed) {
        if (blockIdx.x < p.tokens)
          rotate_row(p, p.g + static_cast<int64_t>(blockIdx.x) * f.inner, *b.g_scale, raw,
                     p.bytes + static_cast<int64_t>(blockIdx.x) * f.inner);
        grid.arrive();
        grid.wait();
      } else {
        for (int m = 0; m < p.tokens; ++m)
          rotate_row(p, p.g + static_cast<int64_t>(m) * f.inner, *b.g_scale, raw,
                     reinterpret_cast<int8_t*>(act + m * operand_pitch(f.inner)));
      }
    }
    if (distributed || !f.rotate) fetch_operand(p, f.inner, act);
    clear_tail(p, f.inner, act);
    team_sync();
    multiply<GROUPS>(p, out, ring, act, acc);
    team_sync();
    add_rows<GROUPS>(p, l, share, reinterpret_cast<const float*>(buffer + p.s.out), acc);
    if (l + 1 < p.blocks) {
      grid.arrive();
      if (threadIdx.x == 0) barrier_arrive(&barriers.spent[l & 1]);
      grid.wait();
    }
  }
}

template <int GROUPS>
__global__ void __launch_bounds__(kStackThreads, 1) mixers_step_kernel(const __grid_constant__ StackParams p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ StackBarriers barriers;
  const StackShare share(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.s.slots; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], kSlotWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&barriers.staged[i], kStackStagers);
      barrier_init(&barriers.spent[i], 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < kStackWorkers) {
    work<GROUPS>(p, share, memory, barriers);
  } else if (threadIdx.x < kStackWorkers + kStackStagers) {
    stage_blocks(p, share, memory, barriers);
  } else {
    stream_weights(p, share, memory, barriers);
  }
}

}  // namespace quamba
