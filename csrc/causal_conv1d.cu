// quamba::causal_conv1d and quamba::causal_conv1d_step on CUDA.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "op.h"
#include "ops.h"
#include "quamba/causal_conv1d_dot.cuh"
#include "quamba/causal_conv1d_step.cuh"

namespace quamba {
namespace {

constexpr int kThreads = 128;

// Whether causal_conv1d_step_kernel takes it.
bool in_quads(const ConvParams& p) {
  const auto four = [](const void* data, Type type) { return aligned(data, 4 * size_of(type)); };
  return p.width == 4 && p.channels % 4 == 0 && !p.mask && p.x_channel == 1 && p.x_batch % 4 == 0 && aligned(p.x, 4) &&
         p.state && p.state_time == 1 && p.state_channel == 4 && p.state_batch % 16 == 0 && aligned(p.state, 16) &&
         four(p.weight.data, p.weight.type) && four(p.bias.data, p.bias.type) && four(p.x_scale.data, Type::kFloat) &&
         four(p.weight_scale.data, Type::kFloat) && four(p.out_scale.data, Type::kFloat);
}

// Whether causal_conv1d_dot_kernel takes it, given that x can be read in words. For measurements, QUAMBA_CONV_DOT=0
// leaves it to the kernel for all types.
bool in_words(const ConvParams& p) {
  static const char* const wanted = std::getenv("QUAMBA_CONV_DOT");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  return p.quads && p.weight.type == Type::kInt8 && aligned(p.weight.data, 16) && p.length <= INT32_MAX;
}

// Shared memory that keeps blocks to their share of a multiprocessor: an early launch, on Hopper, gives as many as fit to
// those that are free first, and others get none.
int shared_for_share(int64_t blocks, int processors) {
  constexpr int kOfMultiprocessor = 228 * 1024, kOfBlock = 1024;
  if (!launches_early()) return 0;
  const int share = static_cast<int>((blocks + processors - 1) / processors);
  return share < 4 || share >= kConvDotBlocks ? 0 : kOfMultiprocessor / share / 128 * 128 - kOfBlock;
}

// Rounds a thread: so few that all blocks run at a time.
template <typename Out>
void launch_dot(const ConvParams& p, int processors, cudaStream_t stream) {
  const int64_t groups = p.channels / kConvChannels, all = (p.length + kConvDotSteps - 1) / kConvDotSteps;
  const int64_t at_a_time = int64_t{kConvDotBlocks} * kConvDotThreads * processors;
  const int64_t rounds = std::clamp<int64_t>((p.batch * groups * all + at_a_time - 1) / at_a_time, 1, 16);
  const dim3 grid(static_cast<unsigned>((groups + kConvDotThreads - 1) / kConvDotThreads),
                  static_cast<unsigned>((all + rounds - 1) / rounds), static_cast<unsigned>(p.batch));
  const int shared = shared_for_share(int64_t{grid.x} * grid.y * grid.z, processors);
  with_bool(p.mask != nullptr, [&](auto masked) {
    check_launch("causal_conv1d", quamba::launch(causal_conv1d_dot_kernel<Out, masked.value>,
                                                 Launch{grid, kConvDotThreads, shared, stream}, p,
                                                 static_cast<int>(rounds)));
  });
}

template <typename T, typename Out>
void launch(const ConvParams& p, bool vector, int processors, cudaStream_t stream) {
  if constexpr (sizeof(T) == 1) {
    if (p.length == 1 && in_quads(p)) {
      const int64_t per_block = kConvStepThreads * kConvChannels;
      const dim3 grid(static_cast<unsigned>((p.channels + per_block - 1) / per_block),
                      static_cast<unsigned>((p.batch + kConvSequences - 1) / kConvSequences));
      return check_launch("causal_conv1d_step",
                          quamba::launch(causal_conv1d_step_kernel<Out>, Launch{grid, kConvStepThreads, 0, stream}, p));
    }
    if (vector && in_words(p)) return launch_dot<Out>(p, processors, stream);
  }
  const int64_t groups = (p.channels + kConvChannels - 1) / kConvChannels;
  const auto run = [&](auto width, auto aligned) {
    constexpr int kSteps = conv_steps<T, width.value, aligned.value>();
    const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads),
                    static_cast<unsigned>((p.length + kSteps - 1) / kSteps), static_cast<unsigned>(p.batch));
    check_launch("causal_conv1d", quamba::launch(causal_conv1d_kernel<T, Out, width.value, aligned.value>,
                                                 Launch{grid, kThreads, 0, stream}, p));
  };
  if (p.width > 4) return run(std::integral_constant<int, 8>{}, std::false_type{});
  with_bool(vector, [&](auto aligned) { run(std::integral_constant<int, 4>{}, aligned); });
}

