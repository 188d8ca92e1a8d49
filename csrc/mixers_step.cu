// quamba::mixers_step on CUDA: checks, the plan of shared memory, launches.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "mixers_step_kernel.h"
#include "op.h"
#include "ops.h"
#include "quamba/mixers_step_plan.h"

namespace quamba {
namespace {

constexpr int kTensors = 28, kFloats = 2, kFlags = 3;  // of each block, in the lists

// The tensors of one block, taken in their order.
class Arguments {
 public:
  // Vectors that are not float32 are converted; `kept` owns the results.
  Arguments(const Tensor& like, const std::vector<OptionalTensor>& tensors, size_t block, std::vector<Tensor>* kept)
      : like_(like), next_(tensors.data() + block * kTensors), kept_(kept) {}

  // An int8 matrix with contiguous, aligned rows.
  const int8_t* matrix(int64_t rows, int64_t columns, const char* what) {
    const Tensor& t = given(what);
    QUAMBA_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == ScalarType::Char &&
                     t.is_contiguous() && aligned(t.data_ptr(), 16),
                 what, " has shape ", shape_of(t), "; expected contiguous int8 (", rows, ", ", columns,
                 "), aligned to 16 bytes");
    return static_cast<const int8_t*>(t.data_ptr());
  }
  const float* scale(int64_t size, int* stride, const char* what) {
    const Scale scale = scale_of(given(what), size, like_, what);
    *stride = scale.stride;
    return scale.data;
  }
  const float* optional_scale(int64_t size, int* stride, const char* what) {
    return *next_ ? scale(size, stride, what) : (++next_, nullptr);
  }
  const float* number(const char* what) {
    int stride = 0;
    const float* data = scale(1, &stride, what);
    return data;
  }
  const float* numbers(int64_t size, const char* what) {
    int stride = 0;
    const float* data = scale(size, &stride, what);
    QUAMBA_CHECK(size == 1 || stride == 1, what, " is one number; expected (", size, ",)");
    return data;
  }
  const float* float_matrix(int64_t rows, int64_t columns, const char* what) {
    const Tensor& t = given(what);
    QUAMBA_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == ScalarType::Float &&
                     t.is_contiguous(),
                 what, " has shape ", shape_of(t), "; expected contiguous float32 (", rows, ", ", columns, ")");
    return static_cast<const float*>(t.data_ptr());
  }
  // Of any float type.
  const void* vector(int64_t size, Type* type, const char* what) {
    const AnyVector v = vector_of(given(what), size, like_, what);
    QUAMBA_CHECK(v.type != Type::kInt8 && aligned(v.data, 16), what,
                 " is int8 or not aligned to 16 bytes; expected a float dtype, or a clone of it");
    *type = v.type;
    return v.data;
  }
  const void* optional_floats(int64_t size, bool* present, const char* what) {
    *present = next_->has_value();
    return *present ? floats(size, what) : (++next_, nullptr);
  }
  const float* floats(int64_t size, const char* what) {
    const Tensor& t = given(what);
    AnyVector v = vector_of(t, size, like_, what);
    QUAMBA_CHECK(v.type != Type::kInt8, what, " is int8; expected a float dtype");
    if (v.type != Type::kFloat) {
      kept_->push_back(torch::stable::to(t, ScalarType::Float));
      v.data = kept_->back().data_ptr();
    }
    return static_cast<const float*>(v.data);
  }

 private:
  const Tensor& given(const char* what) {
    QUAMBA_CHECK(next_->has_value(), what, " is missing");
    const Tensor& t = **next_++;
    check_device(t, like_, what);
    return t;
  }

  const Tensor& like_;
  const OptionalTensor* next_;
  std::vector<Tensor>* const kept_;
};

struct Block {
  StackFormat format;
  StackBlock block;
};

