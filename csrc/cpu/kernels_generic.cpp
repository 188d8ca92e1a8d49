// The kernels for the instruction set that the compiler assumes.
#include "standard.h"

#define QUAMBA_ISA generic
#define QUAMBA_ISA_NAME "generic"
#define QUAMBA_LANES 4
#include "kernels.h"

namespace quamba::cpu {
const Kernels kGeneric = generic::kKernels;
}
