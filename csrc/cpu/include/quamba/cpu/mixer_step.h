// One token per sequence through a whole quantized block. Included like simd.h.

// conv_state (D, K) shifts in x0 (D); sums[d] = sum_k weight[d, k] state[d, k].
static void convolve(int8_t* state, const int8_t* x0, const int8_t* weight, int64_t channels, int64_t width,
                     int32_t* sums) {
  if (width != 4) {
    for (int64_t d = 0; d < channels; ++d) {
      int8_t* window = state + d * width;
      std::memmove(window, window + 1, static_cast<size_t>(width - 1));
      window[width - 1] = x0[d];
      int32_t sum = 0;
      for (int64_t k = 0; k < width; ++k) sum += window[k] * weight[d * width + k];
      sums[d] = sum;
    }
    return;
  }
  // Four bytes are one little-endian word, the oldest input its lowest byte.
  for_vectors(channels, [&](int64_t d, auto lanes) {
    const Ints newest = to_ints(load<Bytes>(x0 + d, lanes));
    const Words shifted = load<Words>(state + 4 * d, lanes) >> 8;
    const Ints window = bits<Ints>(shifted | (bits<Words>(newest) << 24));
    store(state + 4 * d, window, lanes);
    const Ints taps = load<Ints>(weight + 4 * d, lanes);
    Ints sum = (window >> 24) * (taps >> 24);
    sum += (window << 8 >> 24) * (taps << 8 >> 24);
    sum += (window << 16 >> 24) * (taps << 16 >> 24);
    sum += (window << 24 >> 24) * (taps << 24 >> 24);
    store(sums + d, sum, lanes);
  });
}

// x[d] = q(SiLU(sums[d] * xz_scale[d] * weight_scale[d] + bias[d]), x_scale[d]).
static void activate(const MixerStep& p, const int32_t* sums, int8_t* x) {
  for_vectors(p.d_inner, [&](int64_t d, auto lanes) {
    const Floats scale = load_scale(p.xz_scale, d, lanes) * load_scale(p.conv_weight_scale, d, lanes);
    Floats value = to_floats(load<Ints>(sums + d, lanes)) * scale;
    if (p.conv_bias != nullptr) value += load<Floats>(p.conv_bias + d, lanes);
    store_bytes(x + d, silu_of(value) / load_scale(p.x_scale, d, lanes), lanes);
  });
}

// d, B and C of one token, int8, from the sums of x_proj.
static void project_dbc(const MixerStep& p, const int32_t* sums, float* wide, int8_t* dbc) {
  const int64_t size = p.dt_rank + 2 * p.d_state;
  if (!p.norm_dbc) {
    requantize(sums, 1, size, p.x_in_scale, p.x_weight_scale, nullptr, p.dbc_scale, dbc);
    return;
  }
  rescale(sums, 1, size, p.x_in_scale, p.x_weight_scale, nullptr, nullptr, wide);
  const float* weights[3] = {p.d_norm_weight, p.B_norm_weight, p.C_norm_weight};
  const int64_t sizes[3] = {p.dt_rank, p.d_state, p.d_state};
  for (int64_t part = 0, at = 0; part < 3; at += sizes[part++])
    rms_norm_quant_row(wide + at, sizes[part], weights[part], p.dbc_eps, {p.dbc_scale.data + at, 1}, dbc + at);
}

// dt after the softplus, from the sums of dt_proj; int8 on the way where there is a dt_scale.
static void project_dt(const MixerStep& p, const int32_t* sums, int8_t* quantized, float* dt) {
  const int64_t inner = p.d_inner;
  if (p.dt_scale.data != nullptr)
    requantize(sums, 1, inner, p.dbc_scale, p.dt_weight_scale, nullptr, p.dt_scale, quantized);
  else
    rescale(sums, 1, inner, p.dbc_scale, p.dt_weight_scale, nullptr, nullptr, dt);
  for_vectors(inner, [&](int64_t d, auto lanes) {
    Floats value;
    if (p.dt_scale.data != nullptr)
      value = load_bytes(quantized + d, lanes) * load_scale(p.dt_scale, d, lanes);
    else
      value = load<Floats>(dt + d, lanes);
    store(dt + d, softplus_of(value + load<Floats>(p.dt_bias + d, lanes)), lanes);
  });
}

