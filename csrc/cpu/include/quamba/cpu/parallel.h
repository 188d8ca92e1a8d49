// A few threads for one call, and scratch memory that a thread keeps. Included like simd.h.

// body(part) for part in [0, parts), each on a thread of its own, the last on the caller's. What a part throws on
// another thread would end the process: parts only compute.
template <class Body>
static void parallel(int64_t parts, const Body& body) {
  std::vector<std::thread> threads;
  struct Joiner {
    std::vector<std::thread>& threads;
    ~Joiner() {
      for (auto& thread : threads) thread.join();
    }
  } joiner{threads};
  for (int64_t part = 0; part + 1 < parts; ++part) threads.emplace_back([&body, part] { body(part); });
  body(parts > 0 ? parts - 1 : 0);
}

// Results below 1e-38 become 0 while it lives: a decaying state would otherwise reach denormal numbers, which
// cost a hundred cycles each.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
#endif
};