Block block_of(const Tensor& hidden, const std::vector<OptionalTensor>& tensors, const std::vector<double>& floats,
               const std::vector<int64_t>& flags, const Tensor& conv_state, const Tensor& ssm_state, size_t i,
               std::vector<Tensor>* kept) {
  const int64_t batch = hidden.size(0), model = hidden.size(1);
  QUAMBA_CHECK(ssm_state.dim() == 3 && conv_state.dim() == 3, "found states of shapes ", shape_of(conv_state), " and ",
               shape_of(ssm_state), "; expected (B, D, K) and (B, D, N)");
  const int64_t inner = ssm_state.size(1), states = ssm_state.size(2), width = conv_state.size(2);
  const OptionalTensor& dt_weight = tensors[i * kTensors + 18];
  QUAMBA_CHECK(dt_weight && dt_weight->dim() == 2, "dt_weight is missing or no matrix; expected (D, R)");
  const int64_t rank = dt_weight->size(1), sums = rank + 2 * states;
  Block result;
  std::memset(&result, 0, sizeof result);  // formats are compared byte by byte
  StackFormat& f = result.format;
  StackBlock& b = result.block;
  f.model = static_cast<int>(model), f.inner = static_cast<int>(inner), f.states = static_cast<int>(states);
  f.width = static_cast<int>(width), f.rank = static_cast<int>(rank);
  b.norm_eps = static_cast<float>(floats[i * kFloats]), b.dbc_eps = static_cast<float>(floats[i * kFloats + 1]);
  f.norm_dbc = flags[i * kFlags], f.rotate = flags[i * kFlags + 1], f.residual = flags[i * kFlags + 2];

  Arguments a(hidden, tensors, i, kept);
  const auto second_half = [&](const void* data) {
    return data ? static_cast<const float*>(data) + inner : nullptr;
  };
  bool B_norm = false, C_norm = false;
  b.field[kNormWeight] = a.vector(model, &f.norm_weight, "norm_weight");
  b.field[kUScale] = a.number("u_scale");
  b.in_weight = a.matrix(2 * inner, model, "in_weight");
  b.field[kInX] = a.scale(2 * inner, &f.in_weight_scale, "in_weight_scale");
  b.field[kInZ] = f.in_weight_scale ? second_half(b.field[kInX]) : b.field[kInX];
  b.field[kBiasX] = a.optional_floats(2 * inner, &f.has_in_bias, "in_bias");
  b.field[kBiasZ] = second_half(b.field[kBiasX]);
  b.field[kScaleX] = a.numbers(2 * inner, "xz_scale");
  b.field[kScaleZ] = second_half(b.field[kScaleX]);
  b.field[kTaps] = a.matrix(inner, width, "conv_weight");
  b.field[kConvScale] = a.scale(inner, &f.conv_weight_scale, "conv_weight_scale");
  b.field[kConvBias] = a.optional_floats(inner, &f.has_conv_bias, "conv_bias");
  b.field[kXScale] = a.scale(inner, &f.x_scale, "x_scale");
  b.x_weight = a.matrix(sums, inner, "x_weight");
  b.field[kXSumScale] = a.scale(sums, &f.x_weight_scale, "x_weight_scale");
  b.field[kXInScale] = a.number("x_in_scale");
  b.field[kScanScale] = a.scale(inner, &f.x_scan_scale, "x_scan_scale");
  b.field[kDNorm] = a.optional_floats(rank, &f.has_norms, "d_norm_weight");
  b.field[kBNorm] = a.optional_floats(states, &B_norm, "B_norm_weight");
  b.field[kCNorm] = a.optional_floats(states, &C_norm, "C_norm_weight");
  QUAMBA_CHECK(f.has_norms == B_norm && B_norm == C_norm, "found some of the weights of the norms of d, B and C; ",
               "expected all of them or none");
  b.field[kDbcScale] = a.numbers(sums, "dbc_scale");
  b.field[kDtWeight] = a.matrix(inner, rank, "dt_weight");
  b.field[kDtWeightScale] = a.scale(inner, &f.dt_weight_scale, "dt_weight_scale");
  b.field[kDtScale] = a.optional_scale(inner, &f.dt_scale, "dt_scale");
  f.has_dt_scale = b.field[kDtScale] != nullptr;
  b.field[kDtBias] = a.floats(inner, "dt_bias");
  b.field[kA] = a.float_matrix(inner, states, "A");
  b.field[kSkip] = a.floats(inner, "D");
  b.field[kGScale] = a.number("g_scale");
  b.out_weight = a.matrix(model, inner, "out_weight");
  b.field[kOutScale] = a.scale(model, &f.out_weight_scale, "out_weight_scale");
  b.field[kOutBias] = a.optional_floats(model, &f.has_out_bias, "out_bias");

  check_device(conv_state, hidden, "conv_state");
  check_device(ssm_state, hidden, "ssm_state");
  QUAMBA_CHECK(conv_state.size(0) == batch && conv_state.size(1) == inner &&
                   conv_state.scalar_type() == ScalarType::Char && conv_state.stride(2) == 1 &&
                   conv_state.stride(1) == width && conv_state.stride(0) % 4 == 0 && aligned(conv_state.data_ptr(), 4),
               "conv_state has shape ", shape_of(conv_state), "; expected int8 (", batch, ", ", inner, ", ", width,
               ") with contiguous sequences");
  QUAMBA_CHECK(ssm_state.size(0) == batch && ssm_state.scalar_type() == ScalarType::Float &&
                   ssm_state.stride(2) == 1 && ssm_state.stride(1) == states && ssm_state.stride(0) % 4 == 0 &&
                   aligned(ssm_state.data_ptr(), 16),
               "ssm_state has shape ", shape_of(ssm_state), "; expected float32 (", batch, ", ", inner, ", ", states,
               ") with contiguous sequences");
  b.conv_state = static_cast<int8_t*>(conv_state.data_ptr()), f.conv_batch = conv_state.stride(0);
  b.ssm_state = static_cast<float*>(ssm_state.data_ptr()), f.ssm_batch = ssm_state.stride(0);
  return result;
}

