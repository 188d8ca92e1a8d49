// mixers_step: the kernel. A thread block a multiprocessor, all there at a time; each owns some channels (their rows of
// W_in and W_dt, columns of W_x, states) and some rows of W_out. What all need of the others goes through the
// second-level cache: the sums of W_x, g, and the residual stream. With several sequences a token's norm and its
// transform are one thread block's work, and a barrier follows each.
//
// The sums are integers and exact, so W_x may be cut along K and added up in any order.
#pragma once

#include "quamba/mixers_step_hadamard.cuh"
#include "quamba/mixers_step_scan.cuh"

namespace quamba {

// Four neighbours of a vector, as they are.
__device__ __forceinline__ uint4 load4(const void* data, Type type, int i) {
  if (type == Type::kFloat) return __ldg(static_cast<const uint4*>(data) + i);
  const uint2 words = __ldg(static_cast<const uint2*>(data) + i);
  return make_uint4(words.x, words.y, 0, 0);
}

__device__ __forceinline__ float4 floats_of(uint4 words) {
  return make_float4(__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                     __uint_as_float(words.w));
}

// What load4 loaded, in float32.
__device__ __forceinline__ float4 widened(uint4 words, Type type) {
  if (type == Type::kFloat) return floats_of(words);
  if (type == Type::kBFloat16)
    return make_float4(__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u),
                       __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xffff0000u));
  const auto half = [](uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
  return make_float4(half(words.x & 0xffff), half(words.x >> 16), half(words.y & 0xffff), half(words.y >> 16));
}

__device__ __forceinline__ float rounded_to(float v, Type type) {
  if (type == Type::kHalf) return __half2float(__float2half_rn(v));
  if (type == Type::kBFloat16) return __bfloat162float(__float2bfloat16_rn(v));
  return v;
}

// `partial` is free again after the next meeting of the workers.
__device__ __forceinline__ float team_sum(float v, float* partial) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  team_sync();
  v = 0.0f;
#pragma unroll
  for (int i = 0; i < kStackWorkers / 32; ++i) v += partial[i];
  return v;
}

__device__ __forceinline__ uint32_t rounded4(float4 v, float scale) {
  const float r = reciprocal_approx(scale);
  return pack_bytes(round_to_byte(divide(v.x, scale, r)), round_to_byte(divide(v.y, scale, r)),
                    round_to_byte(divide(v.z, scale, r)), round_to_byte(divide(v.w, scale, r)));
}

// The norm of a published row of the residual stream, quantized. A worker has its numbers in registers, and the first
// of the weights, asked for before there is anything to wait for. MOST: fours of a worker.
template <int MOST>
__device__ __forceinline__ void norm_row(const StackPlan& p, const StackNumbers& numbers, const unsigned* from,
                                         float* partial, uint32_t* out) {
  constexpr int kAhead = MOST < 3 ? MOST : 3;
  const int count = p.f.model / 4, first = threadIdx.x;
  const void* const weight = numbers.block().field[kNormWeight];
  const float scale = numbers.one(kUScale), eps = numbers.block().norm_eps;
  uint4 w[kAhead], words[MOST];
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    w[u] = first + u * kStackWorkers < count ? load4(weight, p.f.norm_weight, first + u * kStackWorkers)
                                             : make_uint4(0, 0, 0, 0);
  await<MOST>(from + 4 * first, 4 * kStackWorkers, divide_up(count - first, kStackWorkers), words);
  float squares = 0.0f;
#pragma unroll
  for (int u = 0; u < MOST; ++u) {
    if (first + u * kStackWorkers >= count) break;
    const float4 v = floats_of(words[u]);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  }
  const float size = static_cast<float>(p.f.model);
  const float factor = rsqrtf(divide(team_sum(squares, partial), size, reciprocal_approx(size)) + eps);
#pragma unroll
  for (int u = 0; u < MOST; ++u) {
    if (first + u * kStackWorkers >= count) break;
    const float4 v = floats_of(words[u]), 
                 k = widened(u < kAhead ? w[u % kAhead] : load4(weight, p.f.norm_weight, first + u * kStackWorkers),
                             p.f.norm_weight);
    out[first + u * kStackWorkers] =
        rounded4(make_float4(v.x * factor * k.x, v.y * factor * k.y, v.z * factor * k.z, v.w * factor * k.w), scale);
  }
}

