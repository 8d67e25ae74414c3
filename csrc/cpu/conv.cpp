// Cuts the convolutions into pieces for the threads. A sum is added up in one order, whoever does it.
#include "awp/conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "processor.h"
#include "stem.h"
#include "tasks.h"
#include "winograd.h"

namespace awp::cpu {
namespace {

constexpr int64_t kLine = 16;  // floats
// Bytes. Transformed weights larger than this are written past the caches,
constexpr int64_t kStreamed = int64_t{8} << 20;
// and larger than this they are read once a call if possible, not once a block of tiles.
constexpr int64_t kReadOnce = int64_t{12} << 20;
// Floats. Transformed tiles that all threads share, so that they stay in the third-level cache.
constexpr int64_t kShared = int64_t{2} << 20;
// Gradients of weights with sums of up to so many floats, over at least so many tiles, are added up by slices of the
// tiles; their number does not depend on that of the threads, so that sums do not.
constexpr int64_t kOwnSums = int64_t{640} << 10, kSliced = 512, kSlices = 16;
// Tiles a thread transforms at a time, and tiles it multiplies at a time where they are shared.
constexpr int64_t kPiece = 8, kStrip = 64;

const Winograd* winograd() {
#if defined(AWP_HAVE_AVX2)
  static const Winograd* chosen = widest(&kAvx2Winograd, &kAvx512Winograd, &kAvx512Bf16Winograd);
  return chosen;
#else
  return nullptr;
#endif
}

const Products& products_of(DType dtype) { return dtype == DType::kFloat32 ? winograd()->fp32 : winograd()->bf16; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

int64_t count_tiles(const Images& images) {
  return images.samples * divide_up(images.height, 4) * divide_up(images.width, 4);
}

// Memory that a thread keeps from call to call.
class Scratch {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, round_up(floats, kLine) * sizeof(float))));
      size_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

thread_local Scratch shared_scratch;  // of the calling thread, read by all
thread_local Scratch own_scratch;

Tiles tiles_in(float* values, int64_t channels, int64_t tiles, DType dtype = DType::kFloat32) {
  const int64_t lanes = winograd()->lanes;
  // a line more, so that the 36 positions do not fall into one set of the cache
  return {values, round_up(channels, lanes) * tiles + kLine * 4 / size_of(dtype), tiles};
}

// Floats that tiles of all positions take.
int64_t size_in_floats(const Tiles& tiles, DType dtype = DType::kFloat32) {
  return kPositions * tiles.stride * size_of(dtype) / int64_t{sizeof(float)};
}

int64_t panels_of(int64_t outputs) { return divide_up(outputs, 2 * winograd()->lanes); }

// Scratch for `output` on so many tiles.
int64_t products_size(int64_t tiles) { return kPositions * (tiles * 2 * winograd()->lanes + kLine); }

// Equal parts of the tiles, of `room` or fewer; at least a strip, however many channels there are.
int64_t share(int64_t tiles, int64_t room) { return divide_up(tiles, divide_up(tiles, std::max(room, kStrip))); }

}  // namespace

bool conv3x3_available() { return winograd() != nullptr; }

bool conv3x3_multiplies(DType dtype) { return conv3x3_available() && products_of(dtype).output != nullptr; }

int64_t conv3x3_transformed_size(int64_t outputs, int64_t inputs, DType dtype) {
  return panels_of(outputs) * 2 * winograd()->lanes * kPositions * round_up(inputs, products_of(dtype).together);
}

void conv3x3_transform(const Filters& weights, bool transposed, const Transformed& transformed,
                       const ParallelFor& parallel_for) {
  const int64_t outputs = transposed ? weights.inputs : weights.outputs;
  const int64_t inputs = transposed ? weights.outputs : weights.inputs;
  // what the caches would not keep goes past them
  const DType dtype = transformed.dtype;
  const bool stream = conv3x3_transformed_size(outputs, inputs, dtype) * size_of(dtype) > kStreamed;
  parallel_for(panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
    products_of(dtype).weights(weights, transposed, transformed.data, stream, begin, end);
  });
}

namespace {

// One-to-one in the word and in the hash, so that no single word can change unseen.
inline uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash << 27 | hash >> 37;
}

uint64_t hash_of(const char* data, int64_t bytes) {
  constexpr int64_t kLanes = 8;  // chains that do not wait for one another
  uint64_t lanes[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8}, words[kLanes];
  int64_t at = 0;
  for (; at + int64_t{sizeof(words)} <= bytes; at += sizeof(words)) {
    memcpy(words, data + at, sizeof(words));
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = mixed(lanes[lane], words[lane]);
  }
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (uint64_t lane : lanes) hash = mixed(hash, lane);
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    memcpy(&word, data + at, std::min<int64_t>(8, bytes - at));
    hash = mixed(hash, word);
  }
  return hash;
}

}  // namespace