// x (B, L, D) with any strides, whose time stride may be that of a step.
Tensor run(const Tensor& x, int64_t length, int64_t time_stride, const OptionalTensor& x_scale, const Tensor& weight,
           const OptionalTensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& out_scale,
           ScalarType out_dtype, const OptionalTensor& mask, const OptionalTensor& conv_state) {
  const int64_t batch = x.size(0), channels = x.size(x.dim() - 1), last = x.dim() - 1;
  check_device(weight, x, "weight");
  QUAMBA_CHECK(weight.dim() == 2 && weight.size(0) == channels && weight.size(1) >= 1 && weight.size(1) <= 8,
               "weight has shape ", shape_of(weight), "; expected (", channels, ", K) with K from 1 to 8");
  const Tensor taps = torch::stable::contiguous(weight);
  const Type type = type_of(x, "x"), out_type = result_type(out_dtype, out_scale.has_value());
  ConvParams p{};
  p.batch = batch, p.length = length, p.channels = channels, p.width = static_cast<int>(weight.size(1));
  p.x = x.data_ptr(), p.x_batch = x.stride(0), p.x_time = time_stride, p.x_channel = x.stride(last);
  p.x_scale = scale_of(x_scale, channels, x, "x_scale");
  p.weight = {taps.data_ptr(), type_of(weight, "weight")};
  p.weight_scale = scale_of(weight_scale, channels, x, "weight_scale");
  p.bias = vector_of(bias, channels, x, "bias");
  p.out_scale = scale_of(out_scale, channels, x, "out_scale");
  const auto quad = [](const void* data, Type type) { return aligned(data, 4 * size_of(type)); };
  p.quads = p.width == 4 && channels % 4 == 0 && quad(p.weight.data, p.weight.type) && quad(p.bias.data, p.bias.type) &&
            quad(p.x_scale.data, Type::kFloat) && quad(p.weight_scale.data, Type::kFloat) &&
            quad(p.out_scale.data, Type::kFloat);
  Tensor keep = mask ? *mask : x;
  if (mask) {
    check_device(*mask, x, "mask");
    QUAMBA_CHECK(mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == length, "mask has shape ",
                 shape_of(*mask), "; expected (", batch, ", ", length, ")");
    if (mask->scalar_type() != ScalarType::Bool) keep = torch::stable::to(*mask, ScalarType::Bool);
    p.mask = static_cast<const uint8_t*>(keep.data_ptr());
    p.mask_batch = keep.stride(0), p.mask_time = keep.stride(1);
  }
  if (conv_state) {
    check_device(*conv_state, x, "conv_state");
    QUAMBA_CHECK(conv_state->dim() == 3 && conv_state->size(0) == batch && conv_state->size(1) == channels &&
                     conv_state->size(2) == p.width && conv_state->scalar_type() == x.scalar_type(),
                 "conv_state has shape ", shape_of(*conv_state), "; expected (", batch, ", ", channels, ", ", p.width,
                 ") of x's dtype");
    p.state = conv_state->data_ptr();
    p.state_batch = conv_state->stride(0), p.state_channel = conv_state->stride(1);
    p.state_time = conv_state->stride(2);
    p.state_words = type == Type::kInt8 && p.width == 4 && p.state_time == 1 && p.state_channel % 4 == 0 &&
                    p.state_batch % 4 == 0 && aligned(p.state, 4);
  }
  Tensor out = empty(x, sizes_of(x), out_dtype);
  if (out.numel() == 0) return out;
  p.out = out.data_ptr();
  const int64_t piece = kConvChannels * size_of(type);
  const bool vector = p.x_channel == 1 && channels % kConvChannels == 0 && aligned(p.x, piece) &&
                      p.x_time % kConvChannels == 0 && p.x_batch % kConvChannels == 0;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int processors = multiprocessors(x);
  const cudaStream_t stream = stream_of(x);
  with_type(type, [&](auto element) {
    using T = decltype(element);
    // A float input gives int8 or itself; an int8 input gives any type.
    if (out_type == Type::kInt8) return launch<T, int8_t>(p, vector, processors, stream);
    if constexpr (sizeof(T) == 1) {
      with_float_type(out_type, "out_dtype", [&](auto o) { launch<T, decltype(o)>(p, vector, processors, stream); });
    } else if (out_type == type) {
      launch<T, T>(p, vector, processors, stream);
    } else {
      launch<T, float>(p, vector, processors, stream);
    }
  });
  return out;
}

// The kernel writes float inputs as their own type or float32; any other float type is one more rounding away.
ScalarType written_dtype(const Tensor& x, ScalarType out_dtype) {
  const bool direct = x.scalar_type() == ScalarType::Char || out_dtype == ScalarType::Char ||
                      out_dtype == x.scalar_type();
  return direct ? out_dtype : ScalarType::Float;
}

}  // namespace

Tensor causal_conv1d(const Tensor& x, const OptionalTensor& x_scale, const Tensor& weight,
                     const OptionalTensor& weight_scale, const OptionalTensor& bias, const OptionalTensor& out_scale,
                     ScalarType out_dtype, const OptionalTensor& mask, const OptionalTensor& conv_state) {
  QUAMBA_CHECK(x.dim() == 3, "x has shape ", shape_of(x), "; expected (B, L, D)");
  const ScalarType written = written_dtype(x, out_dtype);
  const Tensor out = run(x, x.size(1), x.stride(1), x_scale, weight, weight_scale, bias, out_scale, written, mask,
                         conv_state);
  return written == out_dtype ? out : torch::stable::to(out, out_dtype);
}

namespace {

Tensor causal_conv1d_step(const Tensor& x, const OptionalTensor& x_scale, const Tensor& weight,
                          const OptionalTensor& weight_scale, const OptionalTensor& bias,
                          const OptionalTensor& out_scale, ScalarType out_dtype, const Tensor& conv_state) {
  QUAMBA_CHECK(x.dim() == 2, "x has shape ", shape_of(x), "; expected (B, D)");
  const ScalarType written = written_dtype(x, out_dtype);
  const Tensor out = run(x, 1, 0, x_scale, weight, weight_scale, bias, out_scale, written, std::nullopt, conv_state);
  return written == out_dtype ? out : torch::stable::to(out, out_dtype);
}

}  // namespace
}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&quamba::causal_conv1d));
  m.impl("causal_conv1d_step", TORCH_BOX(&quamba::causal_conv1d_step));
}
