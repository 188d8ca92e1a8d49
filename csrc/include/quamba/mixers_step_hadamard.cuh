// mixers_step: the Hadamard transform of one row of g, by the workers of a thread block, and its rounding. The same
// additions in the same order as in hadamard_quant.cuh, but for the base matrix: its signs are numbers in shared memory
// and its rows a loop, as straight-line code of that length takes longer to fetch than to run, where it runs once
// between others; a float32 may differ in its last bit.
#pragma once

#include "quamba/mixers_step_cluster.cuh"
#include "quamba/mixers_step_tags.cuh"

namespace quamba {

// The base matrix, row by row; before the workers start, by all threads.
template <int BASE, int ROW = 0>
__device__ __forceinline__ void write_signs(float* signs) {
  if constexpr (ROW < BASE) {
    constexpr uint64_t kBits = base_row(BASE, ROW);
    if (threadIdx.x < BASE) signs[ROW * BASE + threadIdx.x] = kBits >> threadIdx.x & 1 ? -1.0f : 1.0f;
    write_signs<BASE, ROW + 1>(signs);
  }
}

// Rows `row`, row + step and so on below `end` of the base matrix times the column v, to `store`. Some rows at a time,
// and two sums for each, so that additions need not wait for each other.
template <int BASE, typename Store>
__device__ __forceinline__ void multiply_base(const float* signs, const float (&v)[BASE], int row, int step, int end,
                                              const Store& store) {
  constexpr int kRows = BASE / 4;
#pragma unroll 1
  for (; row < end; row += kRows * step) {
    float even[kRows] = {}, odd[kRows] = {};
#pragma unroll
    for (int i = 0; i < BASE; i += 4)
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float4 s = reinterpret_cast<const float4*>(signs + min(row + k * step, end - 1) * BASE)[i / 4];
        even[k] = fmaf(s.x, v[i], even[k]), odd[k] = fmaf(s.y, v[i + 1], odd[k]);
        even[k] = fmaf(s.z, v[i + 2], even[k]), odd[k] = fmaf(s.w, v[i + 3], odd[k]);
      }
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      if (row + k * step < end) store(row + k * step, even[k] + odd[k]);
  }
}

// The base matrix across the rows of the (base, power) matrix, in place. The worker of a column has it in registers;
// where there are more workers than columns, several have the same one and compute some of its rows each.
template <int BASE, int WORKERS = kStackWorkers>
__device__ __forceinline__ void rotate_base(const float* signs, int log_power, float* shared) {
  const int power = 1 << log_power, parts = max(1, WORKERS >> log_power), pitch = padded_index(power);
  const int part = parts > 1 ? threadIdx.x >> log_power : 0;
#pragma unroll 1
  for (int column = threadIdx.x - part * power; column < power; column += WORKERS) {
    float* const at = shared + padded_index(column);
    float v[BASE];
#pragma unroll
    for (int i = 0; i < BASE; ++i) v[i] = at[i * pitch];
    if (parts > 1) team_sync<WORKERS>();
    multiply_base<BASE>(signs, v, part, parts, BASE, [&](int row, float sum) { at[row * pitch] = sum; });
  }
  team_sync<WORKERS>();
}

// LOG_RADIX butterfly stages at strides 2^log_stride and up, in place.
template <int LOG_RADIX, int WORKERS>
__device__ __forceinline__ void rotate_middle(float* shared, int order, int log_stride) {
  constexpr int kRadix = 1 << LOG_RADIX;
  // From one of a worker's numbers to the next, in padded_index: the stride is a multiple of sixteen.
  const int step = padded_index(1 << log_stride);
#pragma unroll 1
  for (int u = threadIdx.x; u < order >> LOG_RADIX; u += WORKERS) {
    const int low = u & ((1 << log_stride) - 1), first = ((u >> log_stride) << (log_stride + LOG_RADIX)) + low;
    float* const at = shared + padded_index(first);
    float v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = at[i * step];
    butterflies<LOG_RADIX>(v);
#pragma unroll
    for (int i = 0; i < kRadix; ++i) at[i * step] = v[i];
  }
  team_sync<WORKERS>();
}