uint64_t fingerprint(const void* data, int64_t bytes, const ParallelFor& parallel_for) {
  constexpr int64_t kPart = 1 << 16;
  const int64_t parts = divide_up(bytes, kPart);
  std::vector<uint64_t> hashes(parts);
  for_each_task(parts, parallel_for, [&](int64_t part) {
    const int64_t begin = part * kPart;
    hashes[part] = hash_of(static_cast<const char*>(data) + begin, std::min(kPart, bytes - begin));
  });
  return hash_of(reinterpret_cast<const char*>(hashes.data()), parts * 8);
}

void conv3x3(const Images& x, const Transformed& transformed, const Images& y, const ParallelFor& parallel_for) {
  const DType dtype = transformed.dtype;
  const Products& products = products_of(dtype);
  const int64_t tiles = count_tiles(x), panels = panels_of(y.channels);
  const int64_t zeros_size = round_up(x.channels, kLine);
  const int64_t local = products.block,
                bytes = conv3x3_transformed_size(y.channels, x.channels, dtype) * size_of(dtype);
  if (bytes <= kReadOnce && tiles >= 2 * local) {
    // each thread transforms a block of tiles into its second-level cache and takes it through all panels
    const int64_t blocks = divide_up(tiles, local);
    for_each_task(blocks, parallel_for, [&](int64_t block) {
      const int64_t first = block * local, count = std::min(local, tiles - first);
      const int64_t size = size_in_floats(tiles_in(nullptr, x.channels, count, dtype), dtype);
      float* scratch = own_scratch.at_least(zeros_size + size + products_size(count));
      std::fill_n(scratch, zeros_size, 0.0f);
      const Tiles from = tiles_in(scratch + zeros_size, x.channels, count, dtype);
      products.input(x, first, count, scratch, from, 0);
      for (int64_t panel = 0; panel < panels; ++panel) {
        products.output(from, transformed.data, panel, x.channels, y, first, count, scratch + zeros_size + size);
      }
    });
    return;
  }
  // all threads transform some tiles, then each takes panels of the weights, which are read once
  const int64_t size = share(tiles, 2 * kShared / (kPositions * round_up(x.channels, winograd()->lanes)));
  float* scratch =
      shared_scratch.at_least(zeros_size + size_in_floats(tiles_in(nullptr, x.channels, size, dtype), dtype));
  std::fill_n(scratch, zeros_size, 0.0f);
  const Tiles from = tiles_in(scratch + zeros_size, x.channels, size, dtype);
  for (int64_t first = 0; first < tiles; first += size) {
    const int64_t count = std::min(size, tiles - first), strips = divide_up(count, kStrip);
    for_each_task(divide_up(count, kPiece), parallel_for, [&](int64_t piece) {
      const int64_t at = piece * kPiece;
      products.input(x, first + at, std::min(kPiece, count - at), scratch, from, at);
    });
    for_each_task(panels * strips, parallel_for, [&](int64_t task) {
      const int64_t at = task % strips * kStrip, some = std::min(kStrip, count - at);
      const Tiles strip{static_cast<char*>(from.values) + at * winograd()->lanes * size_of(dtype), from.stride,
                        from.tiles};
      products.output(strip, transformed.data, task / strips, x.channels, y, first + at, some,
                      own_scratch.at_least(products_size(kStrip)));
    });
  }
}

namespace {

// Floats that the products of so many channels take.
int64_t sums_size(int64_t outputs, int64_t inputs) {
  const int64_t lanes = winograd()->lanes;
  return kPositions * (round_up(outputs, lanes) * round_up(inputs, lanes) + kLine);
}

// Each thread takes slices of the tiles and adds them up in memory of its own: two parallel regions in all.
void grad_weight_by_slices(const Images& x, const Images& grad_y, float* grad_weight, const ParallelFor& parallel_for) {
  const int64_t tiles = count_tiles(x), channels = std::max(x.channels, grad_y.channels);
  const int64_t slices = std::min(kSlices, divide_up(tiles, kStrip)), size = divide_up(tiles, slices);
  const int64_t zeros_size = round_up(channels, kLine), weights = grad_y.channels * 9 * x.channels;
  float* parts = shared_scratch.at_least(slices * weights);
  for_each_task(slices, parallel_for, [&](int64_t slice) {
    const Tiles x_layout = tiles_in(nullptr, x.channels, kStrip),
                grad_layout = tiles_in(nullptr, grad_y.channels, kStrip);
    const int64_t x_size = size_in_floats(x_layout), grad_size = size_in_floats(grad_layout);
    float* zeros = own_scratch.at_least(zeros_size + x_size + grad_size + sums_size(grad_y.channels, x.channels));
    std::fill_n(zeros, zeros_size, 0.0f);
    const Tiles x_tiles{zeros + zeros_size, x_layout.stride, kStrip};
    const Tiles grad_tiles{zeros + zeros_size + x_size, grad_layout.stride, kStrip};
    float* sums = zeros + zeros_size + x_size + grad_size;
    const int64_t begin = slice * size, end = std::min(tiles, begin + size);
    float* part = parts + slice * weights;
    if (begin >= end) {
      std::fill_n(part, weights, 0.0f);
      return;
    }
    for (int64_t first = begin; first < end; first += kStrip) {
      const int64_t count = std::min(kStrip, end - first);
      winograd()->fp32.input(x, first, count, zeros, x_tiles, 0);
      winograd()->grad_output(grad_y, first, count, zeros, grad_tiles, 0);
      winograd()->grad_products(x_tiles, grad_tiles, count, 0, grad_y.channels, 0, x.channels, first > begin, sums);
    }
    const Filters grad{part, DType::kFloat32, grad_y.channels, x.channels, {}};
    winograd()->grad_weight(sums, 0, grad_y.channels, 0, x.channels, false, grad);
  });
  parallel_for(weights, 4096, [&](int64_t begin, int64_t end) {
    std::copy(parts + begin, parts + end, grad_weight + begin);
    for (int64_t slice = 1; slice < slices; ++slice) {
      const float* part = parts + slice * weights;
      for (int64_t i = begin; i < end; ++i) grad_weight[i] += part[i];
    }
  });
}

}  // namespace

