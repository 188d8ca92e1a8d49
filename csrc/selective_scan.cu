// quamba::selective_scan and quamba::selective_scan_step on CUDA.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "op.h"
#include "ops.h"
#include "quamba/selective_scan_copies.cuh"
#include "quamba/selective_scan_halves.cuh"
#include "quamba/selective_scan_relay.cuh"
#include "quamba/selective_scan_step.cuh"
#include "selective_scan_kernel.h"
#include "selective_scan_step_bulk.h"

namespace quamba {
namespace {

// x (B, L, D) or, for a step, (B, D); `size` is D or N.
Sequence sequence_of(const Tensor& t, const OptionalTensor& scale, const Tensor& like, int64_t size,
                     const char* what) {
  check_device(t, like, what);
  const int64_t last = t.dim() - 1;
  QUAMBA_CHECK(t.dim() == like.dim() && t.size(0) == like.size(0) && t.size(last) == size &&
                   (last == 1 || t.size(1) == like.size(1)),
               what, " has shape ", shape_of(t), "; expected a last dimension of ", size, " beside x ",
               shape_of(like));
  return {t.data_ptr(), type_of(t, what),  t.stride(0), last == 2 ? t.stride(1) : 0,
          t.stride(last), scale_of(scale, size, like, what)};
}

// Whether every row of `s` (size elements, from any multiple of `step` on) can be copied in 4-byte words.
bool in_words(const Sequence& s, int64_t size, int64_t step) {
  const int64_t bytes = size_of(s.type);
  return s.data == nullptr || (s.channel == 1 && aligned(s.data, 4) && s.batch * bytes % 4 == 0 &&
                               s.time * bytes % 4 == 0 && size * bytes % 4 == 0 && step * bytes % 4 == 0);
}

// dt: none where a product takes its place.
ScanParams params_of(const Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& dt,
                     const OptionalTensor& dt_scale, const Tensor& dt_bias, const Tensor& A, const Tensor& B,
                     const OptionalTensor& B_scale, const Tensor& C, const OptionalTensor& C_scale, const Tensor& D,
                     const OptionalTensor& z, const OptionalTensor& z_scale, const OptionalTensor& out_scale,
                     ScalarType out_dtype, const OptionalTensor& state) {
  const int64_t channels = x.size(x.dim() - 1);
  check_device(A, x, "A");
  QUAMBA_CHECK(A.dim() == 2 && A.size(0) == channels && A.scalar_type() == ScalarType::Float, "A has shape ",
               shape_of(A), "; expected float32 (", channels, ", N)");
  const int64_t states = A.size(1);
  ScanParams p{};
  p.batch = x.size(0), p.length = x.dim() == 3 ? x.size(1) : 1, p.channels = channels;
  p.states = static_cast<int>(states);
  p.x = sequence_of(x, x_scale, x, channels, "x");
  p.dt.scale = scale_of(dt_scale, channels, x, "dt_scale");
  if (dt) p.dt = sequence_of(*dt, dt_scale, x, channels, "dt");
  p.B = sequence_of(B, B_scale, x, states, "B");
  p.C = sequence_of(C, C_scale, x, states, "C");
  if (z) p.z = sequence_of(*z, z_scale, x, channels, "z");
  p.dt_bias = vector_of(dt_bias, channels, x, "dt_bias");
  p.D = vector_of(D, channels, x, "D");
  p.A = static_cast<const float*>(A.data_ptr()), p.a_channel = A.stride(0), p.a_state = A.stride(1);
  p.out_type = result_type(out_dtype, out_scale.has_value());
  p.out_scale = scale_of(out_scale, channels, x, "out_scale");
  if (state) {
    check_device(*state, x, "state");
    QUAMBA_CHECK(state->dim() == 3 && state->size(0) == p.batch && state->size(1) == channels &&
                     state->size(2) == states && state->scalar_type() == ScalarType::Float,
                 "state has shape ", shape_of(*state), "; expected float32 (", p.batch, ", ", channels, ", ", states,
                 ")");
    p.state = static_cast<float*>(state->data_ptr());
    p.state_batch = state->stride(0), p.state_channel = state->stride(1), p.state_state = state->stride(2);
  }
  return p;
}

// The number of channels a block takes: as many multiprocessors as possible get equally many channels.
int channels_per_block(const ScanParams& p, int lanes, int processors) {
  const int step = lanes == 4 ? 8 : 4;
  int64_t best_cost = INT64_MAX;
  int best = step;
  for (int count = kScanThreads / lanes / step * step; count >= step; count -= step) {
    const int64_t blocks = (p.channels + count - 1) / count * p.batch;
    const int64_t cost = (blocks + processors - 1) / processors * count;
    if (cost < best_cost) best_cost = cost, best = count;
  }
  return best;
}

// How a long scan is cut: lanes along time, channels of a block; no lanes where another kernel is to run.
struct ChunkPlan {
  int lanes = 0, channels = 0;
};

// The plan by which the busiest multiprocessor has least to do, where more warps to choose from make for less waiting.
// Measured (benchmarks/NOTES.md): short sequences do not repay the tables, and many channels fill the device anyway.
ChunkPlan plan_chunks(ScanParams p, int device, int processors) {
  static const char* const forced_lanes = std::getenv("QUAMBA_SCAN_LANES");  // 0, 16 or 32, for tuning
  static const char* const forced_channels = std::getenv("QUAMBA_SCAN_CHANNELS");
  ChunkPlan best;
  if (!forced_lanes && (p.length < 512 || p.batch * p.channels >= 80 * processors)) return best;
  int shared = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  double best_cost = 0.0;
  for (const int lanes : {16, 32}) {
    if (forced_lanes && std::atoi(forced_lanes) != lanes) continue;
    const int64_t length = lanes * kScanSteps, steps = (p.length + length - 1) / length * length;
    for (int channels = kChunkThreads / lanes / 4 * 4; channels >= 4; channels -= 4) {
      if (forced_channels && std::atoi(forced_channels) != channels) continue;
      p.block_channels = channels;
      const int needed = lanes == 16 ? ChunkLayout<16>(p).total : ChunkLayout<32>(p).total;
      if (needed > shared) continue;
      const int64_t blocks = (p.channels + channels - 1) / channels * p.batch;
      const int64_t share = (blocks + processors - 1) / processors;
      const int64_t at_a_time = std::min<int64_t>({share, kChunkThreads / (lanes * channels), shared / needed});
      const double warps = static_cast<double>(at_a_time) * lanes * channels / 128;  // of a scheduler
      const double cost = static_cast<double>(share) * channels * steps * (warps + 1.2) / warps;
      if (best.lanes == 0 || cost < best_cost) best_cost = cost, best = {lanes, channels};
    }
  }
  return best;
}

// Whether the rows of int8 can be copied in pieces of so many bytes, and their stride be kept in 32 bits.
bool in_pieces(const Sequence& s, int bytes) {
  return s.data == nullptr ||
         (aligned(s.data, bytes) && s.batch % bytes == 0 && s.time % bytes == 0 && s.time >= 0 && s.time <= INT32_MAX);
}

// The bytes of shared memory that a block asks for which has so many groups of channels, or half of them with another.
int relay_bytes(int groups, int blocks) {
  constexpr int kBytes[kRelayGroups] = {RelayLayout<1, 1>::kTotal, RelayLayout<2, 1>::kTotal, RelayLayout<3, 1>::kTotal,
                                        RelayLayout<4, 1>::kTotal, RelayLayout<5, 1>::kTotal};
  return blocks == 1 ? kBytes[groups - 1] : RelayLayout<kPairedGroups, 2>::kTotal;
}

// How many groups of channels a block has where the warps hand each other the states, and how many blocks share them
// and take turns at the sequence; no groups where another kernel is to run.
struct RelayPlan {
  int groups = 0, blocks = 1;
  bool halves = false;  // selective_scan_halves
};

// The plan by which the busiest multiprocessor has least to do, where more groups at a time make for less waiting.
// Short sequences do not repay the tables. Halves take a tenth less for the same, but 3 us more to begin and to end.
RelayPlan plan_relay(const ScanParams& p, int device, int processors) {
  static const char* const forced = std::getenv("QUAMBA_SCAN_RELAY");  // 0 to kRelayGroups, 3x2, 3h to 5h, for tuning
  static const char* const other = std::getenv("QUAMBA_SCAN_LANES");
  const bool fits = p.states == kRelayStates && p.channels % kRelayChannels == 0 && in_pieces(p.x, 8) &&
                    in_pieces(p.dt, 8) && in_pieces(p.z, 8) && p.B.time >= 0 && p.B.time <= INT32_MAX &&
                    p.C.time >= 0 && p.C.time <= INT32_MAX && p.length < INT32_MAX / 2 && p.channels <= INT32_MAX / 4;
  RelayPlan best;
  if (!fits || (forced == nullptr && (other != nullptr || p.length < 512))) return best;
  const bool paired = forced && std::strstr(forced, "x2") != nullptr;
  const bool halved = forced && std::strstr(forced, "h") != nullptr;
  int shared = 0, major = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  double best_cost = 0.0;
  const auto consider = [&](int groups, int blocks) {
    if (forced && (std::atoi(forced) != groups || paired != (blocks > 1) || halved)) return;
    if (relay_bytes(groups, blocks) > shared) return;
    const int channels = groups * kRelayChannels;
    const int64_t shares = (p.channels + channels - 1) / channels * p.batch;
    const int64_t share = (shares + processors / blocks - 1) / (processors / blocks);
    const int64_t at_a_time = groups * std::min<int64_t>(share, shared / relay_bytes(groups, blocks));
    const double warps = static_cast<double>(at_a_time * relay_pieces(groups, blocks)) / 4;  // of a scheduler
    const double cost = static_cast<double>(share * groups) / blocks * (warps + 1.0) / warps;
    if (best.groups == 0 || cost < best_cost) best_cost = cost, best = {groups, blocks};
  };
  for (int groups = kRelayGroups; groups >= 1; --groups) consider(groups, 1);
#ifdef QUAMBA_SM90
  if (major == 9 && processors > 1) {
    consider(kPairedGroups, 2);
    for (int groups = kHalvesFewest; groups <= kHalvesGroups; ++groups) {
      if (forced ? std::atoi(forced) != groups || !halved : p.length < 1024) continue;
      const int channels = groups * kHalvesChannels;
      const int64_t shares = (p.channels + channels - 1) / channels * p.batch;
      const int64_t share = (shares + processors / 2 - 1) / (processors / 2);
      const double cost = 0.9 * static_cast<double>(share * (groups + 1));
      if (best.groups == 0 || cost < best_cost) best_cost = cost, best = {groups, 2, true};
    }
  }
#endif
  return best;
}

cudaError_t launch_relay(const ScanParams& p, const RelayPlan& plan, cudaStream_t stream) {
#ifdef QUAMBA_SM90
  if (plan.halves)
    return plan.groups == 3   ? launch_selective_scan_halves<3>(p, stream)
           : plan.groups == 4 ? launch_selective_scan_halves<4>(p, stream)
                              : launch_selective_scan_halves<5>(p, stream);
  if (plan.blocks == 2) return launch_selective_scan_relay<kPairedGroups, 2>(p, stream);
#endif
  switch (plan.groups) {
    case 1:
      return launch_selective_scan_relay<1, 1>(p, stream);
    case 2:
      return launch_selective_scan_relay<2, 1>(p, stream);
    case 3:
      return launch_selective_scan_relay<3, 1>(p, stream);
    case 4:
      return launch_selective_scan_relay<4, 1>(p, stream);
    default:
      return launch_selective_scan_relay<5, 1>(p, stream);
  }
}

}  // namespace

Tensor selective_scan(const Tensor& x, const OptionalTensor& x_scale, const Tensor& dt,
                      const OptionalTensor& dt_scale, const Tensor& dt_bias, const Tensor& A, const Tensor& B,
                      const OptionalTensor& B_scale, const Tensor& C, const OptionalTensor& C_scale, const Tensor& D,
                      const OptionalTensor& z, const OptionalTensor& z_scale, const OptionalTensor& out_scale,
                      ScalarType out_dtype, const OptionalTensor& state) {
  QUAMBA_CHECK(x.dim() == 3, "x has shape ", shape_of(x), "; expected (B, L, D)");
  ScanParams p = params_of(x, x_scale, dt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale, out_scale,
                           out_dtype, state);
  QUAMBA_CHECK(p.states >= 1 && p.states <= 64, "found a state size of ", p.states, "; expected 1 to 64 on CUDA");
  Tensor out = empty(x, sizes_of(x), out_dtype);
  if (out.numel() == 0) return out;
  p.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  // Fewer lanes a channel cost less; more keep the device busy where channels are few.
  const int processors = multiprocessors(x);
  const int lanes = p.states > 16 ? 16 : p.batch * p.channels < 80 * processors ? 8 : 4;
  static const char* const forced = std::getenv("QUAMBA_SCAN_CHANNELS");  // a multiple of 8, for tuning
  p.block_channels = forced ? std::atoi(forced) : channels_per_block(p, lanes, processors);
  const int64_t step = p.block_channels;
  const bool async = in_words(p.x, p.channels, step) && in_words(p.dt, p.channels, step) &&
                     in_words(p.z, p.channels, step) && in_words(p.B, p.states, p.states) &&
                     in_words(p.C, p.states, p.states) && p.channels * size_of(p.out_type) % 4 == 0;
  const bool bytes = p.x.type == Type::kInt8 && p.dt.type == Type::kInt8 && p.B.type == Type::kInt8 &&
                     p.C.type == Type::kInt8 && (!z || p.z.type == Type::kInt8);
  const cudaStream_t stream = stream_of(x);
  ChunkPlan plan;
  const RelayPlan relay = bytes && async ? plan_relay(p, x.get_device_index(), processors) : RelayPlan{};
  if (!relay.groups && bytes && async && p.states % 4 == 0 && p.states <= kChunkStates)
    plan = plan_chunks(p, x.get_device_index(), processors);
  if (plan.lanes) p.block_channels = plan.channels;
  p.quads = p.channels % 16 == 0 && in_pieces(p.x, 16) && in_pieces(p.dt, 16) && in_pieces(p.z, 16);
  const cudaError_t error = relay.groups       ? launch_relay(p, relay, stream)
                            : plan.lanes == 16 ? launch_selective_scan_chunks<16>(p, stream)
                            : plan.lanes == 32 ? launch_selective_scan_chunks<32>(p, stream)
                            : p.states > 16    ? launch_selective_scan<16, 4>(p, bytes, async, stream)
                            : lanes == 8       ? launch_selective_scan<8, 2>(p, bytes, async, stream)
                                               : launch_selective_scan<4, 4>(p, bytes, async, stream);
  QUAMBA_CHECK(error == cudaSuccess, "selective_scan: the kernel could not be launched: ", cudaGetErrorString(error));
  return out;
}

namespace {

// One token by either step kernel.
template <bool kProduct>
Tensor step(const Tensor& x, ScanParams p, const DtProduct& product, ScalarType out_dtype, bool early = false) {
  Tensor out = empty(x, sizes_of(x), out_dtype);
  if (out.numel() == 0) return out;
  p.out = out.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool vector = p.states % 4 == 0 && p.a_state == 1 && p.a_channel % 4 == 0 && aligned(p.A, 16) &&
                      p.state_state == 1 && p.state_channel % 4 == 0 && p.state_batch % 4 == 0 &&
                      aligned(p.state, 16) && product.rank % 16 == 0 && product.d_batch % 16 == 0 &&
                      product.weight_row % 16 == 0 && aligned(product.d, 16) && aligned(product.weight, 16);
#ifdef QUAMBA_SM90
  if (vector && takes_bulk_step(p, product, x.get_device_index())) {
    check_launch("selective_scan_step", selective_scan_step_bulk(p, kProduct ? &product : nullptr, early,
                                                                 multiprocessors(x), stream_of(x)));
    return out;
  }
#endif
  // With few sequences a thread takes one, which makes for more blocks.
  const auto run = [&](auto sequences, auto kind) {
    const dim3 grid(static_cast<unsigned>((p.channels + kStepChannels - 1) / kStepChannels),
                    static_cast<unsigned>((p.batch + sequences.value - 1) / sequences.value));
    const int narrow = (p.states + 3) / 4 * 4 * static_cast<int>(sizeof(float));  // B or C of a sequence
    const int slots = kind.value ? step_slots(sequences.value, kProduct) * kStepThreads * 16 : 0;
    const int shared = sequences.value * (2 * narrow + 16 * product.pieces()) + slots;
    return launch(selective_scan_step_kernel<sequences.value, kind.value, kProduct>,
                  Launch{grid, kStepThreads, shared, stream_of(x)}, p, product);
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 4> kFour;
  check_launch("selective_scan_step", !vector       ? run(kOne, std::false_type{})
                                      : p.batch < 4 ? run(kOne, std::true_type{})
                                                    : run(kFour, std::true_type{}));
  return out;
}

Tensor selective_scan_step(const Tensor& x, const OptionalTensor& x_scale, const Tensor& dt,
                           const OptionalTensor& dt_scale, const Tensor& dt_bias, const Tensor& A, const Tensor& B,
                           const OptionalTensor& B_scale, const Tensor& C, const OptionalTensor& C_scale,
                           const Tensor& D, const OptionalTensor& z, const OptionalTensor& z_scale,
                           const OptionalTensor& out_scale, ScalarType out_dtype, const Tensor& state) {
  QUAMBA_CHECK(x.dim() == 2, "x has shape ", shape_of(x), "; expected (B, D)");
  const ScanParams p = params_of(x, x_scale, dt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D, z, z_scale,
                                 out_scale, out_dtype, state);
  return step<false>(x, p, DtProduct{}, out_dtype);
}

}  // namespace

Tensor selective_scan_dt_step(const Tensor& x, const OptionalTensor& x_scale, const Tensor& d, const Tensor& d_scale,
                              const Tensor& dt_weight, const Tensor& dt_weight_scale, const OptionalTensor& dt_scale,
                              const Tensor& dt_bias, const Tensor& A, const Tensor& B, const OptionalTensor& B_scale,
                              const Tensor& C, const OptionalTensor& C_scale, const Tensor& D, const OptionalTensor& z,
                              const OptionalTensor& z_scale, const OptionalTensor& out_scale, ScalarType out_dtype,
                              const Tensor& state, bool early) {
  QUAMBA_CHECK(x.dim() == 2, "x has shape ", shape_of(x), "; expected (B, D)");
  const ScanParams p = params_of(x, x_scale, std::nullopt, dt_scale, dt_bias, A, B, B_scale, C, C_scale, D, z,
                                 z_scale, out_scale, out_dtype, state);
  check_device(d, x, "d");
  check_device(dt_weight, x, "dt_weight");
  QUAMBA_CHECK(d.scalar_type() == ScalarType::Char && dt_weight.scalar_type() == ScalarType::Char,
               "selective_scan_dt_step: d and dt_weight must be int8");
  QUAMBA_CHECK(d.dim() == 2 && d.size(0) == p.batch, "d has shape ", shape_of(d), "; expected (", p.batch, ", R)");
  QUAMBA_CHECK(dt_weight.dim() == 2 && dt_weight.size(0) == p.channels && dt_weight.size(1) == d.size(1),
               "dt_weight has shape ", shape_of(dt_weight), "; expected (", p.channels, ", ", d.size(1), ")");
  const Rows d_rows = dense_rows(d, "d"), weight_rows = dense_rows(dt_weight, "dt_weight");
  DtProduct product;
  product.rank = static_cast<int>(d.size(1));
  product.d = static_cast<const int8_t*>(d_rows.data), product.d_batch = d_rows.row_stride;
  product.weight = static_cast<const int8_t*>(weight_rows.data), product.weight_row = weight_rows.row_stride;
  product.d_scale = scale_of(d_scale, 1, x, "d_scale");
  product.weight_scale = scale_of(dt_weight_scale, p.channels, x, "dt_weight_scale");
  return step<true>(x, p, product, out_dtype, early);
}

namespace {

Tensor selective_scan_dt_step_op(const Tensor& x, const OptionalTensor& x_scale, const Tensor& d,
                                 const Tensor& d_scale, const Tensor& dt_weight, const Tensor& dt_weight_scale,
                                 const OptionalTensor& dt_scale, const Tensor& dt_bias, const Tensor& A,
                                 const Tensor& B, const OptionalTensor& B_scale, const Tensor& C,
                                 const OptionalTensor& C_scale, const Tensor& D, const OptionalTensor& z,
                                 const OptionalTensor& z_scale, const OptionalTensor& out_scale, ScalarType out_dtype,
                                 const Tensor& state) {
  return selective_scan_dt_step(x, x_scale, d, d_scale, dt_weight, dt_weight_scale, dt_scale, dt_bias, A, B, B_scale, C,
                                C_scale, D, z, z_scale, out_scale, out_dtype, state, false);
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&quamba::selective_scan));
  m.impl("selective_scan_step", TORCH_BOX(&quamba::selective_scan_step));
  m.impl("selective_scan_dt_step", TORCH_BOX(&quamba::selective_scan_dt_step_op));
}