// The last four stages, and the bytes: with CLUSTER, to the same place of `cluster` thread blocks, or where that is 0
// to one that all know, with many workers as words for all. A worker has eight numbers, its neighbour the other eight
// of sixteen.
template <bool CLUSTER, int WORKERS>
__device__ __forceinline__ void rotate_last(const float* shared, int order, float factor, float scale, int cluster,
                                            uint64_t* rounded, int8_t* out, int first, int many_groups) {
  const float reciprocal = reciprocal_approx(scale), sign = threadIdx.x & 1 ? -1.0f : 1.0f;
#pragma unroll 1
  for (int u0 = threadIdx.x & ~31; u0 < order / 8; u0 += WORKERS) {
    const int u = u0 + (threadIdx.x & 31);
    const bool live = u < order / 8;
    const float* const at = shared + (live ? padded_index(8 * u) : 0);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = at[i];
    butterflies<3>(v);
    uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float turned = fmaf(sign, v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
      bytes[i] = round_to_byte(divide(turned * factor, scale, reciprocal));
    }
    if (live) {
      const uint2 words = make_uint2(pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]),
                                     pack_bytes(bytes[4], bytes[5], bytes[6], bytes[7]));
      if constexpr (WORKERS > kStackWorkers) {
        publish_two(out + many_place(many_groups, 0, first + 8 * u), make_uint2(words.x ^ kThere, words.y ^ kThere));
      } else if (!CLUSTER || cluster == 0) {
        store_bytes<8, true>(out + 8 * u, 8, bytes);
      } else {
#pragma unroll 1
        for (int rank = 0; rank < cluster; ++rank)
          send(remote_address(out + 8 * u, rank), words, remote_address(rounded, rank));
      }
    }
  }
}

// The stages after the base matrix, and the bytes: of `order` numbers, some rows of the (base, power) matrix.
template <bool CLUSTER, int WORKERS>
__device__ __forceinline__ void rotate_rows(const StackPlan& p, float scale, int order, int cluster, uint64_t* rounded,
                                            float* shared, int8_t* out, int first = 0, int many_groups = 0) {
#pragma unroll 1
  for (int done = p.log_power; done > 4;) {
    const int stages = (done - 4) % 4 ? (done - 4) % 4 : 4;
    done -= stages;
    switch (stages) {
      case 1:
        rotate_middle<1, WORKERS>(shared, order, done);
        break;
      case 2:
        rotate_middle<2, WORKERS>(shared, order, done);
        break;
      case 3:
        rotate_middle<3, WORKERS>(shared, order, done);
        break;
      default:
        rotate_middle<4, WORKERS>(shared, order, done);
    }
  }
  rotate_last<CLUSTER, WORKERS>(shared, order, p.factor, scale, cluster, rounded, out, first, many_groups);
}

// Columns [first, first + columns) of the (base, power) matrix of published numbers, to their places in `shared`.
template <int BASE, int WORKERS = kStackWorkers>
__device__ __forceinline__ void fetch_columns(const unsigned* from, int log_power, int first, int log_columns,
                                              float* shared) {
  constexpr int kBatch = 2;
  // A worker's second four are some whole rows below its first: there are 4 * WORKERS numbers between.
  const int count = BASE << log_columns, next = 4 * WORKERS >> log_columns << log_power;
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < count; i += kBatch * 4 * WORKERS) {
    const int fours = divide_up(count - i, 4 * WORKERS);
    const int place = (i >> log_columns << log_power) + first + (i & ((1 << log_columns) - 1));
    uint4 words[kBatch];
    await<kBatch>(from + place, next, fours, words);
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (u < fours) put(shared + padded_index(place) + u * (next + next / 16), words[u]);
  }
}

