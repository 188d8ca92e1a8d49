// Padding for the matrix kernels of linear, and the choice among them.
#include "linear_matrix.h"

#include <array>
#include <cstdlib>
#include <cstring>

namespace quamba {
namespace {

struct TileCost {
  Tile tile;
  int64_t rows, columns;
  double cost;  // of one tile per unit of K, relative: measured rates differ (benchmarks/NOTES.md)
};

constexpr TileCost kTiles[] = {
    {Tile::k128x256, 128, 256, 128 * 256 * 1.00}, {Tile::k256x160, 256, 160, 256 * 160 * 1.30},
    {Tile::k128x192, 128, 192, 128 * 192 * 1.03}, {Tile::k128x128, 128, 128, 128 * 128 * 1.06},
    {Tile::k64x64, 64, 64, 64 * 64 * 2.80},
};

// The tile whose passes over the device cost least; for few rows, whose time is that of reading the weight, the one
// that gives most blocks. QUAMBA_LINEAR_TILE=0..4 forces one, for tuning.
Tile choose_tile(const LinearParams& p, int processors) {
  static const char* const forced = std::getenv("QUAMBA_LINEAR_TILE");
  if (forced != nullptr) return kTiles[std::atoi(forced) % 5].tile;
  if (p.rows <= 128) return Tile::k64x64;
  double best_cost = 0.0;
  Tile best = Tile::k64x64;
  for (const TileCost& t : kTiles) {
    const int64_t tiles = (p.rows + t.rows - 1) / t.rows * ((p.columns + t.columns - 1) / t.columns);
    const double cost = static_cast<double>((tiles + processors - 1) / processors) * t.cost;
    if (best_cost == 0.0 || cost < best_cost) best_cost = cost, best = t.tile;
  }
  return best;
}

template <typename Out, bool kResidual>
cudaError_t matrix_sm90(const LinearParams& p, void* workspace, size_t* bytes, int processors, cudaStream_t stream) {
  const Tile tile = choose_tile(p, processors);
  if (tile == Tile::k64x64) return linear_sm90<Out, kResidual, Tile::k64x64>(p, workspace, bytes, stream);
  if constexpr (sizeof(Out) < 4) {  // a float32 result is rare: its larger tiles are not worth their compilation
    switch (tile) {
      case Tile::k128x256:
        return linear_sm90<Out, kResidual, Tile::k128x256>(p, workspace, bytes, stream);
      case Tile::k256x160:
        return linear_sm90<Out, kResidual, Tile::k256x160>(p, workspace, bytes, stream);
      case Tile::k128x192:
        return linear_sm90<Out, kResidual, Tile::k128x192>(p, workspace, bytes, stream);
      default:
        break;
    }
  }
  return linear_sm90<Out, kResidual, Tile::k128x128>(p, workspace, bytes, stream);
}

template <typename Out>
cudaError_t matrix(const LinearParams& p, bool hopper, void* workspace, size_t* bytes, int processors,
                   cudaStream_t stream) {
#ifdef QUAMBA_SM90
  if (hopper) {
    if constexpr (sizeof(Out) > 1) {
      if (p.residual.data) return matrix_sm90<Out, true>(p, workspace, bytes, processors, stream);
    }
    return matrix_sm90<Out, false>(p, workspace, bytes, processors, stream);
  }
#endif
  return linear_sm80(p, stream);
}

// Hopper's kernels run on compute capability 9.0 alone. QUAMBA_CUDA_GEMM=sm80 forces the path of older devices.
bool use_hopper(int device) {
#ifdef QUAMBA_SM90
  static const char* const forced = std::getenv("QUAMBA_CUDA_GEMM");
  if (forced != nullptr && std::strcmp(forced, "sm80") == 0) return false;
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
#else
  return false;
#endif
}

int64_t round_up(int64_t v, int64_t unit) { return (v + unit - 1) / unit * unit; }

// `t` as it is where it has this shape and rows aligned to 16 bytes; else a copy with zeros added.
Rows padded(const Rows& t, int64_t rows, int64_t columns, int64_t element_size) {
  const int64_t unit = 16 / element_size;
  if (t.rows == rows && t.columns == columns && t.column_stride == 1 && t.row_stride % unit == 0 &&
      aligned(t.data, 16))
    return t;
  const Tensor flat = torch::stable::reshape(t.tensor, std::vector<int64_t>{t.rows, t.columns});
  Tensor wide = torch::stable::new_zeros(flat, std::vector<int64_t>{rows, columns});
  Tensor top = torch::stable::narrow(wide, 0, 0, t.rows);
  Tensor part = torch::stable::narrow(top, 1, 0, t.columns);
  torch::stable::copy_(part, flat);
  return rows_of(wide, "padded");
}

// A scale or bias as float32, (columns,) where it is a vector.
Tensor padded_vector(const Tensor& v, int64_t columns) {
  const Tensor f = v.scalar_type() == ScalarType::Float ? v : torch::stable::to(v, ScalarType::Float);
  if (f.dim() != 1 || f.size(0) == columns || f.size(0) == 1) return f;
  Tensor wide = torch::stable::new_zeros(f, std::vector<int64_t>{columns});
  Tensor part = torch::stable::narrow(wide, 0, 0, f.size(0));
  torch::stable::copy_(part, f);
  return wide;
}

void launch(const LinearParams& p, const Tensor& like) {
  const int processors = multiprocessors(like);
  const bool hopper = use_hopper(like.get_device_index());
  const cudaStream_t stream = stream_of(like);
  const auto run = [&](void* workspace, size_t* bytes) {
    switch (p.out_type) {
      case Type::kInt8:
        return matrix<int8_t>(p, hopper, workspace, bytes, processors, stream);
      case Type::kHalf:
        return matrix<__half>(p, hopper, workspace, bytes, processors, stream);
      case Type::kBFloat16:
        return matrix<__nv_bfloat16>(p, hopper, workspace, bytes, processors, stream);
      default:
        return matrix<float>(p, hopper, workspace, bytes, processors, stream);
    }
  };
  size_t bytes = 0;
  cudaError_t error = run(nullptr, &bytes);
  if (error == cudaErrorMemoryAllocation && bytes > 0) {
    const Tensor workspace = empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Char);
    error = run(workspace.data_ptr(), &bytes);
  }
  QUAMBA_CHECK(error == cudaSuccess, "linear: the matrix kernel for M=", p.rows, " N=", p.columns, " K=", p.inner,
               " could not be launched: ", cudaGetErrorString(error));
}

Tensor quantized(const Tensor& x, const Tensor& scale) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(scale)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("quamba::quantize", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor linear_matrix(LinearParams p, const LinearTensors& t) {
  // The kernels add a residual of the result's own type. Any other is added to a float32 result, rounded afterwards.
  const bool direct = !t.residual || (p.residual.type == p.out_type && p.out_type != Type::kInt8);
  const ScalarType written = direct ? t.out_dtype : ScalarType::Float;
  // Rows of 16 bytes: what the copy engine moves. The sums of the padding are computed and dropped.
  const int64_t true_columns = p.columns, columns = round_up(p.columns, 16 / size_of(type_of(written, "out_dtype"))),
                inner = round_up(p.inner, 16);

  const Rows x = padded(t.x, p.rows, inner, 1), weight = padded(t.weight, columns, inner, 1);
  const Tensor weight_scale = padded_vector(t.weight_scale, columns);
  const Tensor bias = t.bias ? padded_vector(*t.bias, columns) : weight_scale;
  const Tensor out_scale = t.out_scale ? padded_vector(*t.out_scale, columns) : weight_scale;
  Rows residual = x;
  if (t.residual) {
    const Tensor same = direct ? *t.residual : torch::stable::to(*t.residual, ScalarType::Float);
    residual = padded(rows_of(same, "residual"), p.rows, columns, size_of(type_of(same, "residual")));
    p.residual = {residual.data, type_of(same, "residual")};
    p.residual_row = residual.row_stride;
  }
  p.x = static_cast<const int8_t*>(x.data), p.x_row = x.row_stride;
  p.weight = static_cast<const int8_t*>(weight.data), p.weight_row = weight.row_stride;
  p.inner = inner, p.columns = columns;
  p.weight_scale.data = static_cast<const float*>(weight_scale.data_ptr());
  if (t.bias) p.bias = {bias.data_ptr(), Type::kFloat};
  if (t.out_scale) p.out_scale.data = static_cast<const float*>(out_scale.data_ptr());
  p.out_type = type_of(written, "out_dtype");
  Tensor out = empty(x.tensor, {p.rows, columns}, written);
  p.out = out.data_ptr();
  launch(p, x.tensor);
  if (columns != true_columns) out = torch::stable::contiguous(torch::stable::narrow(out, 1, 0, true_columns));
  if (written == t.out_dtype) return out;
  return t.out_scale ? quantized(out, *t.out_scale) : torch::stable::to(out, t.out_dtype);
}

}  // namespace quamba