int environment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

// The largest power of two up to 16 that the fields' addresses are multiples of.
void common_alignment(const std::vector<Block>& blocks, size_t first, size_t end, int* aligned_to) {
  for (int field = 0; field < kStackFields; ++field) {
    uintptr_t bits = 16;
    for (size_t i = first; i < end; ++i) bits |= reinterpret_cast<uintptr_t>(blocks[i].block.field[field]);
    aligned_to[field] = static_cast<int>(bits & -bits);
  }
}

// f(a constant that is the order of the base matrix).
template <typename F>
cudaError_t with_base(int base, F&& f) {
  return base == 0    ? f(std::integral_constant<int, 0>())
         : base == 1  ? f(std::integral_constant<int, 1>())
         : base == 12 ? f(std::integral_constant<int, 12>())
                      : f(std::integral_constant<int, 20>());
}

int most_cluster(const StackFormat& f) {
  return environment("QUAMBA_STEP_CLUSTER", f.inner >= kStackSharedWidth ? 4 : 1);
}

// The plan for many sequences, with as large clusters as the device has room for.
void plan_many(StackParams* params, const int* aligned_to, int tokens, int processors, int shared) {
  StackPlan* const p = &params->plan;
  for (int most = most_cluster(p->f);; most = p->cluster / 2) {
    plan_stack<true>(p, aligned_to, tokens, processors, shared, most);
    if (p->cluster == 1) return;
    int room = 0;
    const cudaError_t error = with_base(
        p->base, [&](auto base) { return mixers_step_many_room<decltype(base)::value>(*params, &room); });
    QUAMBA_CHECK(error == cudaSuccess, "mixers_step: found no occupancy: ", cudaGetErrorString(error));
    if (room * p->cluster >= p->grid) return;
  }
}

