// The step of the scan with bulk copies, as the dispatcher sees it.
#pragma once

#include <cuda_runtime.h>

#include "quamba/selective_scan_step.cuh"

namespace quamba {

// Whether the kernel takes a step (on Hopper alone), all of which is aligned as selective_scan_step_kernel's vectors
// are, and is to: beyond 32 sequences, or as QUAMBA_SCAN_STEP says.
bool takes_bulk_step(const ScanParams& p, const DtProduct& product, int device);

// product: null where p.dt has the result. early: nothing that may still run when the kernel begins writes the states.
cudaError_t selective_scan_step_bulk(const ScanParams& p, const DtProduct* product, bool early, int processors,
                                     cudaStream_t stream);

}  // namespace quamba