void conv3x3_grad_weight(const Images& x, const Images& grad_y, float* grad_weight, const ParallelFor& parallel_for) {
  const int64_t lanes = winograd()->lanes, tiles = count_tiles(x);
  if (sums_size(grad_y.channels, x.channels) <= kOwnSums && tiles >= kSliced) {
    return grad_weight_by_slices(x, grad_y, grad_weight, parallel_for);
  }
  const int64_t channels = round_up(x.channels, lanes) + round_up(grad_y.channels, lanes);
  const int64_t zeros_size = round_up(std::max(x.channels, grad_y.channels), kLine);
  const int64_t size = share(tiles, kShared / (kPositions * channels));
  const Tiles x_layout = tiles_in(nullptr, x.channels, size), grad_layout = tiles_in(nullptr, grad_y.channels, size);
  const int64_t x_size = size_in_floats(x_layout);
  float* scratch = shared_scratch.at_least(zeros_size + x_size + size_in_floats(grad_layout));
  std::fill_n(scratch, zeros_size, 0.0f);
  const Tiles x_tiles{scratch + zeros_size, x_layout.stride, size};
  const Tiles grad_tiles{scratch + zeros_size + x_size, grad_layout.stride, size};
  const Filters grad{grad_weight, DType::kFloat32, grad_y.channels, x.channels, {}};

  const int64_t block = 2 * lanes;
  const int64_t columns = divide_up(x.channels, block), rows = divide_up(grad_y.channels, block);
  for (int64_t first = 0; first < tiles; first += size) {
    const int64_t count = std::min(size, tiles - first);
    for_each_task(divide_up(count, kPiece), parallel_for, [&](int64_t piece) {
      const int64_t at = piece * kPiece, some = std::min(kPiece, count - at);
      winograd()->fp32.input(x, first + at, some, scratch, x_tiles, at);
      winograd()->grad_output(grad_y, first + at, some, scratch, grad_tiles, at);
    });
    for_each_task(rows * columns, parallel_for, [&](int64_t task) {
      const int64_t output = task / columns * block, input = task % columns * block;
      const int64_t outputs = std::min(block, grad_y.channels - output), inputs = std::min(block, x.channels - input);
      float* sums = own_scratch.at_least(sums_size(block, block));
      winograd()->grad_products(x_tiles, grad_tiles, count, output, outputs, input, inputs, false, sums);
      winograd()->grad_weight(sums, output, outputs, input, inputs, first > 0, grad);
    });
  }
}

namespace {

const Stem* stem() {
#if defined(AWP_HAVE_AVX2)
  static const Stem* chosen = widest(&kAvx2Stem, &kAvx512Stem, &kAvx512Bf16Stem);
  return chosen;
#else
  return nullptr;
#endif
}

// Some rows at a time, so that a piece is worth handing out.
template <class Task>
void for_each_row(const Images& images, const ParallelFor& parallel_for, const Task& task) {
  constexpr int64_t kTogether = 8;
  const int64_t rows = images.samples * images.height;
  for_each_task(divide_up(rows, kTogether), parallel_for, [&](int64_t piece) {
    const int64_t last = std::min(rows, (piece + 1) * kTogether);
    for (int64_t row = piece * kTogether; row < last; ++row) task(row / images.height, row % images.height);
  });
}

}  // namespace

void stem3x3(const Images& x, const float* weights, const Images& y, const ParallelFor& parallel_for) {
  for_each_row(y, parallel_for, [&](int64_t sample, int64_t row) {
    stem()->row(x, weights, y, sample, row, own_scratch.at_least(stem()->scratch(x)));
  });
}

void stem3x3_grad_x(const Images& grad_y, const float* weights, const Images& grad_x, const ParallelFor& parallel_for) {
  const std::vector<float> zeros(grad_y.channels);
  for_each_row(grad_x, parallel_for, [&](int64_t sample, int64_t row) {
    stem()->grad_row(grad_y, weights, grad_x, sample, row, zeros.data());
  });
}

}  // namespace awp::cpu