// Launches blocks `first` to `end` of the stack, all of one format, for sequences [token, token + plan.tokens).
void launch(StackParams* params, const std::vector<Block>& blocks, size_t first, size_t end, int64_t token,
            bool many, const Tensor& like, cudaStream_t stream) {
  StackPlan* const p = &params->plan;
  p->blocks = static_cast<int>(end - first);
  if (!many) p->cluster = plan_cluster(*p, most_cluster(p->f));
  for (size_t i = first; i < end; ++i) {
    StackBlock& b = params->block[i - first] = blocks[i].block;
    b.conv_state += token * p->f.conv_batch;
    b.ssm_state += token * p->f.ssm_batch;
  }
  const int64_t sums = p->f.rank + 2 * p->f.states, tokens = p->tokens;
  const int64_t dbc = many ? 0 : p->blocks * sums * kSumSpread * tokens;
  const int64_t residual = kStackTurns * tokens * p->f.model;
  const int64_t g = kStackTurns * tokens * p->f.inner;
  // What is for all as bytes; for many sequences that is zero until it is there, and so are the sums of W_x.
  const int64_t u_bytes = many_bytes(divide_up(p->tokens, 8), p->f.model);
  const int64_t g_bytes = many_bytes(divide_up(p->tokens, 8), p->f.inner);
  const int64_t parts = many ? int64_t{4} * p->grid * p->grid * p->over_quads.by : 0;
  const int64_t words = many ? kStackTurns * (u_bytes + g_bytes + 16 * many_quads(*p)) + 4 * parts : 0;
  const int64_t bytes = many ? 0 : tokens * std::max(p->f.model, p->f.inner);
  constexpr int kCounters = 3 * 4 * kCounterSpread;
  const int64_t zeroed = kCounters + 8 * (dbc + dbc % 2) + 4 * (residual + g) + words;
  const Tensor space = empty(like, {zeroed + bytes}, ScalarType::Char);
  char* const memory = static_cast<char*>(space.data_ptr());
  p->counter = reinterpret_cast<unsigned*>(memory);
  p->dbc = reinterpret_cast<unsigned long long*>(memory + kCounters);
  p->residual = reinterpret_cast<unsigned*>(p->dbc + dbc + dbc % 2);
  p->g = p->residual + residual;
  p->bytes = reinterpret_cast<int8_t*>(p->g + g);
  p->u_words = p->g + g, p->g_words = p->u_words + kStackTurns * u_bytes / 4;
  p->sums = p->g_words + kStackTurns * g_bytes / 4, p->parts_of_sums = p->sums + kStackTurns * 4 * many_quads(*p);
  cudaError_t error = cudaMemsetAsync(memory, 0, zeroed, stream);
  if (error == cudaSuccess)
    error = with_base(p->base, [&](auto base) {
      constexpr int kBase = decltype(base)::value;
      return many ? launch_mixers_step_many<kBase>(*params, stream) : launch_mixers_step<kBase>(params, stream);
    });
  QUAMBA_CHECK(error == cudaSuccess, "mixers_step: the kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace

Tensor mixers_step(const Tensor& hidden, const std::vector<OptionalTensor>& tensors,
                   const std::vector<double>& floats, const std::vector<int64_t>& flags, ScalarType out_dtype,
                   const std::vector<Tensor>& conv_states, const std::vector<Tensor>& ssm_states) {
  const size_t count = conv_states.size();
  QUAMBA_CHECK(count >= 1 && ssm_states.size() == count && tensors.size() == count * kTensors &&
                   floats.size() == count * kFloats && flags.size() == count * kFlags,
               "mixers_step: found ", count, " and ", ssm_states.size(), " states, ", tensors.size(), " tensors, ",
               floats.size(), " floats, ", flags.size(), " flags; expected 1, 1, ", kTensors, ", ", kFloats, ", ",
               kFlags, " for each block");
  QUAMBA_CHECK(hidden.dim() == 2, "hidden has shape ", shape_of(hidden), "; expected (B, E)");
  const Type hidden_type = type_of(hidden, "hidden");
  QUAMBA_CHECK(hidden_type != Type::kInt8, "hidden is int8; expected a float dtype");
  const Type out_type = result_type(out_dtype, false);
  std::vector<Block> blocks;
  std::vector<Tensor> kept;
  for (size_t i = 0; i < count; ++i)
    blocks.push_back(block_of(hidden, tensors, floats, flags, conv_states[i], ssm_states[i], i, &kept));

  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const cudaStream_t stream = stream_of(hidden);
  const int processors = multiprocessors(hidden);
  int shared = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, hidden.get_device_index());
  const int64_t batch = hidden.size(0), model = hidden.size(1);
  Tensor input = hidden.stride(1) == 1 && hidden.stride(0) % 4 == 0 && aligned(hidden.data_ptr(), 16)
                     ? hidden
                     : torch::stable::clone(hidden);
  Tensor out = empty(hidden, {batch, model}, out_dtype);
  for (size_t first = 0, end; first < count && batch > 0; first = end) {
    end = first + 1;
    while (end < count && end - first < kStackBlocks &&
           std::memcmp(&blocks[end].format, &blocks[first].format, sizeof(StackFormat)) == 0)
      ++end;
    StackParams params;
    StackPlan& p = params.plan;
    p.f = blocks[first].format;
    int aligned_to[kStackFields];
    common_alignment(blocks, first, end, aligned_to);
    const bool wide = p.f.inner >= kStackSharedWidth;
    const bool many = batch >= environment("QUAMBA_STEP_MANY", wide ? kStackManyWide : kStackMany);
    const int tokens = static_cast<int>(std::min<int64_t>(batch, many ? kManyTokens : kStackTokens));
    if (many) {
      plan_many(&params, aligned_to, tokens, processors, shared);
    } else {
      plan_stack<false>(&p, aligned_to, tokens, processors, shared);
    }
    p.flight = plan_flight(p.s, environment("QUAMBA_STEP_FLIGHT", 49152), many ? 1 : kTeams);
    const int pace = p.s.slot_bytes / (many ? kManyBytesACycle : kStackBytesACycle);
    p.pace = static_cast<unsigned>(environment("QUAMBA_STEP_PACE", pace));
    p.slow_pace = static_cast<unsigned>(environment("QUAMBA_STEP_SLOW_PACE", p.s.slot_bytes / kManyBytesACycleSlow));
    // A later launch reads the whole row of what an earlier one wrote, so that it cannot write to the same place.
    Tensor result = end < count ? empty(hidden, {batch, model}, out_dtype) : out;
    const int64_t most = p.tokens;
    for (int64_t token = 0; token < batch; token += most) {
      p.tokens = static_cast<int>(std::min(most, batch - token));
      p.hidden_type = type_of(input, "hidden"), p.out_type = out_type;
      p.hidden_row = input.stride(0);
      p.hidden = static_cast<const char*>(input.data_ptr()) + token * p.hidden_row * size_of(p.hidden_type);
      p.out = static_cast<char*>(result.data_ptr()) + token * model * size_of(out_type);
      launch(&params, blocks, first, end, token, many, hidden, stream);
    }
    input = result;
  }
  return out;
}

}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) { m.impl("mixers_step", TORCH_BOX(&quamba::mixers_step)); }