// The thread block's rows of the residual stream before the first block, into `kept` and to all.
__device__ __forceinline__ void enter(const StackPlan& p, const StackShare& share, float* kept) {
  const AnyVector hidden{p.hidden, p.hidden_type};
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens * share.rows; i += kStackWorkers) {
    const int m = share.over_rows.of(i), e = share.row + i - m * share.rows;
    kept[i] = hidden[m * p.hidden_row + e];
    publish(p.residual + m * p.f.model + e, kept[i]);
    if (p.tokens * share.rows <= kStackWorkers) break;
  }
}

// What a row of W_out needs beside its sum, read before that is there.
struct StackOutput {
  float factor, bias, kept;
};

__device__ __forceinline__ StackOutput output_of(const StackPlan& p, const StackShare& share,
                                                 const StackNumbers& numbers, const float* kept, int i) {
  if (i >= p.tokens * share.rows) return {};
  const float* const number = numbers.row(i - share.over_rows.of(i) * share.rows);
  return {__fmul_rn(numbers.one(kGScale), number[0]), number[1], kept[i]};
}

__device__ __forceinline__ void store_out(const StackPlan& p, int64_t at, float v) {
  if (p.out_type == Type::kFloat) {
    static_cast<float*>(p.out)[at] = v;
  } else if (p.out_type == Type::kHalf) {
    static_cast<__half*>(p.out)[at] = __float2half_rn(v);
  } else {
    static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(v);
  }
}

// The result of W_out, added to the residual stream, of which `kept` holds the thread block's part.
template <typename Shape>
__device__ __forceinline__ void add_rows(const StackPlan& p, int l, const StackShare& share,
                                         const StackNumbers& numbers, StackOutput out, float* kept, int* acc) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tokens * share.rows; i += kStackWorkers) {
    const int m = share.over_rows.of(i), e = i - m * share.rows;
    int sum;
    if constexpr (Shape::kKnown) {
      sum = sum_known<typename Shape::Out>(acc, e);
    } else {
      sum = take(acc + e * kAccPitch + m);
    }
    const int64_t at = static_cast<int64_t>(m) * p.f.model + share.row + e;
    if (i != threadIdx.x) out = output_of(p, share, numbers, kept, i);
    float v = __fadd_rn(__fmul_rn(static_cast<float>(sum), out.factor), out.bias);
    if (p.f.residual) v = __fadd_rn(v, out.kept);
    if (l + 1 < p.blocks) {
      v = rounded_to(v, p.out_type);
      publish(p.residual + turn(l + 1, p.tokens * p.f.model) + at, v);
      kept[i] = v;
    } else {
      store_out(p, at, v);
    }
    if (p.tokens * share.rows <= kStackWorkers) break;
  }
}

// What a worker loads at a time: fours of a row, steps of a slot. So many as the models with this base matrix have;
// more would be code to fetch for nothing.
template <int BASE>
constexpr int kAtATime = BASE == 12 ? 3 : BASE == 20 ? 5 : 4;

template <typename Shape>
__device__ __forceinline__ StackShare share_of(const StackPlan& p, const StackFixed& fixed) {
  if constexpr (Shape::kKnown) {
    return Shape::share(p);
  } else {
    return fixed.share;
  }
}

