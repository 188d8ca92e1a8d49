// The recurrence over a whole sequence, for a vector of channels at a time. Included like simd.h.
//
// A group is kLanes channels. The sequence is taken in pieces short enough that all groups read a piece's rows
// from the first-level cache; a group's state stays in registers over a piece.

constexpr int64_t kPiece = 64;  // tokens
constexpr int64_t kGroupStates = 16;  // states that stay in registers

// One row (b, t) of a (B, L, .) tensor.
struct Tensor {
  const void* data;
  bool int8;
  int64_t batch_stride, stride;

  const void* row(int64_t b, int64_t t) const {
    return static_cast<const char*>(data) + (b * batch_stride + t * stride) * (int8 ? 1 : 4);
  }
};

template <class Lanes>
QUAMBA_INLINE Floats load_scaled(const Tensor& tensor, const Scale& scale, int64_t b, int64_t t, int64_t i,
                                 Lanes lanes) {
  const Floats value = load_values(tensor.row(b, t), tensor.int8, i, lanes);
  return scale.data == nullptr ? value : value * load_scale(scale, i, lanes);
}

struct Scan {
  const SelectiveScan& p;
  Tensor x, dt, B, C, z;

  explicit Scan(const SelectiveScan& params)
      : p(params),
        x{p.x, p.x_int8 != 0, p.x_batch_stride, p.x_stride},
        dt{p.dt, p.dt_int8 != 0, p.dt_batch_stride, p.dt_stride},
        B{p.B, p.B_int8 != 0, p.B_batch_stride, p.B_stride},
        C{p.C, p.C_int8 != 0, p.C_batch_stride, p.C_stride},
        z{p.z, p.z_int8 != 0, p.z_batch_stride, p.z_stride} {}

  // One token for the channels from d on, before the states: dt after the softplus, and dt x.
  template <class Lanes>
  __attribute__((always_inline)) void enter(int64_t b, int64_t t, int64_t d, Lanes lanes, Floats& step, Floats& value) const {
    step = softplus_of(load_scaled(dt, p.dt_scale, b, t, d, lanes) + load<Floats>(p.dt_bias + d, lanes));
    value = load_scaled(x, p.x_scale, b, t, d, lanes);
  }

  // After the states: skip, gate, and out.
  template <class Lanes>
  __attribute__((always_inline)) void leave(int64_t b, int64_t t, int64_t d, Lanes lanes, Floats y, Floats value) const {
    y += value * load<Floats>(p.D + d, lanes);
    if (p.z != nullptr) y *= silu_of(load_scaled(z, p.z_scale, b, t, d, lanes));
    const int64_t at = (b * p.length + t) * p.d_inner + d;
    if (p.out_scale.data != nullptr)
      store_bytes(static_cast<int8_t*>(p.out) + at, y / load_scale(p.out_scale, d, lanes), lanes);
    else
      store(static_cast<float*>(p.out) + at, y, lanes);
  }

  // kStates > 0: the number of states, kept in registers; 0: any number, kept in memory. `decays` is A log2(e) and
  // `state` the state, both (N, kLanes) for these channels; `gain` and `read` are B and C, (T, N) float32.
  template <int kStates, class Lanes>
  void run(int64_t b, int64_t begin, int64_t end, int64_t d, Lanes lanes, const float* decays, const float* gain,
           const float* read, float* state) const {
    const int64_t size = kStates > 0 ? kStates : p.d_state;
    constexpr int kRegisters = kStates > 0 ? kStates : 1;
    Floats states[kRegisters];
    if constexpr (kStates > 0)
      for (int n = 0; n < kStates; ++n) states[n] = load<Floats>(state + n * kLanes, Full{});
    for (int64_t t = begin; t < end; ++t, gain += size, read += size) {
      Floats step, value, y{};
      enter(b, t, d, lanes, step, value);
      const Floats input = step * value;
      if constexpr (kStates > 0) {
#pragma GCC unroll 16
        for (int n = 0; n < kStates; ++n) {
          const Floats decay = exp2_of(step * load<Floats>(decays + n * kLanes, Full{}));
          states[n] = decay * states[n] + input * gain[n];
          y += states[n] * read[n];
        }
      } else {
        for (int64_t n = 0; n < size; ++n) {
          const Floats decay = exp2_of(step * load<Floats>(decays + n * kLanes, Full{}));
          const Floats next = decay * load<Floats>(state + n * kLanes, Full{}) + input * gain[n];
          store(state + n * kLanes, next, Full{});
          y += next * read[n];
        }
      }
      leave(b, t, d, lanes, y, value);
    }
    if constexpr (kStates > 0)
      for (int n = 0; n < kStates; ++n) store(state + n * kLanes, states[n], Full{});
  }

  // Channels first .. last of one sequence; first is a multiple of kLanes.
  void channels(int64_t b, int64_t first, int64_t last) const {
    const int64_t size = p.d_state, groups = (last - first + kLanes - 1) / kLanes;
    Buffer<float> decays(groups * size * kLanes), states(groups * size * kLanes);
    Buffer<float> gain(kPiece * size), read(kPiece * size);
    const auto at = [=](int64_t d, int64_t n) { return ((d - first) / kLanes * size + n) * kLanes + (d - first) % kLanes; };
    for (int64_t d = first; d < first + groups * kLanes; ++d)
      for (int64_t n = 0; n < size; ++n) {
        decays[at(d, n)] = d < last ? p.A[d * size + n] * 1.44269504f : 0.0f;
        states[at(d, n)] = d < last && p.state != nullptr ? p.state[(b * p.d_inner + d) * size + n] : 0.0f;
      }
    for (int64_t begin = 0; begin < p.length; begin += kPiece) {
      const int64_t end = std::min(begin + kPiece, p.length);
      for (int64_t t = begin; t < end; ++t)
        for_vectors(size, [&](int64_t n, auto lanes) {
          store(gain + (t - begin) * size + n, load_scaled(B, p.B_scale, b, t, n, lanes), lanes);
          store(read + (t - begin) * size + n, load_scaled(C, p.C_scale, b, t, n, lanes), lanes);
        });
      for_vectors(last - first, [&](int64_t i, auto lanes) {
        float *rates = decays + i * size, *state = states + i * size;
        if (size == kGroupStates)
          run<kGroupStates>(b, begin, end, first + i, lanes, rates, gain, read, state);
        else
          run<0>(b, begin, end, first + i, lanes, rates, gain, read, state);
      });
    }
    if (p.state == nullptr) return;
    for (int64_t d = first; d < last; ++d)
      for (int64_t n = 0; n < size; ++n) p.state[(b * p.d_inner + d) * size + n] = states[at(d, n)];
  }
};

// Threads share the sequences' groups of channels.
static void selective_scan(const SelectiveScan& p) {
  constexpr int64_t kStatesPerThread = int64_t{1} << 19;
  const FlushDenormals flush;
  const Scan scan(p);
  const int64_t groups = (p.d_inner + kLanes - 1) / kLanes, units = p.batch * groups;
  const int64_t work = p.batch * p.length * p.d_inner * p.d_state;
  const int64_t parts = std::max<int64_t>(1, std::min({p.threads, work / kStatesPerThread, units}));
  parallel(parts, [&](int64_t part) {
    int64_t unit = units * part / parts;
    const int64_t end = units * (part + 1) / parts;
    while (unit < end) {
      const int64_t b = unit / groups, last = std::min(end, (b + 1) * groups);
      scan.channels(b, unit % groups * kLanes, std::min((last - b * groups) * kLanes, p.d_inner));
      unit = last;
    }
  });
}
