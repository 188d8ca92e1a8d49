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

// Rows and columns of the result, and of K at a time, and thread blocks that read x or the weight together.
template <int kRows, int kColumns, int kInner, int kBlocksOfRows, int kBlocksOfColumns>
struct Cut {
  using TileShape = cute::Shape<Int<kRows>, Int<kColumns>, Int<kInner>>;
  using Cluster = cute::Shape<Int<kBlocksOfRows>, Int<kBlocksOfColumns>, Int<1>>;
};
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};
struct OneGroup {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <Tile kTile>
struct Geometry;
template <>
struct Geometry<Tile::k128x256> : Cut<128, 256, 128, 2, 1>, Cooperative {};
template <>
struct Geometry<Tile::k128x192> : Cut<128, 192, 128, 2, 1>, Cooperative {};
template <>
struct Geometry<Tile::k128x128> : Cut<128, 128, 128, 2, 1>, Pingpong {};
template <>
struct Geometry<Tile::k64x64> : Cut<64, 64, 256, 1, 1>, OneGroup {};
// 10240 columns, the W_in of mamba-2.8b, are 128 of these: one pass over the device, each block with 205 KB of the
// weight to stream. Two blocks get x from one read.
template <>
struct Geometry<Tile::k64x80> : Cut<64, 80, 128, 1, 2>, OneGroup {};
// 2560 columns, the W_out of mamba-2.8b, for 2048 rows are 256 of these, two a multiprocessor, which take turns.
template <>
struct Geometry<Tile::k128x160> : Cut<128, 160, 128, 2, 1>, Pingpong {};
// 3072 columns, the W_in of mamba-130m, for 2048 rows are 128 of these.
template <>
struct Geometry<Tile::k256x192> : Cut<256, 192, 128, 1, 2>, Cooperative {};
// W_out again: 2560 columns for 512 rows are 128 of these, 768 columns for 2048 rows 128 of the next. Two blocks get x
// from one read.
template <>
struct Geometry<Tile::k128x80> : Cut<128, 80, 128, 1, 2>, Cooperative {};
template <>
struct Geometry<Tile::k128x96> : Cut<128, 96, 128, 1, 2>, Cooperative {};

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

using FloatTree =
    std::conditional_t<kResidual,
                       fusion::Sm90EVT<Compute<cutlass::plus, Out>,
                                       fusion::Sm90EVT<Compute<cutlass::plus>, ScaledTree, PerColumn>,
                                       fusion::Sm90SrcFetch<Out>>,
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

constexpr int64_t kEarlyTiles = 4;  // of a block, at most, for an early launch

// A template, so that only the branch of this unit's tree is instantiated.
template <typename T>
typename T::Arguments tree_arguments(const LinearParams& p) {
  const float* bias = static_cast<const float*>(p.bias.data);
  const typename PerRow::Arguments per_row{p.x_scale.data, 1.0f, {p.x_scale.stride != 0, _0{}, 0}};
  const typename PerColumn::Arguments per_column{p.weight_scale.data, 1.0f, {_0{}, p.weight_scale.stride != 0, 0}};
  const typename PerColumn::Arguments shift{bias, 0.0f, {_0{}, true, 0}};
  const typename ScaleTree::Arguments scale{per_row, per_column, {}};
  const typename ScaledTree::Arguments scaled{scale, {}, {}};
  if constexpr (kResidual) {
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
  // With many tiles a block that costs more than it gives: 4% of W_in for 2048 rows of mamba-2.8b.
  const int64_t tiles = (p.rows + size<0>(TileShape{}) - 1) / size<0>(TileShape{}) *
                        ((p.columns + size<1>(TileShape{}) - 1) / size<1>(TileShape{}));
  const int processors = cutlass::KernelHardwareInfo::query_device_multiprocessor_count();
  const bool early = tiles <= kEarlyTiles * processors && launches_early();
  if (gemm.run(stream, nullptr, early) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaGetLastError();
}

}  // namespace quamba
