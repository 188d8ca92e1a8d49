// mixers_step: the kernel. A thread block a multiprocessor, all there at a time; each owns some channels (their rows of
// W_in and W_dt, columns of W_x, states) and some rows of W_out. What all need of the others travels with tags: the
// sums of W_x, g, and the residual stream. With several sequences a token's norm and its transform are one thread
// block's work, and a barrier follows each.
//
// The sums are integers and exact, so W_x may be cut along K and added up in any order.
#pragma once

#include "quamba/mixers_step_hadamard.cuh"
#include "quamba/mixers_step_scan.cuh"

namespace quamba {

__device__ __forceinline__ float4 widen4(uint2 words, Type type) {
  const auto half = [&](uint32_t bits) { return from_bits(bits, type); };
  return make_float4(half(words.x & 0xffff), half(words.x >> 16), half(words.y & 0xffff), half(words.y >> 16));
}

__device__ __forceinline__ float4 load4(const void* data, Type type, int i) {
  return type == Type::kFloat ? static_cast<const float4*>(data)[i] : widen4(static_cast<const uint2*>(data)[i], type);
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

// The norm of row `m` of the residual stream as it enters block `l`, quantized. `row` holds it in between.
__device__ __forceinline__ void norm_row(const StackPlan& p, int l, int m, const StackNumbers& numbers, float* row,
                                         float* partial, uint32_t* out) {
  const int count = p.f.model / 4;
  float4* const kept = reinterpret_cast<float4*>(row);
  float squares = 0.0f;
  const auto keep = [&](int i, float4 v) {
    kept[i] = v;
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  };
  if (l == 0) {
    const char* const from = static_cast<const char*>(p.hidden) + m * p.hidden_row * size_of(p.hidden_type);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kStackWorkers) keep(i, load4(from, p.hidden_type, i));
  } else {
    for_tagged(p.residual + static_cast<int64_t>(m) * p.f.model, p.f.model, l, keep);
  }
  const float factor =
      rsqrtf(team_sum(squares, partial) / static_cast<float>(p.f.model) + numbers.block().norm_eps);
  const float scale = numbers.one(kUScale);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kStackWorkers) {
    const float4 v = kept[i], w = load4(numbers.all<char>(kNormWeight), p.f.norm_weight, i);
    out[i] = rounded4(
        make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w), scale);
  }
}

// The result of W_out, added to the residual stream, of which `kept` holds the thread block's part.
template <int GROUPS>
__device__ __forceinline__ void add_rows(const StackPlan& p, int l, const StackShare& share,
                                         const StackNumbers& numbers, float* kept, int* acc) {
  const bool last = l + 1 == p.blocks;
  for (int i = threadIdx.x; i < p.tokens * share.rows; i += kStackWorkers) {
    const int m = i / share.rows, e = i - m * share.rows;
    const int64_t at = static_cast<int64_t>(m) * p.f.model + share.row + e;
    float v = __fadd_rn(__fmul_rn(static_cast<float>(take(acc + e * 8 * GROUPS + m)), numbers.out(e)),
                        numbers.out_bias(e));
    if (p.f.residual) v = __fadd_rn(v, kept[i]);
    if (!last) {
      v = rounded_to(v, p.out_type);
      kept[i] = v;
      store_tagged(p.residual + at, v, l + 1);
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
__device__ __forceinline__ void work(const StackPlan& p, const StackShare& share, char* shared,
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
  const bool distributed = p.tokens >= kStackDistributed;
  // The rows that this thread block normalizes and transforms, and where they go.
  const int first_row = distributed ? blockIdx.x : 0, row_step = distributed ? p.grid : 1;
  const auto operand_row = [&](int m, int columns) {
    return distributed ? p.bytes + static_cast<int64_t>(m) * columns
                       : reinterpret_cast<int8_t*>(act + m * operand_pitch(columns));
  };
  const StackTiles in(2 * share.channels, f.model, p.s.slot_columns), out(share.rows, f.inner, p.s.slot_columns);
  StackRing ring(shared, &barriers);
  StackGrid grid(p);
  for (int i = threadIdx.x; i < max(round_up(2 * p.channels, 16), round_up(p.rows, 16)) * 8 * GROUPS; i += kStackWorkers)
    acc[i] = 0;

  float* const kept = reinterpret_cast<float*>(shared + p.s.kept);
  for (int i = threadIdx.x; i < p.tokens * share.rows; i += kStackWorkers) {
    const int m = i / share.rows;
    kept[i] = AnyVector{p.hidden, p.hidden_type}[m * p.hidden_row + share.row + i - m * share.rows];
  }

  for (int l = 0; l < p.blocks; ++l) {
    const StackNumbers numbers(p, shared + p.s.buffer[l & 1]);
    barrier_wait(&barriers.staged[l & 1], (l >> 1) & 1);
    const uint32_t first_state = first_window(p, share, numbers);
#pragma unroll 1
    for (int m = first_row; m < p.tokens; m += row_step)
      norm_row(p, l, m, numbers, raw, partial, reinterpret_cast<uint32_t*>(operand_row(m, f.model)));
    if (distributed) {
      grid.meet();
      fetch_operand(p, f.model, act);
    }
    clear_tail(p, f.model, act);
    team_sync();
    multiply<GROUPS>(p, in, ring, act, acc);
    team_sync();
    convolve<GROUPS>(p, share, numbers, first_state, acc, scratch);
    team_sync();
    add_products(p, l, share, numbers.x_weight(), scratch);
    const float4 ahead = state_piece(p, share, numbers, threadIdx.x / 4);
    team_sync();
    split_sums(p, l, numbers, scratch);
    scan(p, l, share, numbers, ahead, scratch);
    if (f.rotate) {
      team_sync();
#pragma unroll 1
      for (int m = first_row; m < p.tokens; m += row_step)
        rotate_row(p, p.g + static_cast<int64_t>(m) * f.inner, l + 1, numbers.one(kGScale), raw,
                   operand_row(m, f.inner));
    }
    if (distributed || !f.rotate) {
      grid.meet();
      fetch_operand(p, f.inner, act);
    }
    clear_tail(p, f.inner, act);
    team_sync();
    multiply<GROUPS>(p, out, ring, act, acc);
    team_sync();
    add_rows<GROUPS>(p, l, share, numbers, kept, acc);
    barrier_arrive(&barriers.spent[l & 1]);
  }
}

template <int GROUPS>
__global__ void __launch_bounds__(kStackThreads, 1) mixers_step_kernel(const __grid_constant__ StackParams params) {
  extern __shared__ __align__(128) char memory[];
  __shared__ StackBarriers barriers;
  __shared__ StackPlan p;
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(StackPlan) / 4); i += kStackThreads)
    reinterpret_cast<int*>(&p)[i] = reinterpret_cast<const int*>(&params.plan)[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < params.plan.s.slots; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], kTeamWarps);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(&barriers.staged[i], 2 * kStackStagers);
      barrier_init(&barriers.spent[i], kStackWorkers);
    }
    barriers_ready();
  }
  __syncthreads();
  const StackShare share(p);
  if (threadIdx.x < kStackWorkers) {
    work<GROUPS>(p, share, memory, barriers);
  } else if (threadIdx.x < kStackWorkers + kStackStagers) {
    stage_blocks(p, params.block, share, memory, barriers);
  } else {
    stream_weights(p, params.block, share, memory, barriers);
  }
}

}  // namespace quamba
