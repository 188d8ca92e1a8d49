// The kernel of mixers_step for many sequences and one base matrix of the transform; compiled once for each in
// setup.py.
#include "mixers_step_kernel.h"

#include "quamba/mixers_step_many_kernel.cuh"

namespace quamba {

namespace {

// Launches the kernel, or with `room`, finds how many clusters of it the device takes at a time.
template <int BASE, bool CLUSTER, int GROUPS, typename Shape = StackAnyMany>
cudaError_t launch(const StackParams& p, cudaStream_t stream, int* room) {
  const auto kernel = mixers_step_many_kernel<BASE, CLUSTER, GROUPS, Shape>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.plan.s.total);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.plan.grid), config.blockDim = dim3(kManyThreads);
  config.dynamicSmemBytes = p.plan.s.total, config.stream = stream;
  // The thread blocks wait for each other: all of them have to be there at a time.
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative, attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.plan.cluster), 1, 1};
  config.attrs = attributes, config.numAttrs = CLUSTER ? 2 : 1;
  return room ? cudaOccupancyMaxActiveClusters(room, kernel, &config) : cudaLaunchKernelEx(&config, kernel, p);
}

// With the first of the shapes that the plan has, or with none of them.
template <int BASE, bool CLUSTER>
cudaError_t launch_groups(const StackParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    error = launch<BASE, CLUSTER, Shape::kGroups, Shape>(p, stream, nullptr);
  };
  if (with_known_shape<CLUSTER>(typename StackManyShapes<BASE>::List(), p.plan, run)) return error;
  return p.plan.tokens > 8 ? launch<BASE, CLUSTER, 2>(p, stream, nullptr)
                           : launch<BASE, CLUSTER, 1>(p, stream, nullptr);
}

}  // namespace

template <int BASE>
cudaError_t launch_mixers_step_many(const StackParams& p, cudaStream_t stream) {
  if constexpr (BASE > 0)
    if (p.plan.cluster > 1) return launch_groups<BASE, true>(p, stream);
  return launch_groups<BASE, false>(p, stream);
}

template <int BASE>
cudaError_t mixers_step_many_room(const StackParams& p, int* room) {
  *room = 0;
  if constexpr (BASE > 0) return launch<BASE, true, 2>(p, nullptr, room);
  return cudaSuccess;
}

template cudaError_t launch_mixers_step_many<QUAMBA_BASE>(const StackParams&, cudaStream_t);
template cudaError_t mixers_step_many_room<QUAMBA_BASE>(const StackParams&, int*);

}  // namespace quamba