// What the workers do. Each of a block's two halves ends with a product: before the first one comes the norm, before
// the second one all else, and both begin with a row that all thread blocks contributed to. So there is one loop over
// halves, and the code that both share is there once.
template <int BASE, bool CLUSTER, typename Shape>
__device__ __forceinline__ void work(const StackPlan& p, StackFixed& fixed, char* shared) {
  const StackShare share = share_of<Shape>(p, fixed);
  StackBarriers& barriers = fixed.barriers;
  float *const partial = fixed.partial, *const signs = fixed.signs;
  const StackFormat& f = p.f;
  char* const act = shared + p.s.act;
  int* const acc = reinterpret_cast<int*>(shared + p.s.acc);
  float* const raw = reinterpret_cast<float*>(shared + p.s.raw);
  float* const kept = reinterpret_cast<float*>(shared + p.s.kept);
  StackScratch scratch;
  scratch.bc = reinterpret_cast<float*>(shared + p.s.scratch);
  scratch.z = scratch.bc + p.tokens * p.over_sums.by;
  scratch.x = reinterpret_cast<int8_t*>(scratch.z + p.tokens * p.channels);
  scratch.d = scratch.x + p.tokens * p.channels;
  const bool distributed = p.tokens >= kStackDistributed;
  StackRing ring(shared, &barriers);
  StackGrid grid(p);
#pragma unroll 1
  for (int i = threadIdx.x; i < max(round_up(2 * p.channels, 16), round_up(p.rows, 16)) * kAccPitch; i += kStackWorkers)
    acc[i] = 0;
  enter(p, share, kept);

  int turns = 0, rounds = 0;  // of the cluster's barriers
  uint32_t first_state = 0;
  StackInput input{};
  StackOutput output{};
  using Held = StackHeldPair<kAtATime<BASE>, Shape>;
  typename Held::In held_in;
  typename Held::Out held_out;
  // `second`: a bool, or a constant in place of one.
  const auto do_half = [&](int l, auto second) {
    const int columns = second ? f.inner : f.model;
    const StackNumbers numbers(p, shared + (l & 1 ? p.s.head[1] : p.s.head[0]), shared + p.s.body);
    if (!second) {
      barrier_wait(&barriers.staged[l & 1], (l >> 1) & 1);
      first_state = first_window(p, share, numbers);
      if constexpr (Held::kServes) held_in.load(ring, p.s.slot_bytes);
      if constexpr (Shape::kKnown) {
        barrier_wait(&barriers.body_staged, l & 1);
        input = input_of(p, share, numbers, threadIdx.x);
      }
    } else {
      convolve<Shape>(p, share, numbers, first_state, input, acc, scratch);
      team_sync();
      add_products(p, l, share, numbers, scratch);
      scan<BASE, Shape>(p, l, share, numbers, acc, scratch);
      barrier_arrive(&barriers.body_spent);
      if constexpr (Held::kServes) held_out.load(ring, p.s.slot_bytes);
      if constexpr (Shape::kKnown) output = output_of(p, share, numbers, kept, threadIdx.x);
      if (!Shape::kKnown && p.s.scratch == p.s.raw) team_sync();  // the row of g takes the place of what scan needed
    }
    if (!second || BASE > 0) {
      // The rows that this thread block normalizes, or transforms, with CLUSTER as one of some.
      const int sharing = CLUSTER && second ? p.cluster >> 1 : 0;  // its logarithm, as this is 1, 2 or 4
      const int first_row = distributed ? blockIdx.x >> sharing : 0, row_step = distributed ? p.grid >> sharing : 1;
#pragma unroll 1
      for (int m = first_row; m < p.tokens; m += row_step) {
        const unsigned* const from = (second ? p.g : p.residual) + turn(l, p.tokens * columns) + m * columns;
        int8_t* const row = distributed ? p.bytes + static_cast<int64_t>(m) * columns
                                        : reinterpret_cast<int8_t*>(act + m * operand_pitch(columns));
        if (!second) {
          constexpr int kOnce = 4 * kStackWorkers, kFew = Shape::kKnown ? Shape::kNormFours : 3;
          if (Shape::kKnown || columns <= kFew * kOnce) {
            norm_row<kFew>(p, numbers, from, partial, reinterpret_cast<uint32_t*>(row));
          } else {
            norm_row<kStackWidth / kOnce>(p, numbers, from, partial, reinterpret_cast<uint32_t*>(row));
          }
        } else if constexpr (CLUSTER) {
          rotate_shared<BASE>(p, from, signs, numbers.one(kGScale), barriers, turns++ & 1, distributed, raw, row);
          if (!distributed) barrier_wait(&barriers.rounded, rounds++ & 1);
        } else if constexpr (Shape::kKnown) {
          rotate_known<BASE, Shape::kPower>(p, from, numbers.one(kGScale), raw, row);
        } else {
          fetch_row<kAtATime<BASE>>(from, columns, raw);
          rotate_row<BASE>(p, signs, numbers.one(kGScale), raw, row);
        }
        if (m + row_step < p.tokens) team_sync();
      }
    }
    if (distributed || (second && BASE == 0)) {
      grid.meet();
      fetch_operand(p, columns, act);
    }
    clear_tail(p, columns, act);
    team_sync();
    if constexpr (!Shape::kKnown) {
      if (second) {
        output = output_of(p, share, numbers, kept, threadIdx.x);
      } else {
        barrier_wait(&barriers.body_staged, l & 1);
        input = input_of(p, share, numbers, threadIdx.x);
      }
    }
    if constexpr (Held::kServes) {
      if constexpr (decltype(second)::value) {
        held_out.multiply(p.s.slots, ring, act, acc);
      } else {
        held_in.multiply(p.s.slots, ring, act, acc);
      }
    } else if constexpr (Shape::kKnown) {
      using Tiles = std::conditional_t<decltype(second)::value, typename Shape::Out, typename Shape::In>;
      multiply_known<kAtATime<BASE>, Tiles>(p.s.slots, p.s.slot_bytes, ring, act, acc);
    } else if (p.tokens > 4) {
      multiply<kAtATime<BASE>, 2>(p, fixed.share.tiles[second], ring, act, acc);
    } else {
      multiply<kAtATime<BASE>, 1>(p, fixed.share.tiles[second], ring, act, acc);
    }
    team_sync();
    if (second) {
      add_rows<Shape>(p, l, share, numbers, output, kept, acc);
      barrier_arrive(&barriers.spent[l & 1]);
    }
  };
  if constexpr (Shape::kKnown) {
#pragma unroll 1
    for (int l = 0; l < p.blocks; ++l) do_half(l, std::false_type()), do_half(l, std::true_type());
  } else {
#pragma unroll 1
    for (int half = 0; half < 2 * p.blocks; ++half) do_half(half / 2, (half & 1) == 1);
  }
}

