// Vectors of one instruction set: float, int32 and int8 of `kLanes` lanes, in the compiler's own vector types.
//
// Included only by kernels_*.cpp, inside `namespace quamba::cpu::QUAMBA_ISA` and after the target is chosen, so
// that every function exists once per instruction set.

constexpr int kLanes = QUAMBA_LANES;

typedef float Floats __attribute__((vector_size(4 * QUAMBA_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * QUAMBA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * QUAMBA_LANES)));
typedef int8_t Bytes __attribute__((vector_size(QUAMBA_LANES)));

#define QUAMBA_INLINE static inline __attribute__((always_inline))

// How many lanes of a vector are in use: all of them, or the first `count`.
struct Full {};
struct Part {
  int64_t count;
};

QUAMBA_INLINE Floats splat(float value) { return Floats{} + value; }

template <class Vector>
QUAMBA_INLINE Vector load(const void* from, Full) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Vector>
QUAMBA_INLINE Vector load(const void* from, Part part) {
  Vector value{};
  std::memcpy(&value, from, sizeof(value) / kLanes * part.count);
  return value;
}

template <class Vector>
QUAMBA_INLINE void store(void* to, Vector value, Full) {
  std::memcpy(to, &value, sizeof(value));
}

template <class Vector>
QUAMBA_INLINE void store(void* to, Vector value, Part part) {
  std::memcpy(to, &value, sizeof(value) / kLanes * part.count);
}

// f(offset, lanes) for every vector of a row of n elements; only the last may be a part.
template <class Function>
QUAMBA_INLINE void for_vectors(int64_t n, Function f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}

template <class To, class From>
QUAMBA_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits of two types of one size");
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// GCC 12 takes bytes apart one by one in __builtin_convertvector; the instructions have to be named.
QUAMBA_INLINE Ints to_ints(Bytes value) {
#if QUAMBA_LANES == 16
  return bits<Ints>(_mm512_cvtepi8_epi32(bits<__m128i>(value)));
#elif QUAMBA_LANES == 8
  return bits<Ints>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits<int64_t>(value))));
#else
  return __builtin_convertvector(value, Ints);
#endif
}

// Values within -128 .. 127.
QUAMBA_INLINE Bytes to_bytes(Ints value) {
#if QUAMBA_LANES == 16
  return bits<Bytes>(_mm512_cvtepi32_epi8(bits<__m512i>(value)));
#elif QUAMBA_LANES == 8
  const __m256i wide = bits<__m256i>(value);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return bits<Bytes>(_mm_cvtsi128_si64(_mm_packs_epi16(half, half)));
#else
  return __builtin_convertvector(value, Bytes);
#endif
}

QUAMBA_INLINE Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }
QUAMBA_INLINE Floats to_floats(Bytes value) { return to_floats(to_ints(value)); }

// The value where it is within [low, high], else the nearer bound; NaN stays.
QUAMBA_INLINE Floats within(Floats value, float low, float high) {
#if QUAMBA_LANES == 16
  const __m512 raised = _mm512_max_ps(bits<__m512>(splat(low)), bits<__m512>(value));
  return bits<Floats>(_mm512_min_ps(bits<__m512>(splat(high)), raised));
#elif QUAMBA_LANES == 8
  const __m256 raised = _mm256_max_ps(bits<__m256>(splat(low)), bits<__m256>(value));
  return bits<Floats>(_mm256_min_ps(bits<__m256>(splat(high)), raised));
#else
  value = value < splat(low) ? splat(low) : value;
  return value > splat(high) ? splat(high) : value;
#endif
}

template <class Lanes>
QUAMBA_INLINE Floats load_floats(const void* from, Lanes lanes) {
  return load<Floats>(from, lanes);
}

template <class Lanes>
QUAMBA_INLINE Floats load_bytes(const int8_t* from, Lanes lanes) {
  return to_floats(load<Bytes>(from, lanes));
}

// Unused lanes of a scale are 0: what is divided by them is not stored.
template <class Lanes>
QUAMBA_INLINE Floats load_scale(const Scale& scale, int64_t i, Lanes lanes) {
  return scale.step ? load<Floats>(scale.data + i, lanes) : splat(*scale.data);
}

// A row of int8 or float32 values from element i on.
template <class Lanes>
QUAMBA_INLINE Floats load_values(const void* row, bool int8, int64_t i, Lanes lanes) {
  return int8 ? load_bytes(static_cast<const int8_t*>(row) + i, lanes)
              : load<Floats>(static_cast<const float*>(row) + i, lanes);
}

// Adding 1.5 * 2^23 leaves an integer, rounded half to even, in the low bits of the mantissa.
constexpr float kRounding = 12582912.0f;

// round_half_even(value) within -128 .. 127; clamping first also keeps the sum from being fused with a product.
template <class Lanes>
QUAMBA_INLINE void store_bytes(int8_t* to, Floats value, Lanes lanes) {
  const Floats shifted = within(value, -128.0f, 127.0f) + splat(kRounding);
  store(to, to_bytes(bits<Ints>(shifted) - bits<Ints>(splat(kRounding))), lanes);
}

QUAMBA_INLINE float sum_lanes(Floats value) {
#if QUAMBA_LANES == 16
  return _mm512_reduce_add_ps(bits<__m512>(value));
#elif QUAMBA_LANES == 8
  const __m256 wide = bits<__m256>(value);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  float lanes[kLanes], sum = 0;
  std::memcpy(lanes, &value, sizeof(value));
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
#endif
}

template <int kStride, int... kLane>
QUAMBA_INLINE Floats swapped(Floats value, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(value, value, (kLane ^ kStride)...);
#else
  return __builtin_shuffle(value, Ints{(kLane ^ kStride)...});
#endif
}

template <int kStride, int... kLane>
QUAMBA_INLINE Floats butterfly(Floats value, std::integer_sequence<int, kLane...> lanes) {
  constexpr Floats signs = {(kLane & kStride ? -1.0f : 1.0f)...};
  return value * signs + swapped<kStride>(value, lanes);
}
