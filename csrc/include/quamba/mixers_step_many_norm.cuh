// mixers_step for many sequences: from the sums of W_out to u. Each thread block has its rows of the residual stream in
// shared memory, and publishes them; the norm of a sequence's row is some thread block's work.
#pragma once

#include "quamba/mixers_step_kernel.cuh"
#include "quamba/mixers_step_many.cuh"

namespace quamba {

// The thread block's rows of the residual stream before the first block, into `kept` and to all.
__device__ __forceinline__ void enter_many(const StackPlan& p, const StackShare& share, float* kept) {
  const AnyVector hidden{p.hidden, p.hidden_type};
#pragma unroll 1
  for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps)
#pragma unroll 1
    for (int e = threadIdx.x & 31; e < share.rows; e += 32) {
      const float v = hidden[m * p.hidden_row + share.row + e];
      kept[m * p.rows + e] = v;
      publish(p.residual + m * p.f.model + share.row + e, v);
    }
}

constexpr int kFours = 2;  // of a row, that a worker has in registers

// The norm of a row of the residual stream, quantized, for all thread blocks. A worker has the first of its numbers in
// registers, and their weights, asked for before there is anything to wait for.
__device__ __forceinline__ void norm_row_many(const StackPlan& p, int l, int m, const StackNumbers& numbers,
                                              float* partial) {
  const int count = p.f.model / 4, first = threadIdx.x, beyond = first + kFours * kManyWorkers;
  const void* const weight = numbers.block().field[kNormWeight];
  const float scale = numbers.one(kUScale), eps = numbers.block().norm_eps;
  const unsigned* const from = p.residual + turn(l, p.tokens * p.f.model) + m * p.f.model;
  uint4 w[kFours], words[kFours], more[1];
#pragma unroll
  for (int u = 0; u < kFours; ++u)
    w[u] = first + u * kManyWorkers < count ? load4(weight, p.f.norm_weight, first + u * kManyWorkers)
                                            : make_uint4(0, 0, 0, 0);
  await<kFours>(from + 4 * first, 4 * kManyWorkers, divide_up(count - first, kManyWorkers), words);
  float squares = 0.0f;
  const auto add = [&](uint4 four) {
    const float4 v = floats_of(four);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  };
#pragma unroll
  for (int u = 0; u < kFours; ++u) add(words[u]);
#pragma unroll 1
  for (int i = beyond; i < count; i += kManyWorkers) {
    await<1>(from + 4 * i, 0, 1, more);
    add(more[0]);
  }
  squares = warp_sum(squares);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = squares;
  many_sync();
  squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kManyWarps; ++i) squares += partial[i];
  const float size = static_cast<float>(p.f.model);
  const float factor = rsqrtf(divide(squares, size, reciprocal_approx(size)) + eps);
  const int groups = divide_up(p.tokens, 8);
  char* const out = reinterpret_cast<char*>(p.u_words) + turn(l, many_bytes(groups, p.f.model));
  const auto store = [&](int i, uint4 four, uint4 weights) {
    const float4 v = floats_of(four), k = widened(weights, p.f.norm_weight);
    const float4 normal = make_float4(v.x * factor * k.x, v.y * factor * k.y, v.z * factor * k.z, v.w * factor * k.w);
    publish_word(reinterpret_cast<unsigned*>(out + many_place(groups, m, 4 * i)), rounded4(normal, scale) ^ kThere);
  };
#pragma unroll
  for (int u = 0; u < kFours; ++u)
    if (first + u * kManyWorkers < count) store(first + u * kManyWorkers, words[u], w[u]);
#pragma unroll 1
  for (int i = beyond; i < count; i += kManyWorkers)
    store(i, load_published(from + 4 * i), load4(weight, p.f.norm_weight, i));
}

// The rows of the residual stream that this thread block normalizes.
__device__ __forceinline__ void norm_many(const StackPlan& p, int l, const StackNumbers& numbers, ManyGrid& grid,
                                          float* partial) {
#pragma unroll 1
  for (int m = blockIdx.x; m < p.tokens; m += p.grid) {
    norm_row_many(p, l, m, numbers, partial);
    grid.tell();
  }
}

// What a thread block of a cluster has of the others' rows of W_out, for it multiplied only some columns.
template <int GROUPS>
__device__ __forceinline__ void hand_over(const StackPlan& p, StackBarriers& barriers, int parity, int* acc,
                                          int* gathered) {
  const int rank = blockIdx.x & (p.parts - 1);
  if (threadIdx.x == 0) barrier_expect(&barriers.gathered, 4 * (p.parts - 1) * p.rows * p.tokens);
#pragma unroll 1
  for (int other = 1; other < p.parts; ++other) {
    const int to = rank ^ other;
    const uint32_t barrier = remote_address(&barriers.gathered, to);
#pragma unroll 1
    for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps)
#pragma unroll 1
      for (int e = threadIdx.x & 31; e < p.rows; e += 32)
        send(remote_address(gathered + (rank * p.tokens + m) * p.rows + e, to),
             static_cast<uint32_t>(take(acc + (to * p.rows + e) * many_pitch(GROUPS) + m)), barrier);
  }
  barrier_wait(&barriers.gathered, parity);
}

// The result of W_out, added to the residual stream, of which `kept` holds the thread block's part.
template <int GROUPS>
__device__ __forceinline__ void add_rows_many(const StackPlan& p, int l, const StackShare& share,
                                              const StackNumbers& numbers, const int* gathered, float* kept, int* acc) {
  const int rank = blockIdx.x & (p.parts - 1);
  const float g_scale = numbers.one(kGScale);
#pragma unroll 1
  for (int m = threadIdx.x / 32; m < p.tokens; m += kManyWarps) {
#pragma unroll 1
    for (int e = threadIdx.x & 31; e < share.rows; e += 32) {
      int sum = take(acc + (rank * p.rows + e) * many_pitch(GROUPS) + m);
#pragma unroll 1
      for (int other = 0; other < p.parts; ++other)
        if (other != rank) sum += gathered[(other * p.tokens + m) * p.rows + e];
      const float* const number = numbers.row(e);
      float v = __fadd_rn(__fmul_rn(static_cast<float>(sum), __fmul_rn(g_scale, number[0])), number[1]);
      if (p.f.residual) v = __fadd_rn(v, kept[m * p.rows + e]);
      if (l + 1 < p.blocks) {
        v = rounded_to(v, p.out_type);
        publish(p.residual + turn(l + 1, p.tokens * p.f.model) + m * p.f.model + share.row + e, v);
        kept[m * p.rows + e] = v;
      } else {
        store_out(p, static_cast<int64_t>(m) * p.f.model + share.row + e, v);
      }
    }
  }
}

}  // namespace quamba
