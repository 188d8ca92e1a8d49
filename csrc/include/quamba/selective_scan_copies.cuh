// Where selective_scan_chunks keeps what in shared memory, and how its tiles get there and back.
#pragma once

#include "quamba/selective_scan.cuh"

namespace quamba {

constexpr int kScanSteps = 12;      // of a lane; three quads, whose float4 of neighbouring lanes share no banks
constexpr int kChunkThreads = 640;  // of a block, at most
constexpr int kChunkStates = 16;    // at most, and a multiple of 4

// Where the parts of a block's shared memory begin, in bytes. A tile is kept in pieces of kScanSteps rows, a lane's,
// with a gap between: lanes that read the same row of their pieces are on distinct banks.
template <int LANES>
struct ChunkLayout {
  static constexpr int kLength = LANES * kScanSteps;
  static constexpr int kPitch = kChunkThreads / LANES;     // elements from row to row: the most channels of a block
  static constexpr int kGap = LANES == 16 ? 8 : 4;         // between pieces: also the widest unit that can be copied
  static constexpr int kNarrow = 2 * kChunkStates * kLength * 4;  // B and C as floats, (states, time); two buffers
  static constexpr int kC = kNarrow / 2;
  static constexpr int kRows = kPitch * kChunkStates * 4;  // log2(e) A, and h: (channels, kChunkStates)
  static constexpr int kA = 2 * kNarrow, kH = kA + kRows;
  static constexpr int kScales = kH + kRows;  // of B and of C

  int x, dt, z, b, c;  // raw tiles, within one of two buffers
  int raw, buffer;     // where the buffers begin, size of one
  int out, out_bytes;  // two buffers of `out_bytes` each
  int tables;          // softplus and gate, (channels, 256) each
  int total;

  __host__ __device__ explicit ChunkLayout(const ScanParams& p) {
    x = 0, dt = tile(1), z = 2 * tile(1), b = 3 * tile(1);
    c = b + kChunkStates * kLength;
    buffer = c + kChunkStates * kLength;
    raw = kScales + 2 * kChunkStates * 4;
    out = raw + 2 * buffer;
    out_bytes = tile(size_of(p.out_type));
    tables = out + 2 * out_bytes;
    total = tables + p.block_channels * 2 * 256 * 4;
  }
  __host__ __device__ static constexpr int piece(int element) { return kScanSteps * kPitch * element + kGap; }
  __host__ __device__ static constexpr int tile(int element) { return (LANES * piece(element) + 15) / 16 * 16; }
};

// How the rows of a tensor are copied, in units of 8 or 4 bytes that all of them are aligned to. Strides in bytes.
struct ChunkCopy {
  char* memory = nullptr;
  int64_t batch, block, chunk, row;
  int units, limit, unit;  // of a row of a block, of a row in memory; bytes of one
  int magic, step;         // thread i copies unit i % units of every step-th row from (i * magic >> 20) = i / units on
  int tile, pitch, gap;    // the tile's place, bytes from row to row, bytes between pieces of kScanSteps rows
  int ahead;               // how many chunks before its use by the states the copy is asked for
};

// The copies into shared memory are dealt to the warps, where there are as many: so a thread prepares one of them only.
struct ChunkCopies {
  static constexpr int kInputs = 5, kFirstNarrow = 3;
  ChunkCopy in[kInputs];  // x, dt, z, B, C
  ChunkCopy out;
  bool dealt;

  template <typename Layout>
  ChunkCopies(const ScanParams& p, const Layout& at, int threads) : dealt(threads / 32 >= kInputs) {
    const Sequence* inputs[kInputs] = {&p.x, &p.dt, &p.z, &p.B, &p.C};
    const int tiles[kInputs] = {at.x, at.dt, at.z, at.b, at.c};
    for (int i = 0; i < kInputs; ++i) {
      const int among = dealt ? (threads / 32 - i + kInputs - 1) / kInputs * 32 : threads;
      in[i] = copy_of<Layout>(p, *inputs[i], tiles[i], i < kFirstNarrow, among);
    }
    out = copy_of<Layout>(p, {p.out, p.out_type, p.length * p.channels, p.channels, 1, {}}, 0, true, threads);
  }

 private:
  template <typename Layout>
  static ChunkCopy copy_of(const ScanParams& p, const Sequence& s, int tile, bool wide, int threads) {
    const int size = size_of(s.type), columns = wide ? p.block_channels : p.states, bytes = columns * size;
    const int64_t row_bytes = wide ? p.channels * size : bytes;
    const int64_t places = reinterpret_cast<int64_t>(s.data) | s.batch * size | s.time * size | bytes | row_bytes;
    const bool pairs = places % 8 == 0;
    ChunkCopy c;
    c.memory = const_cast<char*>(static_cast<const char*>(s.data));
    c.unit = pairs && (!wide || Layout::kGap == 8) ? 8 : 4;
    c.units = bytes / c.unit, c.limit = static_cast<int>(row_bytes / c.unit);
    c.batch = s.batch * size, c.block = wide ? bytes : 0, c.chunk = Layout::kLength * s.time * size;
    c.row = s.time * size;
    c.magic = (1 << 20) / c.units + 1, c.step = threads / c.units;
    if (c.step > kScanSteps) c.step -= c.step % kScanSteps;
    c.tile = tile, c.pitch = (wide ? Layout::kPitch : columns) * size, c.gap = wide ? Layout::kGap : 0;
    c.ahead = wide ? 1 : 2;
    return c;
  }
};

// Calls f(offset in the tile, address) for what thread `index` copies of the `rows` rows of a chunk.
template <typename F>
__device__ __forceinline__ void each_unit(const ChunkCopy& copy, int index, int chunk, int rows, F&& f) {
  const int t0 = static_cast<int>(static_cast<unsigned>(index) * static_cast<unsigned>(copy.magic) >> 20);
  const int u = index - t0 * copy.units;
  if (t0 >= copy.step || (copy.block != 0 ? static_cast<int>(blockIdx.x) * copy.units : 0) + u >= copy.limit) return;
  char* address = copy.memory + blockIdx.y * copy.batch + blockIdx.x * copy.block + chunk * copy.chunk +
                  t0 * copy.row + u * copy.unit;
  const int64_t stride = copy.step * copy.row;
  int offset = u * copy.unit + t0 * copy.pitch;
  if (copy.gap == 0 || copy.step % kScanSteps == 0) {
    offset += t0 / kScanSteps * copy.gap;
    const int shared_stride = copy.step * copy.pitch + copy.step / kScanSteps * copy.gap;
#pragma unroll 4
    for (int t = t0; t < rows; t += copy.step, address += stride, offset += shared_stride) f(offset, address);
  } else {
#pragma unroll 1
    for (int t = t0; t < rows; t += copy.step, address += stride, offset += copy.step * copy.pitch)
      f(offset + t / kScanSteps * copy.gap, address);
  }
}

}  // namespace quamba
