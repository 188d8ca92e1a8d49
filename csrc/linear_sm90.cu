// linear on Hopper: CUTLASS 3.x, wgmma, TMA, warp-specialised, the rescaling fused as an epilogue visitor tree.
// Compiled once for each QUAMBA_OUT, QUAMBA_RESIDUAL, QUAMBA_TILE that setup.py lists.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "linear_gemm.h"
#include "quamba/launch.cuh"

namespace quamba {
namespace {

using namespace cute;

template <typename T>
struct CutlassType {
  using type = T;
};
template <>
struct CutlassType<__half> {
  using type = cutlass::half_t;
};
template <>
struct CutlassType<__nv_bfloat16> {
  using type = cutlass::bfloat16_t;
};

template <Tile kTile>
struct Geometry;
template <>
struct Geometry<Tile::k128x256> {
  using TileShape = cute::Shape<Int<128>, Int<256>, Int<128>>;
  using Cluster = cute::Shape<Int<2>, Int<1>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <>
struct Geometry<Tile::k128x192> {
  using TileShape = cute::Shape<Int<128>, Int<192>, Int<128>>;
  using Cluster = cute::Shape<Int<2>, Int<1>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <>
struct Geometry<Tile::k128x128> {
  using TileShape = cute::Shape<Int<128>, Int<128>, Int<128>>;
  using Cluster = cute::Shape<Int<2>, Int<1>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
template <>
struct Geometry<Tile::k64x64> {
  using TileShape = cute::Shape<Int<64>, Int<64>, Int<256>>;
  using Cluster = cute::Shape<Int<1>, Int<1>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// 10240 columns, the W_in of mamba-2.8b, are 128 of these: one pass over the device, each block with 205 KB of the
// weight to stream. Two blocks get x from one read.
template <>
struct Geometry<Tile::k64x80> {
  using TileShape = cute::Shape<Int<64>, Int<80>, Int<128>>;
  using Cluster = cute::Shape<Int<1>, Int<2>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// 2560 columns, the W_out of mamba-2.8b, for 2048 rows are 128 of these, one pass over the device. Two blocks get x from
// one read: it is more than their weights.
template <>
struct Geometry<Tile::k256x160> {
  using TileShape = cute::Shape<Int<256>, Int<160>, Int<128>>;
  using Cluster = cute::Shape<Int<1>, Int<2>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// The same cut in two that take turns, for 1024 rows or where one half's rescaling should meet the other's products.
template <>
struct Geometry<Tile::k128x160> {
  using TileShape = cute::Shape<Int<128>, Int<160>, Int<128>>;
  using Cluster = cute::Shape<Int<2>, Int<1>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// 3072 columns, the W_in of mamba-130m, for 2048 rows are 128 of these.
template <>
struct Geometry<Tile::k256x192> {
  using TileShape = cute::Shape<Int<256>, Int<192>, Int<128>>;
  using Cluster = cute::Shape<Int<1>, Int<2>, Int<1>>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// x / scale as `quamba::divide` does it, for the visitor tree, which then converts to int8 with saturation.
template <typename T>
struct Divide;
template <int N>
struct Divide<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& x,
                                                     cutlass::Array<float, N> const& scale) const {
    cutlass::Array<float, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = divide(x[i], scale[i], reciprocal_approx(scale[i]));
    return result;
  }
};

using Out = typename CutlassType<QUAMBA_OUT>::type;
using Config = Geometry<Tile::QUAMBA_TILE>;
using TileShape = typename Config::TileShape;
constexpr bool kResidual = QUAMBA_RESIDUAL;
constexpr bool kQuantize = sizeof(Out) == 1;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

namespace fusion = cutlass::epilogue::fusion;
using PerRow = fusion::Sm90ColBroadcast<0, TileShape, float, float, Stride<bool, _0, int64_t>>;
using PerColumn = fusion::Sm90RowBroadcast<0, TileShape, float, float, Stride<_0, bool, int64_t>>;
template <template <class> class Op, typename To = float>
using Compute = fusion::Sm90Compute<Op, To, float, kRound>;

using ScaleTree = fusion::Sm90EVT<Compute<cutlass::multiplies>, PerRow, PerColumn>;
using ScaledTree = fusion::Sm90EVT<Compute<cutlass::multiplies>, ScaleTree, fusion::Sm90AccFetch>;
using Residual = std::conditional_t<kResidual, Out, void>;

// The residual, which comes through a short ring of shared memory, asked for into the second-level cache as its tile
// begins: where tiles are one pass over the device, all blocks would wait for memory at their end.
template <typename Element>
struct ResidualAhead : fusion::Sm90SrcFetch<Element> {
  struct Arguments {
    const Element* data = nullptr;
    int64_t row = 0;  // stride
  };
  using Params = Arguments;
  struct SharedStorage {};

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ResidualAhead() {}
  CUTLASS_HOST_DEVICE ResidualAhead(Params const& params, SharedStorage const&) : residual(params) {}

  struct Callbacks : fusion::EmptyProducerLoadCallbacks {
    Params residual;
    int rows, columns, m0, n0, lane;  // rows and columns of the result

