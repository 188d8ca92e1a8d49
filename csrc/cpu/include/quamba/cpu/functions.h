// exp, softplus and SiLU on vectors, within about two units in the last place. Included like simd.h.

// 2^n p for integer-valued n; beyond the range of normal numbers 0 or infinity.
QUAMBA_INLINE Floats scaled_by_power(Floats p, Floats n) {
#if QUAMBA_LANES == 16
  return bits<Floats>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(n)));
#else
  const Ints exponent = bits<Ints>(n + splat(kRounding)) - bits<Ints>(splat(kRounding)) + 127;
  return p * bits<Floats>(exponent << 23);
#endif
}

QUAMBA_INLINE Floats rounded(Floats value) {
#if QUAMBA_LANES == 16
  return bits<Floats>(_mm512_roundscale_ps(bits<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return (value + splat(kRounding)) - splat(kRounding);
#endif
}

// Polynomials of least relative error (2e-9), found by iterated weighted least squares.
QUAMBA_INLINE Floats exp2_of(Floats t) {
#if QUAMBA_LANES != 16
  t = within(t, -127.0f, 128.0f);
#endif
  const Floats n = rounded(t);
  const Floats f = t - n;
  Floats p = f * 0.00015345810970757157f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  return scaled_by_power(p, n);
}

QUAMBA_INLINE Floats exp_of(Floats x) {
#if QUAMBA_LANES != 16
  x = within(x, -88.0f, 88.8f);
#endif
  const Floats n = rounded(x * 1.44269504f);
  // ln 2 in two parts, so that the remainder is exact.
  const Floats f = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = f * 0.0013835802f + 0.008375645f;
  p = p * f + 0.04166829f;
  p = p * f + 0.16666411f;
  p = p * f + 0.4999999f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return scaled_by_power(p, n);
}

QUAMBA_INLINE Floats silu_of(Floats x) { return x / (exp_of(-x) + 1.0f); }

// log(1 + e^x) = max(x, 0) + log1p(u), u = e^-|x|; log1p(u) = 2 atanh(s), s = u / (2 + u).
QUAMBA_INLINE Floats softplus_of(Floats x) {
  const Floats positive = x > splat(0.0f) ? x : splat(0.0f);
  const Floats u = exp_of(x > splat(0.0f) ? -x : x);
  const Floats s = u / (u + 2.0f);
  const Floats t = s * s;
  Floats p = t * 0.14089167f + 0.139803f;
  p = p * t + 0.20012455f;
  p = p * t + 0.33333158f;
  p = p * t + 1.0f;
  return positive + (s + s) * p;
}
