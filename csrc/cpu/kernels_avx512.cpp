// The kernels for x86-64 with AVX-512 with VNNI.
#include "standard.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
// GCC takes the undefined operands inside its own intrinsics for ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#define QUAMBA_ISA avx512
#define QUAMBA_ISA_NAME "avx512"
#define QUAMBA_LANES 16
#include "kernels.h"

namespace quamba::cpu {
const Kernels kAvx512 = avx512::kKernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
