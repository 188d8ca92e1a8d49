// quamba::hadamard and quamba::hadamard_quant on CUDA.
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "hadamard_quant_kernel.h"
#include "op.h"
#include "ops.h"

namespace quamba {
namespace {

// Where the base matrix of this order is in the table, or -1.
int base_index(int64_t order) {
  for (int i = 0; i < kOrderCount; ++i)
    if (kOrders[i] == order) return i;
  return -1;
}

// size = blocks * power * base, as quamba.hadamard.decompose finds it: the largest order that divides the size, with
// the smallest base that serves.
void decompose(int64_t size, HadamardParams* p) {
  const int64_t twos = size & -size, odd = size / twos;
  for (int64_t factor = odd; factor >= 1; --factor) {
    if (odd % factor != 0) continue;
    for (int64_t base = factor; base <= twos * factor; base *= 2) {
      const int index = base_index(base);
      if (index < 0) continue;
      p->blocks = static_cast<int>(odd / factor);
      p->base = static_cast<int>(base);
      p->base_offset = kOffsets[index];
      p->power = static_cast<int>(twos * factor / base);
      p->log_power = 0;
      while ((1 << p->log_power) < p->power) ++p->log_power;
      return;
    }
  }
}

// Whether hadamard_rows_kernel takes it, and there are rows enough that each of its blocks has several. For
// measurements, QUAMBA_HADAMARD_ROWS=0 leaves all to the kernel of a block a row.
bool of_many_rows(const HadamardParams& p, int64_t rows, Type type, bool quantize, int processors) {
  static const char* const wanted = std::getenv("QUAMBA_HADAMARD_ROWS");
  return quantize && rows >= 8 * processors && has_rows_kernel(p.base, p.log_power) && p.blocks == 1 &&
         size_of(type) == 2 && p.vector_in && p.vector_out && (p.scale.stride == 0 || p.vector_scale) &&
         (wanted == nullptr || std::strcmp(wanted, "0") != 0);
}

cudaError_t launch(const HadamardParams& p, int64_t rows, Type type, bool quantize, bool many, int processors,
                   cudaStream_t stream) {
  switch (p.base) {
    case 1:
      return launch_hadamard<1>(p, rows, type, quantize, many, processors, stream);
    case 12:
      return launch_hadamard<12>(p, rows, type, quantize, many, processors, stream);
    case 20:
      return launch_hadamard<20>(p, rows, type, quantize, many, processors, stream);
    case 28:
      return launch_hadamard<28>(p, rows, type, quantize, many, processors, stream);
    case 36:
      return launch_hadamard<36>(p, rows, type, quantize, many, processors, stream);
    case 44:
      return launch_hadamard<44>(p, rows, type, quantize, many, processors, stream);
    case 52:
      return launch_hadamard<52>(p, rows, type, quantize, many, processors, stream);
    case 60:
      return launch_hadamard<60>(p, rows, type, quantize, many, processors, stream);
    default:
      return launch_hadamard<kAnyBase>(p, rows, type, quantize, many, processors, stream);
  }
}

Tensor run(const Tensor& x, const OptionalTensor& scale) {
  const Rows rows = rows_of(x, "x");
  const Type type = type_of(x, "x");
  QUAMBA_CHECK(type != Type::kInt8, "x is int8; expected float16, bfloat16 or float32");
  Tensor out = empty(x, sizes_of(x), scale ? ScalarType::Char : x.scalar_type());
  QUAMBA_CHECK(rows.columns > 0, "x has shape ", shape_of(x), "; expected a last dimension of at least 1");
  if (rows.rows == 0) return out;
  HadamardParams p{};
  decompose(rows.columns, &p);
  p.x = rows.data, p.row_stride = rows.row_stride, p.column_stride = rows.column_stride;
  p.factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.power) * p.base));
  p.scale = scale_of(scale, rows.columns, x, "scale");
  p.out = out.data_ptr();
  p.vector_in = vectorizable(rows, 16, 1) && p.power % 16 == 0;
  p.vector_scale = aligned(p.scale.data, 16);
  p.vector_out = p.power % 16 == 0 && aligned(p.out, 16);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int processors = multiprocessors(x);
  const bool many = of_many_rows(p, rows.rows, type, scale.has_value(), processors);
  const cudaError_t error = launch(p, rows.rows, type, scale.has_value(), many, processors, stream_of(x));
  QUAMBA_CHECK(error == cudaSuccess, "hadamard: the kernel for D=", rows.columns,
               " could not be launched: ", cudaGetErrorString(error));
  return out;
}

Tensor hadamard(const Tensor& x) { return run(x, std::nullopt); }
}  // namespace

Tensor hadamard_quant(const Tensor& x, const Tensor& scale) { return run(x, scale); }

}  // namespace quamba

STABLE_TORCH_LIBRARY_IMPL(quamba, CUDA, m) {
  m.impl("hadamard", TORCH_BOX(&quamba::hadamard));
  m.impl("hadamard_quant", TORCH_BOX(&quamba::hadamard_quant));
}
