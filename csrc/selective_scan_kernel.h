// The instantiations of the scan, one translation unit each (selective_scan_kernel.cu, selective_scan_chunks.cu,
// selective_scan_relay.cu, selective_scan_halves.cu), as the dispatcher sees them.
#pragma once

#include <cuda_runtime.h>

#include "quamba/selective_scan.cuh"

namespace quamba {

// kBytes: x, dt, z, B and C are all int8. kAsync: every row of every tensor can be copied in aligned words.
template <int LANES, int STATES>
cudaError_t launch_selective_scan(const ScanParams& p, bool bytes, bool async, cudaStream_t stream);

// x, dt, z, B and C int8 in aligned words; a multiple of 4 states, up to kChunkStates; LANES lanes along time.
template <int LANES>
cudaError_t launch_selective_scan_chunks(const ScanParams& p, cudaStream_t stream);

// int8 as above, rows of x, dt and z in pieces of 8 bytes; 16 states; GROUPS of eight channels to a block, 1 to
// kRelayGroups, shared by BLOCKS, of which two are there for kPairedGroups on Hopper alone.
template <int GROUPS, int BLOCKS>
cudaError_t launch_selective_scan_relay(const ScanParams& p, cudaStream_t stream);

// As the one before, on Hopper; GROUPS of sixteen channels to two blocks, kHalvesFewest to kHalvesGroups.
template <int GROUPS>
cudaError_t launch_selective_scan_halves(const ScanParams& p, cudaStream_t stream);

}  // namespace quamba
