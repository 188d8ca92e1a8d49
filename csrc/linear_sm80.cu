// linear on Ampere, Ada and, where it is forced, anything newer: CUTLASS 2.x, with an epilogue visitor of our own.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

// After the above, which it needs and does not include.
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "linear_gemm.h"

namespace quamba {
namespace {

using namespace cute;

constexpr int kWidth = 4;  // results a thread rescales and writes at a time
using Threadblock = cutlass::gemm::GemmShape<128, 128, 64>;
using Warp = cutlass::gemm::GemmShape<64, 64, 64>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 32>;
using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Threadblock, Warp, int32_t, kWidth, 1>;

// One node for the whole epilogue: the sums of kWidth columns in, the finished results out to memory.
struct Finish : cutlass::epilogue::threadblock::VisitorImpl2x<> {
  using Arguments = LinearParams;
  using Params = LinearParams;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE Finish() {}
  CUTLASS_HOST_DEVICE Finish(Params const& params, SharedStorage const&) : params(&params) {}

  Params const* params = nullptr;

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates&& at, Params const* params)
        : at(cute::forward<Coordinates>(at)), params(params) {}

    Coordinates at;
    Params const* params;

    template <class Sum, int N>
    CUTLASS_DEVICE auto visit(int step, int row, int column, int, cutlass::Array<Sum, N> const& sums) {
      const auto coordinate = at(_0{}, column, row, step);
      const int64_t m = get<0>(coordinate), n = get<1>(coordinate);
      if (m < params->rows) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i)
          if (n + i < params->columns) finish(*params, sums[i], m, n + i);
      }
      return sums;
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    // Vector, fragment column, fragment row, step.
    auto at = group_modes<3, 6>(ThreadMap::partition(make_identity_tensor(shape), thread, tile));
    return Callbacks<decltype(at)>(cute::move(at), params);
  }
};

using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16, int8_t, cutlass::layout::ColumnMajor,
    cutlass::ComplexTransform::kNone, 16, int32_t, cutlass::layout::RowMajor, kWidth, int32_t, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Threadblock, Warp, Instruction, Finish,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, 4, cutlass::arch::OpMultiplyAddSaturate,
    1>::GemmKernel;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
static_assert(sizeof(typename Kernel::SharedStorage) <= 99 * 1024, "more than a block gets on 8.6 and 8.9");

}  // namespace

cudaError_t linear_sm80(const LinearParams& p, cudaStream_t stream) {
  const cutlass::gemm::GemmCoord size(static_cast<int>(p.rows), static_cast<int>(p.columns),
                                      static_cast<int>(p.inner));
  const typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, size, 1, p, p.x, p.weight,
                                           nullptr, nullptr, 0, 0, 0, 0, p.x_row, p.weight_row, p.columns, p.columns);
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidConfiguration;
  if (gemm.run(stream) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
  return cudaGetLastError();
}

}  // namespace quamba
