// Depthwise causal convolution and SiLU over whole sequences, int8 in. Included like simd.h.

// The rows that the outputs read: K - 1 of context, then L of the sequence; a masked one is a row of zeros.
static std::vector<const int8_t*> convolution_rows(const CausalConv1d& p, int64_t b, int8_t* context,
                                                   const int8_t* zeros) {
  const int64_t before = p.width - 1;
  std::vector<const int8_t*> rows(static_cast<size_t>(before + p.length), zeros);
  for (int64_t k = 0; k < before && p.state != nullptr; ++k) {
    int8_t* row = context + k * p.channels;
    for (int64_t d = 0; d < p.channels; ++d) row[d] = p.state[(b * p.channels + d) * p.width + k + 1];
    rows[static_cast<size_t>(k)] = row;
  }
  for (int64_t t = 0; t < p.length; ++t)
    if (p.mask == nullptr || p.mask[b * p.length + t])
      rows[static_cast<size_t>(before + t)] = p.x + b * p.x_batch_stride + t * p.x_stride;
  return rows;
}

// One token; rows[k] is what tap k reads, taps (K, D).
static void convolve_row(const CausalConv1d& p, const int8_t* const* rows, const float* taps, int64_t at) {
  for_vectors(p.channels, [&](int64_t d, auto lanes) {
    Floats value{};
    for (int64_t k = 0; k < p.width; ++k)
      value += load_bytes(rows[k] + d, lanes) * load<Floats>(taps + k * p.channels + d, lanes);
    value *= load_scale(p.x_scale, d, lanes) * load_scale(p.weight_scale, d, lanes);
    if (p.bias != nullptr) value += load<Floats>(p.bias + d, lanes);
    value = silu_of(value);
    if (p.out_scale.data != nullptr)
      store_bytes(static_cast<int8_t*>(p.out) + at + d, value / load_scale(p.out_scale, d, lanes), lanes);
    else
      store(static_cast<float*>(p.out) + at + d, value, lanes);
  });
}

static void causal_conv1d(const CausalConv1d& p) {
  constexpr int64_t kOutputsPerThread = int64_t{1} << 18;
  const int64_t before = p.width - 1;
  Buffer<float> taps(p.width * p.channels);
  for (int64_t d = 0; d < p.channels; ++d)
    for (int64_t k = 0; k < p.width; ++k) taps[k * p.channels + d] = p.weight[d * p.width + k];
  const std::vector<int8_t> zeros(static_cast<size_t>(p.channels));
  Buffer<int8_t> context(before * p.channels);
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto rows = convolution_rows(p, b, context, zeros.data());
    const int64_t parts = std::max<int64_t>(1, std::min(p.threads, p.length * p.channels / kOutputsPerThread));
    parallel(parts, [&](int64_t part) {
      for (int64_t t = p.length * part / parts; t < p.length * (part + 1) / parts; ++t) {
        const int64_t at = (b * p.length + t) * p.channels;
        const bool masked = p.mask != nullptr && !p.mask[b * p.length + t];
        if (!masked)
          convolve_row(p, &rows[static_cast<size_t>(t)], taps, at);
        else if (p.out_scale.data != nullptr)
          std::memset(static_cast<int8_t*>(p.out) + at, 0, static_cast<size_t>(p.channels));
        else
          std::fill_n(static_cast<float*>(p.out) + at, p.channels, 0.0f);
      }
    });
    if (p.state == nullptr) continue;
    // rows holds K - 1 + L of them, and L is at least 1: its last K are the new state.
    for (int64_t d = 0; d < p.channels; ++d) {
      int8_t* window = p.state + (b * p.channels + d) * p.width;
      for (int64_t k = 0; k < p.width; ++k) window[k] = rows[static_cast<size_t>(p.length - 1 + k)][d];
    }
  }
}