    CUTLASS_DEVICE void begin() {
      constexpr int kRows = size<0>(TileShape{}), kColumns = size<1>(TileShape{});
      const int width = columns - n0 < kColumns ? columns - n0 : kColumns;
      for (int m = m0 + lane; m < m0 + kRows && m < rows; m += cutlass::NumThreadsPerWarp)
        prefetch(residual.data + m * residual.row + n0, static_cast<uint32_t>(width * sizeof(Element)));
    }
  };

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::detail::ProducerLoadArgs<Args...> const& args) {
    const auto [m, n, k, batch] = args.tile_coord_mnkl;
    return Callbacks{{},
                     residual,
                     static_cast<int>(get<0>(args.problem_shape_mnkl)),
                     static_cast<int>(get<1>(args.problem_shape_mnkl)),
                     static_cast<int>(m) * size<0>(TileShape{}),
                     static_cast<int>(n) * size<1>(TileShape{}),
                     args.thread_idx};
  }

  Params residual;
};
constexpr bool kAhead = kResidual && Tile::QUAMBA_TILE == Tile::k256x160;
using FetchResidual = std::conditional_t<kAhead, ResidualAhead<Out>, fusion::Sm90SrcFetch<Out>>;

using FloatTree =
    std::conditional_t<kResidual,
                       fusion::Sm90EVT<Compute<cutlass::plus, Out>,
                                       fusion::Sm90EVT<Compute<cutlass::plus>, ScaledTree, PerColumn>,
                                       FetchResidual>,
                       fusion::Sm90EVT<Compute<cutlass::plus, std::conditional_t<kQuantize, float, Out>>, ScaledTree,
                                       PerColumn>>;
using Tree = std::conditional_t<kQuantize, fusion::Sm90EVT<Compute<Divide, Out>, FloatTree, PerColumn>, FloatTree>;

constexpr int kAlignment = 16 / sizeof(Out);
using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, typename Config::Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, Residual, cutlass::layout::RowMajor, kAlignment,
    Out, cutlass::layout::RowMajor, kAlignment, typename Config::Epilogue, Tree>::CollectiveOp;
using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
    cutlass::layout::ColumnMajor, 16, int32_t, TileShape, typename Config::Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename CollectiveEpilogue::SharedStorage))>,
    typename Config::Mainloop>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                    CollectiveEpilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// Without the longer instructions that setup.py turns on, CuTe makes 160 columns of five times 32, and the matrix unit
// waits for shared memory.
static_assert(size<1>(typename CollectiveMainloop::TiledMma::AtomShape_MNK{}) == size<1>(TileShape{}),
              "one instruction for all columns");

// A template, so that only the branch of this unit's tree is instantiated.
template <typename T>
typename T::Arguments tree_arguments(const LinearParams& p) {
  const float* bias = static_cast<const float*>(p.bias.data);
  const typename PerRow::Arguments per_row{p.x_scale.data, 1.0f, {p.x_scale.stride != 0, _0{}, 0}};
  const typename PerColumn::Arguments per_column{p.weight_scale.data, 1.0f, {_0{}, p.weight_scale.stride != 0, 0}};
  const typename PerColumn::Arguments shift{bias, 0.0f, {_0{}, true, 0}};
  const typename ScaleTree::Arguments scale{per_row, per_column, {}};
  const typename ScaledTree::Arguments scaled{scale, {}, {}};
  if constexpr (kAhead) {
    return typename T::Arguments{
        {scaled, shift, {}}, {static_cast<const Out*>(p.residual.data), p.residual_row}, {}};
  } else if constexpr (kResidual) {
    return typename T::Arguments{{scaled, shift, {}}, {}, {}};
  } else if constexpr (kQuantize) {
    const typename PerColumn::Arguments out{p.out_scale.data, 1.0f, {_0{}, p.out_scale.stride != 0, 0}};
    return typename T::Arguments{{scaled, shift, {}}, out, {}};
  } else {
    return typename T::Arguments{scaled, shift, {}};
  }
}

}  // namespace

template <>
cudaError_t linear_sm90<QUAMBA_OUT, kResidual, Tile::QUAMBA_TILE>(const LinearParams& p, void* workspace,
                                                                  size_t* bytes, cudaStream_t stream) {
  const int m = static_cast<int>(p.rows), n = static_cast<int>(p.columns), k = static_cast<int>(p.inner);
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1}, {}, {}};
  arguments.mainloop = {p.x, {p.x_row, _1{}, 0}, p.weight, {p.weight_row, _1{}, 0}};
  arguments.epilogue = {tree_arguments<Tree>(p),
                        static_cast<const std::conditional_t<kResidual, Out, void>*>(p.residual.data),
                        {p.residual_row, _1{}, 0},
                        static_cast<Out*>(p.out),
                        {p.columns, _1{}, 0}};
  const size_t needed = Gemm::get_workspace_size(arguments);
  if (needed > *bytes) {
    *bytes = needed;
    return cudaErrorMemoryAllocation;
  }
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (gemm.initialize(arguments, workspace, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidConfiguration;
  // Its copying warps wait for the kernel before (CUTLASS_ENABLE_GDC_FOR_SM90), and all others for what these bring.
  if (gemm.run(stream, nullptr, launches_early()) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaGetLastError();
}

}  // namespace quamba
