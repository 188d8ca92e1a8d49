// The body of every kernels_*.cpp, after QUAMBA_ISA, QUAMBA_LANES and the target are set.
//
// The standard headers come before the target, in each of those files: their inline functions are shared by all of
// the library and must run on every CPU.

namespace quamba::cpu::QUAMBA_ISA {

#include "quamba/cpu/simd.h"
#include "quamba/cpu/functions.h"
#include "quamba/cpu/parallel.h"
#include "quamba/cpu/dot.h"
#include "quamba/cpu/rows.h"
#include "quamba/cpu/mixer_step.h"
#include "quamba/cpu/selective_scan.h"
#include "quamba/cpu/causal_conv1d.h"
#include "quamba/cpu/linear.h"

static const Kernels kKernels = {
    QUAMBA_ISA_NAME, mixer_step, selective_scan, causal_conv1d, linear, rms_norm_quant, hadamard_quant,
};

}  // namespace quamba::cpu::QUAMBA_ISA