// state (D, N) <- exp(dt A) state + dt x B; y (D) = state C. B, C (N) float32, dtx (D).
static void advance(const MixerStep& p, const float* dt, const float* dtx, const float* B, const float* C,
                    float* state, float* y) {
  constexpr float kLog2e = 1.44269504f;
  const int64_t size = p.d_state;
  for (int64_t d = 0; d < p.d_inner; ++d) {
    const float* A = p.A + d * size;
    float* s = state + d * size;
    const Floats rate = splat(dt[d] * kLog2e), input = splat(dtx[d]);
    Floats sum{};
    for_vectors(size, [&](int64_t n, auto lanes) {
      const Floats decay = exp2_of(rate * load<Floats>(A + n, lanes));
      const Floats next = decay * load<Floats>(s + n, lanes) + input * load<Floats>(B + n, lanes);
      store(s + n, next, lanes);
      sum += next * load<Floats>(C + n, lanes);
    });
    y[d] = sum_lanes(sum);
  }
}

// From x0 and z (2D), int8, to the quantized, gated output g (D), for one token.
static void recur(const MixerStep& p, const int8_t* xz, const int8_t* x, const int32_t* dbc_sums, float* state,
                  int8_t* g) {
  const int64_t inner = p.d_inner, size = p.d_state, rank = p.dt_rank;
  Buffer<float> wide(rank + 2 * size), dt(inner), dtx(inner), y(inner), other(inner);
  Buffer<int8_t> dbc(rank + 2 * size), quantized(inner);
  Buffer<int32_t> sums(inner);
  project_dbc(p, dbc_sums, wide, dbc);
  dot(p.dt_weight, 0, inner, rank, dbc, 1, sums, inner);
  project_dt(p, sums, quantized, dt);
  // B and C, dequantized; d's place in `wide` is not used.
  for_vectors(2 * size, [&](int64_t n, auto lanes) {
    const Floats scale = load<Floats>(p.dbc_scale.data + rank + n, lanes);
    store(wide + rank + n, load_bytes(dbc + rank + n, lanes) * scale, lanes);
  });
  for_vectors(inner, [&](int64_t d, auto lanes) {
    const Floats value = load_bytes(x + d, lanes) * load_scale(p.x_scan_scale, d, lanes);
    store(dtx + d, load<Floats>(dt + d, lanes) * value, lanes);
  });
  advance(p, dt, dtx, wide + rank, wide + rank + size, state, y);
  const Scale z_scale{p.xz_scale.data + inner, 1};
  for_vectors(inner, [&](int64_t d, auto lanes) {
    const Floats value = load_bytes(x + d, lanes) * load_scale(p.x_scan_scale, d, lanes);
    const Floats z = load_bytes(xz + inner + d, lanes) * load_scale(z_scale, d, lanes);
    const Floats gated = (load<Floats>(y + d, lanes) + value * load<Floats>(p.D + d, lanes)) * silu_of(z);
    if (p.rotate)
      store(y + d, gated, lanes);
    else
      store_bytes(g + d, gated / load_scale(p.g_scale, d, lanes), lanes);
  });
  if (p.rotate) hadamard_quant_row(y, other, p.blocks, p.power, p.base, p.base_signs, p.g_scale, g);
}

static void mixer_step(const MixerStep& p, const Step& step) {
  const FlushDenormals flush;
  const int64_t batch = step.batch, model = p.d_model, inner = p.d_inner, rows = p.dt_rank + 2 * p.d_state;
  Buffer<int8_t> u(batch * model), xz(batch * 2 * inner), x(batch * inner), g(batch * inner);
  Buffer<int32_t> sums(batch * std::max({2 * inner, rows, model}));

  for (int64_t b = 0; b < batch; ++b)
    rms_norm_quant_row(step.hidden + b * model, model, p.norm_weight, p.norm_eps, p.u_scale, u + b * model);
  dot_parallel(p.in_weight, 2 * inner, model, u, batch, sums, step.threads);
  requantize(sums, batch, 2 * inner, p.u_scale, p.in_weight_scale, p.in_bias, p.xz_scale, xz);

  Buffer<int32_t> conv_sums(inner);
  for (int64_t b = 0; b < batch; ++b) {
    int8_t* state = step.conv_state + b * inner * p.d_conv;
    convolve(state, xz + b * 2 * inner, p.conv_weight, inner, p.d_conv, conv_sums);
    activate(p, conv_sums, x + b * inner);
  }

  dot_parallel(p.x_weight, rows, inner, x, batch, sums, step.threads);
  for (int64_t b = 0; b < batch; ++b)
    recur(p, xz + b * 2 * inner, x + b * inner, sums + b * rows, step.ssm_state + b * inner * p.d_state, g + b * inner);

  dot_parallel(p.out_weight, model, inner, g, batch, sums, step.threads);
  rescale(sums, batch, model, p.g_scale, p.out_weight_scale, p.out_bias, p.residual ? step.hidden : nullptr, step.out);
}
