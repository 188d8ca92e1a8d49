// The kernels for x86-64 with AVX2.
#include "standard.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QUAMBA_ISA avx2
#define QUAMBA_ISA_NAME "avx2"
#define QUAMBA_LANES 8
#include "kernels.h"

namespace quamba::cpu {
const Kernels kAvx2 = avx2::kKernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
