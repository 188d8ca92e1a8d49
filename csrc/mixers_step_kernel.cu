// The kernel of mixers_step for one base matrix of the transform; compiled once for each in setup.py.
#include "mixers_step_kernel.h"

#include "quamba/mixers_step_kernel.cuh"

namespace quamba {

namespace {

// Launches the kernel, or with `room`, finds how many clusters of it the device takes at a time.
template <int BASE, bool CLUSTER, typename Shape>
cudaError_t launch(const StackParams& p, cudaStream_t stream, int* room) {
  const auto kernel = mixers_step_kernel<BASE, CLUSTER, Shape>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.plan.s.total);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.plan.grid), config.blockDim = dim3(kStackThreads);
  config.dynamicSmemBytes = p.plan.s.total, config.stream = stream;
  // The thread blocks wait for each other: all of them have to be there at a time.
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative, attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(p.plan.cluster), 1, 1};
  config.attrs = attributes, config.numAttrs = CLUSTER ? 2 : 1;
  return room ? cudaOccupancyMaxActiveClusters(room, kernel, &config) : cudaLaunchKernelEx(&config, kernel, p);
}

// The same with the first of the shapes that the plan has, or with none of them.
template <int BASE, bool CLUSTER>
cudaError_t launch(const StackParams& p, cudaStream_t stream, int* room) {
  cudaError_t error = cudaSuccess;
  const auto run = [&](auto shape) { error = launch<BASE, CLUSTER, decltype(shape)>(p, stream, room); };
  if (with_known_shape<CLUSTER>(typename StackShapes<BASE>::List(), p.plan, run)) return error;
  return launch<BASE, CLUSTER, StackAnyShape>(p, stream, room);
}

}  // namespace

template <int BASE>
cudaError_t launch_mixers_step(StackParams* p, cudaStream_t stream) {
  if constexpr (BASE > 1) {
    for (int room = 0; p->plan.cluster > 1; p->plan.cluster /= 2) {
      const cudaError_t error = launch<BASE, true>(*p, stream, &room);
      if (error != cudaSuccess) return error;
      if (room * p->plan.cluster >= p->plan.grid) return launch<BASE, true>(*p, stream, nullptr);
    }
  }
  return launch<BASE, false>(*p, stream, nullptr);
}

template cudaError_t launch_mixers_step<QUAMBA_BASE>(StackParams*, cudaStream_t);

}  // namespace quamba
