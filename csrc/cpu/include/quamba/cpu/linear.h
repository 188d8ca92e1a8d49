// The ops that go row by row: linear for a few rows, rms_norm_quant, hadamard_quant. Included like simd.h.

static void linear(const Linear& p) {
  Buffer<int32_t> sums(p.rows * p.size);
  dot_parallel(p.weight, p.size, p.depth, p.x, p.rows, sums, p.threads);
  if (p.out_scale.data != nullptr)
    requantize(sums, p.rows, p.size, p.x_scale, p.weight_scale, p.bias, p.out_scale, static_cast<int8_t*>(p.out));
  else
    rescale(sums, p.rows, p.size, p.x_scale, p.weight_scale, p.bias, p.residual, static_cast<float*>(p.out));
}

// body(row) for all rows; threads share them where there are enough elements.
template <class Body>
static void for_rows(int64_t rows, int64_t size, int64_t threads, const Body& body) {
  constexpr int64_t kElementsPerThread = int64_t{1} << 19;
  const int64_t parts = std::max<int64_t>(1, std::min(threads, rows * size / kElementsPerThread));
  parallel(parts, [&](int64_t part) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) body(row);
  });
}

static void rms_norm_quant(const RmsNormQuant& p) {
  for_rows(p.rows, p.size, p.threads, [&](int64_t row) {
    rms_norm_quant_row(p.x + row * p.x_stride, p.size, p.weight, p.eps, p.scale, p.out + row * p.size);
  });
}

static void hadamard_quant(const HadamardQuant& p) {
  const int64_t size = p.blocks * p.base * p.power;
  for_rows(p.rows, size, p.threads, [&](int64_t row) {
    Buffer<float> copy(size), other(size);
    std::memcpy(copy, p.x + row * size, sizeof(float) * static_cast<size_t>(size));
    hadamard_quant_row(copy, other, p.blocks, p.power, p.base, p.base_signs, p.scale, p.out + row * size);
  });
}
