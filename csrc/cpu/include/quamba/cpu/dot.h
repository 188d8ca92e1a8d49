// int8 x int8 -> int32 products of a weight's rows with a few tokens: exact sums. Included like simd.h.
//
// The weight is read once, row by row, as it lies; four rows and up to four tokens at a time.

#if QUAMBA_LANES == 16

// vpdpbusd multiplies unsigned by signed bytes: w + 128 is unsigned, and 128 sum(x) is taken off afterwards. It
// does not saturate.
template <int kTokens>
static void dot_block(const int8_t* const weight[4], int64_t depth, const int8_t* x, int64_t x_stride,
                      const int32_t* excess, int32_t sums[][4]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i acc[kTokens][4];
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < 4; ++r) acc[t][r] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= depth; k += 64) {
    __m512i w[4];
    for (int r = 0; r < 4; ++r) w[r] = _mm512_xor_si512(_mm512_loadu_si512(weight[r] + k), flip);
    for (int t = 0; t < kTokens; ++t) {
      const __m512i values = _mm512_loadu_si512(x + t * x_stride + k);
      for (int r = 0; r < 4; ++r) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], w[r], values);
    }
  }
  if (k < depth) {
    const __mmask64 rest = ~0ull >> (64 - (depth - k));
    __m512i w[4];
    for (int r = 0; r < 4; ++r) w[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, weight[r] + k), flip);
    for (int t = 0; t < kTokens; ++t) {
      const __m512i values = _mm512_maskz_loadu_epi8(rest, x + t * x_stride + k);
      for (int r = 0; r < 4; ++r) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], w[r], values);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    const __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[t][0], acc[t][1]),
                                         _mm512_unpackhi_epi32(acc[t][0], acc[t][1]));
    const __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[t][2], acc[t][3]),
                                         _mm512_unpackhi_epi32(acc[t][2], acc[t][3]));
    const __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(s), _mm512_extracti64x4_epi64(s, 1));
    const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[t]), _mm_sub_epi32(sum, _mm_set1_epi32(excess[t])));
  }
}

#elif QUAMBA_LANES == 8

// Products of 16-bit values, added in pairs: vpmaddubsw, which takes bytes, would saturate.
template <int kTokens>
static void dot_block(const int8_t* const weight[4], int64_t depth, const int8_t* x, int64_t x_stride, const int32_t*,
                      int32_t sums[][4]) {
  for (int t = 0; t < kTokens; ++t) {
    const int8_t* row = x + t * x_stride;
    __m256i acc[4];
    for (int r = 0; r < 4; ++r) acc[r] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 16 <= depth; k += 16) {
      const __m256i values = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k)));
      for (int r = 0; r < 4; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight[r] + k));
        acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), values));
      }
    }
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0], acc[1]), _mm256_hadd_epi32(acc[2], acc[3]));
    const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[t]), sum);
    for (; k < depth; ++k)
      for (int r = 0; r < 4; ++r) sums[t][r] += weight[r][k] * row[k];
  }
}

#else

template <int kTokens>
static void dot_block(const int8_t* const weight[4], int64_t depth, const int8_t* x, int64_t x_stride, const int32_t*,
                      int32_t sums[][4]) {
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < 4; ++r) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += static_cast<int16_t>(weight[r][k]) * (x + t * x_stride)[k];
      sums[t][r] = sum;
    }
}

#endif

template <int kTokens>
QUAMBA_INLINE void dot_tokens(const int8_t* const weight[4], int64_t rows, int64_t depth, const int8_t* x,
                              const int32_t* excess, int32_t* out, int64_t out_stride) {
  int32_t sums[kTokens][4];
  dot_block<kTokens>(weight, depth, x, depth, excess, sums);
  const size_t bytes = sizeof(int32_t) * static_cast<size_t>(std::min<int64_t>(4, rows));
  for (int t = 0; t < kTokens; ++t) std::memcpy(out + t * out_stride, sums[t], bytes);
}

// out[t, n] = sum_k weight[n, k] x[t, k] for rows begin .. end of the weight (rows, depth); x (tokens, depth)
// contiguous, out int32 with out_stride elements from token to token.
static void dot(const int8_t* weight, int64_t begin, int64_t end, int64_t depth, const int8_t* x, int64_t tokens,
                int32_t* out, int64_t out_stride) {
  constexpr int64_t kChunk = 64;
  for (int64_t first = 0; first < tokens; first += kChunk) {
    const int64_t count = std::min(kChunk, tokens - first);
    int32_t excess[kChunk];
    for (int64_t t = 0; t < count; ++t) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += x[(first + t) * depth + k];
      excess[t] = 128 * sum;
    }
    for (int64_t n = begin; n < end; n += 4) {
      // Fewer than four rows: the last one again, not stored.
      const int8_t* rows[4];
      for (int r = 0; r < 4; ++r) rows[r] = weight + std::min(n + r, end - 1) * depth;
      const int8_t* values = x + first * depth;
      int32_t* to = out + first * out_stride + n;
      int64_t t = 0;
      for (; t + 4 <= count; t += 4)
        dot_tokens<4>(rows, end - n, depth, values + t * depth, excess + t, to + t * out_stride, out_stride);
      for (; t < count; ++t)
        dot_tokens<1>(rows, end - n, depth, values + t * depth, excess + t, to + t * out_stride, out_stride);
    }
  }
}

// The same for all rows; threads share them where the work pays for starting them.
static void dot_parallel(const int8_t* weight, int64_t rows, int64_t depth, const int8_t* x, int64_t tokens,
                         int32_t* out, int64_t threads) {
  constexpr int64_t kProductsPerThread = int64_t{1} << 21;
  const int64_t parts = std::max<int64_t>(1, std::min(threads, rows * depth * tokens / kProductsPerThread));
  const int64_t share = (rows + parts - 1) / parts;
  parallel(parts, [=](int64_t part) {
    const int64_t begin = std::min(part * share, rows), end = std::min(begin + share, rows);
    if (begin < end) dot(weight, begin, end, depth, x, tokens, out, rows);
  });
}