// A row of g by the thread blocks of a cluster: each fetches some columns of the (base, power) matrix and multiplies
// them by the base matrix, then each has some rows. Their bytes go to the shared memory of all, where they are once
// `rounded` was passed, or with `global` to where `out` is for all; then the next row may follow after the cluster has
// met.
// `turned` changes its phase once a call, `rounded` where it is used.
template <int BASE, int WORKERS = kStackWorkers>
__device__ __forceinline__ void rotate_shared(const StackPlan& p, const unsigned* g, const float* signs, float scale,
                                              StackBarriers& barriers, int parity, bool global, float* shared,
                                              int8_t* out, int many_groups = 0) {
  const int cluster = p.cluster, log_cluster = cluster >> 1, rank = blockIdx.x & (cluster - 1);
  const int log_columns = p.log_power - log_cluster, first_column = rank << log_columns;
  const int pitch = padded_index(p.power), rows = BASE >> log_cluster;
  fetch_columns<BASE, WORKERS>(g, p.log_power, first_column, log_columns, shared);
  team_sync<WORKERS>();
  // A worker has a column, and computes some of the rows of one thread block: WORKERS / power of them share these.
  const int part = threadIdx.x >> log_columns, owner = part & (cluster - 1), parts = WORKERS >> p.log_power;
  float* const at = shared + padded_index(first_column + (threadIdx.x & ((1 << log_columns) - 1)));
  float v[BASE];
#pragma unroll
  for (int i = 0; i < BASE; ++i) v[i] = at[i * pitch];
  // Each gets so many bytes; it may get the first of them before it says so.
  if (threadIdx.x == 0) {
    barrier_expect(&barriers.turned, 4 * rows << p.log_power);
    if (!global) barrier_expect(&barriers.rounded, p.f.inner);
  }
  team_sync<WORKERS>();
  const uint32_t to = remote_address(at, owner), turned = remote_address(&barriers.turned, owner);
  multiply_base<BASE>(signs, v, owner * rows + (part >> log_cluster), parts, (owner + 1) * rows,
                      [&](int row, float sum) { send(to + 4 * row * pitch, __float_as_uint(sum), turned); });
  barrier_wait(&barriers.turned, parity);
  const int first = rank * rows;
  rotate_rows<true, WORKERS>(p, scale, rows * p.power, global ? 0 : cluster, &barriers.rounded, shared + first * pitch,
                             many_groups > 0 ? out : out + first * p.power, first * p.power, many_groups);
}

// multiply_base with the signs in the code, all rows.
template <int BASE, int ROW = 0, typename Store>
__device__ __forceinline__ void multiply_base_known(const float (&v)[BASE], const Store& store) {
  if constexpr (ROW < BASE) {
    constexpr uint64_t kBits = base_row(BASE, ROW);
    const auto add = [&](float sum, int i) { return kBits >> i & 1 ? sum - v[i] : sum + v[i]; };
    float even = kBits & 1 ? -v[0] : v[0], odd = kBits & 2 ? -v[1] : v[1];
    even = add(even, 2), odd = add(odd, 3);
#pragma unroll
    for (int i = 4; i < BASE; i += 4) {
      even = add(even, i), odd = add(odd, i + 1);
      even = add(even, i + 2), odd = add(odd, i + 3);
    }
    store(ROW, even + odd);
    multiply_base_known<BASE, ROW + 1>(v, store);
  }
}

// The published row of g of a shape that is known: a worker waits for a column of the (base, power) matrix, which it
// then has where the base matrix needs it.
template <int BASE, int POWER>
__device__ __forceinline__ void rotate_known(const StackPlan& p, const unsigned* from, float scale, float* shared,
                                             int8_t* out) {
  static_assert(POWER <= kStackWorkers, "a worker has one column");
  if (threadIdx.x < POWER) {
    unsigned words[BASE] = {};
    bool missing;
#pragma unroll 1
    do {
#pragma unroll
      for (int i = 0; i < BASE; ++i)
        if (words[i] == 0) words[i] = load_published_one(from + i * POWER + threadIdx.x);
      missing = false;
#pragma unroll
      for (int i = 0; i < BASE; ++i) missing |= words[i] == 0;
    } while (missing);
    float v[BASE];
#pragma unroll
    for (int i = 0; i < BASE; ++i) v[i] = __uint_as_float(words[i]);
    float* const at = shared + padded_index(threadIdx.x);
    multiply_base_known<BASE>(v, [&](int row, float sum) { at[row * padded_index(POWER)] = sum; });
  }
  team_sync();
  rotate_rows<false, kStackWorkers>(p, scale, BASE * POWER, 0, nullptr, shared, out);
}

// A row of g that fetch_row left in `shared`. D is power * base with power a multiple of 16; `out` is aligned to 16
// bytes.
template <int BASE, int WORKERS = kStackWorkers>
__device__ __forceinline__ void rotate_row(const StackPlan& p, const float* signs, float scale, float* shared,
                                           int8_t* out, int many_groups = 0) {
  team_sync<WORKERS>();
  if constexpr (BASE > 1) rotate_base<BASE, WORKERS>(signs, p.log_power, shared);
  rotate_rows<false, WORKERS>(p, scale, p.f.inner, 0, nullptr, shared, out, 0, many_groups);
}

}  // namespace quamba
