// What is done to one row at a time: rescaling of integer sums, RMSNorm, Hadamard transform. Included like simd.h.

// out[t, n] = q(sums[t, n] * x_scale * weight_scale[n] + bias[n], out_scale[n]) for (tokens, size) sums.
static void requantize(const int32_t* sums, int64_t tokens, int64_t size, const Scale& x_scale,
                       const Scale& weight_scale, const float* bias, const Scale& out_scale, int8_t* out) {
  const Floats x = splat(*x_scale.data);
  for_vectors(size, [&](int64_t n, auto lanes) {
    const Floats unit = load_scale(out_scale, n, lanes);
    const Floats scale = x * load_scale(weight_scale, n, lanes) / unit;
    const Floats offset = bias == nullptr ? Floats{} : load<Floats>(bias + n, lanes) / unit;
    for (int64_t t = 0; t < tokens; ++t) {
      const Floats product = to_floats(load<Ints>(sums + t * size + n, lanes)) * scale;
      store_bytes(out + t * size + n, bias == nullptr ? product : product + offset, lanes);
    }
  });
}

// out[t, n] = sums[t, n] * x_scale * weight_scale[n] + bias[n] + residual[t, n], float32.
static void rescale(const int32_t* sums, int64_t tokens, int64_t size, const Scale& x_scale,
                    const Scale& weight_scale, const float* bias, const float* residual, float* out) {
  const Floats x = splat(*x_scale.data);
  for_vectors(size, [&](int64_t n, auto lanes) {
    const Floats scale = x * load_scale(weight_scale, n, lanes);
    const Floats offset = bias == nullptr ? Floats{} : load<Floats>(bias + n, lanes);
    for (int64_t t = 0; t < tokens; ++t) {
      Floats value = to_floats(load<Ints>(sums + t * size + n, lanes)) * scale + offset;
      if (residual != nullptr) value += load<Floats>(residual + t * size + n, lanes);
      store(out + t * size + n, value, lanes);
    }
  });
}

// q(x / sqrt(mean(x^2) + eps) * weight, scale); weight may be null.
static void rms_norm_quant_row(const float* x, int64_t size, const float* weight, double eps, const Scale& scale,
                               int8_t* out) {
  Floats squares{};
  for_vectors(size, [&](int64_t i, auto lanes) {
    const Floats value = load<Floats>(x + i, lanes);
    squares += value * value;
  });
  const float mean = sum_lanes(squares) / static_cast<float>(size) + static_cast<float>(eps);
  const Floats inverse = splat(1.0f / std::sqrt(mean));
  for_vectors(size, [&](int64_t i, auto lanes) {
    Floats value = load<Floats>(x + i, lanes) * inverse;
    if (weight != nullptr) value *= load<Floats>(weight + i, lanes);
    store_bytes(out + i, value / load_scale(scale, i, lanes), lanes);
  });
}

template <int kStride>
static void butterflies_within(float* x, int64_t size) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats value = butterfly<kStride>(load<Floats>(x + i, Full{}), lanes);
    if constexpr (2 * kStride < kLanes) value = butterfly<2 * kStride>(value, lanes);
    store(x + i, value, Full{});
  }
}

// x <- S x for the Sylvester matrix S of order `size`, a power of two.
static void sylvester(float* x, int64_t size) {
  int64_t stride = 1;
  if (size >= kLanes) {
    butterflies_within<1>(x, size);
    if constexpr (kLanes > 4) butterflies_within<4>(x, size);
    stride = kLanes;
  }
  for (; stride < size; stride *= 2)
    for (int64_t start = 0; start < size; start += 2 * stride)
      for_vectors(stride, [&](int64_t i, auto lanes) {
        float *low = x + start + i, *high = low + stride;
        const Floats a = load<Floats>(low, lanes), b = load<Floats>(high, lanes);
        store(low, a + b, lanes);
        store(high, a - b, lanes);
      });
}

// The orthonormal transform of quamba/hadamard.py: size = blocks * base * power, signs (base, base) of +1 and -1.
// x (size) is overwritten; the result is in x or in `other` (size), whichever is returned.
static const float* hadamard_row(float* x, float* other, int64_t blocks, int64_t power, int64_t base,
                                 const int8_t* signs) {
  for (int64_t start = 0; start < blocks * base * power; start += power) sylvester(x + start, power);
  if (base == 1) return x;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* from = x + block * base * power;
    float* to = other + block * base * power;
    for (int64_t row = 0; row < base; ++row)
      for_vectors(power, [&](int64_t i, auto lanes) {
        Floats sum{};
        for (int64_t j = 0; j < base; ++j) {
          const Floats value = load<Floats>(from + j * power + i, lanes);
          sum = signs[row * base + j] > 0 ? sum + value : sum - value;
        }
        store(to + row * power + i, sum, lanes);
      });
  }
  return other;
}

// q(H x / sqrt(base * power), scale); both buffers (size) are overwritten.
static void hadamard_quant_row(float* x, float* other, int64_t blocks, int64_t power, int64_t base,
                               const int8_t* signs, const Scale& scale, int8_t* out) {
  const float* rotated = hadamard_row(x, other, blocks, power, base, signs);
  const Floats norm = splat(1.0f / std::sqrt(static_cast<float>(base * power)));
  for_vectors(blocks * base * power, [&](int64_t i, auto lanes) {
    store_bytes(out + i, load<Floats>(rotated + i, lanes) * norm / load_scale(scale, i, lanes), lanes);
  });
}