// Of the ring, the staging and the cluster, by one thread.
__device__ __forceinline__ void init_barriers(const StackPlan& p, StackBarriers& barriers, int workers,
                                              int team_warps) {
#pragma unroll 1
  for (int i = 0; i < p.s.slots; ++i) {
    barrier_init(&barriers.full[i], kStackStreams);
    barrier_init(&barriers.empty[i], team_warps);
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    barrier_init(&barriers.staged[i], 2 * kStackStagers);
    barrier_init(&barriers.spent[i], workers);
  }
  barrier_init(&barriers.body_staged, kStackStagers);
  barrier_init(&barriers.body_spent, workers);
  barrier_init(&barriers.turned, 1);
}

// BASE: order of the base matrix of the transform of g; 0: there is no transform. CLUSTER: thread blocks of a cluster
// share it.
template <int BASE, bool CLUSTER, typename Shape>
__global__ void __launch_bounds__(kStackThreads, 1) mixers_step_kernel(const __grid_constant__ StackParams params) {
  extern __shared__ __align__(128) char memory[];
  char* const first = kept_address(memory);
  StackFixed& fixed = *reinterpret_cast<StackFixed*>(first);
  char* const shared = first + kStackFixedBytes;
  const StackPlan& p = params.plan;
  StackBarriers& barriers = fixed.barriers;
#pragma unroll 1
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(StackPlan) / 4); i += kStackThreads)
    reinterpret_cast<int*>(&fixed.plan)[i] = reinterpret_cast<const int*>(&p)[i];
  // Numbers that are never copied, of biases that are missing, are zero.
#pragma unroll 1
  for (int i = kStackFixedBytes + p.s.head[0] + 4 * threadIdx.x; i < p.s.total; i += 4 * kStackThreads)
    *reinterpret_cast<int*>(first + i) = 0;
  if constexpr (BASE > 1) write_signs<BASE>(fixed.signs);
  if (threadIdx.x == 0) {
    init_barriers(p, barriers, kStackWorkers, kTeamWarps);
    barrier_init(&barriers.rounded, 1);
    barriers_ready();
    fixed.share = StackShare(p);
  }
  __syncthreads();
  if constexpr (CLUSTER) cluster_sync();
  if (threadIdx.x < kStackWorkers) {
    if constexpr (Shape::kKnown) {
      work<BASE, CLUSTER, Shape>(Shape::plan(p), fixed, shared);
    } else {
      work<BASE, CLUSTER, Shape>(p, fixed, shared);
    }
  } else if (threadIdx.x < kStackWorkers + kStackStagers) {
    stage_blocks<kStackWorkers, false>(fixed.plan, params.block, fixed.share, shared, barriers);
  } else {
    stream_weights(fixed.plan, params.block, fixed.share, shared, barriers);
  }
}

}  // namespace quamba
