// Uninitialised memory for one call, aligned to a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace quamba::cpu {

template <class Value>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<Value*>(::operator new(static_cast<size_t>(count) * sizeof(Value), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator Value*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  Value* data_;
};

}  // namespace quamba::cpu
