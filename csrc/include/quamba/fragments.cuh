// Matrix instructions on int8, and their operands from shared memory.
#pragma once

#include <cuda_runtime.h>

namespace quamba {

// d (16, 8) += a (16, 32) b (32, 8). Volatile, as loads straight into operands are: the assembler would move those to
// their uses, and one would wait for the other.
__device__ __forceinline__ void mma(int (&d)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes: lane i names row i % 8 of matrix i / 8, and gets four bytes of row i / 4 of
// each.
__device__ __forceinline__ void load_matrices(int (&r)[4], const char* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace quamba
