// Compiled once for each instruction set, with AWP_KERNELS naming the table. -ffp-contract=off: noise and projection
// are defined operation by operation.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "awp/perturb.h"
#include "awp/project.h"
#include "convert.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace awp::cpu {
namespace {

// Floats a tile: all buffers of a loop stay in the first-level cache.
constexpr int64_t kTile = 1024;

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

inline Double4 load_doubles(const float* values) {
  Float4 vector;
  memcpy(&vector, values, sizeof vector);
  return __builtin_convertvector(vector, Double4);
}

// Of vectors(i), the four values from i on, and of value(i) where less than 16 are left.
template <class Vectors, class Value>
double sum_of_squares_by(int64_t count, Vectors vectors, Value value) {
  Double4 sums[4] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int lane = 0; lane < 4; ++lane) {
      const Double4 vector = vectors(i + 4 * lane);
      sums[lane] += vector * vector;
    }
  }
  const Double4 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (; i < count; ++i) total += value(i) * value(i);
  return total;
}

double sum_of_squares(const float* values, int64_t count) {
  return sum_of_squares_by(
      count, [=](int64_t i) { return load_doubles(values + i); },
      [=](int64_t i) { return static_cast<double>(values[i]); });
}

double sum_of_squares(const void* values, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) return sum_of_squares(static_cast<const float*>(values), count);
  float buffer[kTile];
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t size = std::min(kTile, count - begin);
    total += sum_of_squares(as_floats(advance(values, dtype, begin), dtype, buffer, size), size);
  }
  return total;
}

// Products in fp64 are exact: 24 bits times 24 bits.
double sum_of_products_squared(const float* a, const float* b, int64_t count) {
  return sum_of_squares_by(
      count, [=](int64_t i) { return load_doubles(a + i) * load_doubles(b + i); },
      [=](int64_t i) { return static_cast<double>(a[i]) * b[i]; });
}

double sum_of_scaled_squares(const Perturb& p, const PerturbTensor& t, int64_t begin, int64_t count) {
  float weight_buffer[kTile], grad_buffer[kTile], factor[kTile];
  const float eta = p.eta;
  double total = 0;
  for (const int64_t end = begin + count; begin < end; begin += kTile) {
    const int64_t size = std::min(kTile, end - begin);
    const float* w = as_floats(advance(t.weight, p.weight_dtype, begin), p.weight_dtype, weight_buffer, size);
    const float* g = as_floats(advance(t.grad, p.grad_dtype, begin), p.grad_dtype, grad_buffer, size);
    for (int64_t i = 0; i < size; ++i) factor[i] = std::fabs(w[i]) + eta;
    total += sum_of_products_squared(factor, g, size);
  }
  return total;
}

// Past the caches: a saved copy is not read before a whole forward and backward pass has run.
void stream(void* destination, const void* source, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(destination) % 16 == 0) {
    const int64_t vectors = bytes / 16;
    for (int64_t i = 0; i < vectors; ++i) {
      _mm_stream_si128(static_cast<__m128i*>(destination) + i,
                       _mm_loadu_si128(static_cast<const __m128i*>(source) + i));
    }
    memcpy(static_cast<char*>(destination) + 16 * vectors, static_cast<const char*>(source) + 16 * vectors,
           bytes - 16 * vectors);
    return;
  }
#endif
  memcpy(destination, source, bytes);
}

void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// out = move(weight, grad), saved = weight.
template <class Move>
void perturb_by(const Perturb& p, const PerturbTensor& t, int64_t begin, int64_t count, Move move) {
  float weight_buffer[kTile], grad_buffer[kTile], out_buffer[kTile];
  for (const int64_t end = begin + count; begin < end; begin += kTile) {
    const int64_t size = std::min(kTile, end - begin);
    const void* weight = advance(t.weight, p.weight_dtype, begin);
    if (t.saved) stream(advance(t.saved, p.weight_dtype, begin), weight, size * size_of(p.weight_dtype));
    const float* w = as_floats(weight, p.weight_dtype, weight_buffer, size);
    const float* g = as_floats(advance(t.grad, p.grad_dtype, begin), p.grad_dtype, grad_buffer, size);
    void* target = advance(t.out, p.out_dtype, begin);
    float* sum = float_target(target, p.out_dtype, out_buffer);
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) sum[i] = move(w[i], g[i]);
    store_floats(target, p.out_dtype, sum, size);
  }
  if (t.saved) stream_end();
}

// Where no direction is followed: out = weight, to the bit where it is stored alike.
void keep(const Perturb& p, const PerturbTensor& t, int64_t begin, int64_t count) {
  if (p.out_dtype != p.weight_dtype) return perturb_by(p, t, begin, count, [](float w, float) { return w; });
  const void* weight = advance(t.weight, p.weight_dtype, begin);
  const int64_t bytes = count * size_of(p.weight_dtype);
  if (t.saved) {
    stream(advance(t.saved, p.weight_dtype, begin), weight, bytes);
    stream_end();
  }
  if (t.out != t.weight) memcpy(advance(t.out, p.out_dtype, begin), weight, bytes);
}

void perturb(const Perturb& p, const PerturbTensor& t, int64_t begin, int64_t count, float scale) {
  if (!is_followed(scale)) return keep(p, t, begin, count);
  const float eta = p.eta, bound = p.bound;
  const auto run = [&](auto move) {
    if (bound >= 0) {
      perturb_by(p, t, begin, count, [=](float w, float g) { return project_relative(move(w, g), w, bound); });
    } else {
      perturb_by(p, t, begin, count, move);
    }
  };
  if (is_adaptive(p, t)) {
    run([=](float w, float g) {
      const float factor = std::fabs(w) + eta;
      return multiply_add(scale * g * factor, factor, w);
    });
  } else {
    run([=](float w, float g) { return multiply_add(scale, g, w); });
  }
}

// One tile: w, buffer = step(g, w, buffer).
template <bool Momentum, bool Nesterov>
void sgd_tile(float* w, const float* grad, float* buffer, int64_t size, const SgdFactors& factors, float decay,
              float momentum) {
  const float scale = factors.grad, descent = factors.descent;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    float d = scale * grad[i];
    if (decay != 0.0f) d = multiply_add(decay, w[i], d);
    if constexpr (Momentum) {
      buffer[i] = multiply_add(momentum, buffer[i], d);
      d = Nesterov ? multiply_add(momentum, buffer[i], d) : buffer[i];
    }
    w[i] = multiply_add(descent, d, w[i]);
  }
}

double sgd_step(const SgdStep& step, const SgdTensor& tensor, const SgdFactors& factors, int64_t begin, int64_t count) {
  const SgdRule& rule = step.rule;
  const auto tile = tensor.buffer == nullptr ? sgd_tile<false, false>
                    : rule.nesterov          ? sgd_tile<true, true>
                                             : sgd_tile<true, false>;
  float grad_buffer[kTile];
  double total = 0;
  for (const int64_t end = begin + count; begin < end; begin += kTile) {
    const int64_t size = std::min(kTile, end - begin);
    float* w = tensor.weight + begin;
    void* out = tensor.out ? advance(tensor.out, step.out_dtype, begin) : nullptr;
    if (!factors.leave_out) {
      const float* grad = as_floats(advance(tensor.grad, step.grad_dtype, begin), step.grad_dtype, grad_buffer, size);
      tile(w, grad, tensor.buffer + (tensor.buffer ? begin : 0), size, factors, tensor.decay, rule.momentum);
      if (tensor.average) {
        float* average = tensor.average + begin;
        const float share = factors.average_weight;
#pragma GCC ivdep
        for (int64_t i = 0; i < size; ++i) average[i] = multiply_add(share, w[i] - average[i], average[i]);
      }
    }
    if (out && step.out_dtype == DType::kFloat32) memcpy(out, w, size * sizeof(float));
    if (out) store_floats(out, step.out_dtype, w, size);
    total += sum_of_squares(w, size);
  }
  return total;
}

void copy(void* destination, const void* source, int64_t bytes) { memcpy(destination, source, bytes); }

// Calls visit(logical index, memory index) for one sample, in logical order.
template <class Visit>
void for_each_element(const PgdInit& arguments, Visit visit) {
  if (arguments.dims == 0) {
    for (int64_t i = 0; i < arguments.elements; ++i) visit(i, i);
    return;
  }
  int64_t index[kMaxSampleDims] = {};
  int64_t offset = 0;
  for (int64_t i = 0; i < arguments.elements; ++i) {
    visit(i, offset);
    for (int32_t d = arguments.dims - 1; d >= 0; --d) {
      offset += arguments.strides[d];
      if (++index[d] < arguments.sizes[d]) break;
      offset -= arguments.strides[d] * arguments.sizes[d];
      index[d] = 0;
    }
  }
}

// One sample's clean values as floats, and the place for its result.
struct Sample {
  Sample(const PgdInit& arguments, int64_t sample)
      : buffer(arguments.elements),
        out_buffer(arguments.elements),
        target(advance(arguments.x_adv, arguments.dtype, sample * arguments.elements)) {
    const int64_t begin = sample * arguments.elements;
    x = as_floats(advance(arguments.x, arguments.dtype, begin), arguments.dtype, buffer.data(), arguments.elements);
    out = float_target(target, arguments.dtype, out_buffer.data());
  }
  std::vector<float> buffer, out_buffer;
  void* target;
  const float* x;
  float* out;
};

void pgd_init_linf(const PgdInit& arguments, int64_t sample) {
  Sample s(arguments, sample);
  const float unit = arguments.epsilon * 0x1p-24f;
  Words words;
  for_each_element(arguments, [&](int64_t i, int64_t place) {
    if (i % 4 == 0) {
      words =
          sample_words(static_cast<uint32_t>(i / 4), arguments.sample_ids[sample], arguments.seed, Stream::kUniform);
    }
    const float value = s.x[place] + uniform_integer(words.word[i % 4]) * unit;
    s.out[place] = project_linf(value, s.x[place], arguments.epsilon, 0.0f, 1.0f);
  });
  store_floats(s.target, arguments.dtype, s.out, arguments.elements);
}

void pgd_init_l2(const PgdInit& arguments, int64_t sample) {
  Sample s(arguments, sample);
  // two normals more than elements: the point on the larger sphere whose first coordinates fill the ball evenly
  const int64_t count = arguments.elements + 2;
  std::vector<float> z((count + 3) / 4 * 4);
  for (int64_t i = 0; i < count; i += 4) {
    normal_block(static_cast<uint32_t>(i / 4), arguments.sample_ids[sample], arguments.seed, &z[i]);
  }
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += square_fixed_point(z[i]);
  const float factor = static_cast<float>(arguments.radius / std::sqrt(static_cast<double>(total) * 0x1p-32));
  for_each_element(arguments,
                   [&](int64_t i, int64_t place) { s.out[place] = clamp(s.x[place] + z[i] * factor, 0.0f, 1.0f); });
  store_floats(s.target, arguments.dtype, s.out, arguments.elements);
}

void pgd_init_normal(const PgdInit& arguments, int64_t sample) {
  Sample s(arguments, sample);
  float z[4];
  for_each_element(arguments, [&](int64_t i, int64_t place) {
    if (i % 4 == 0) normal_block(static_cast<uint32_t>(i / 4), arguments.sample_ids[sample], arguments.seed, z);
    s.out[place] = s.x[place] + z[i % 4] * arguments.epsilon;
  });
  store_floats(s.target, arguments.dtype, s.out, arguments.elements);
}

// Tiles of a flat range of the batch as floats: current images, clean images, gradients (0 outside the mask).
struct Tiles {
  Tiles(const PgdStep& arguments, int64_t begin, int64_t count) : size(count) {
    current = as_floats(advance(arguments.x_adv, arguments.dtype, begin), arguments.dtype, current_buffer, count);
    clean = as_floats(advance(arguments.x, arguments.dtype, begin), arguments.dtype, clean_buffer, count);
    grad = as_floats(advance(arguments.grad, arguments.grad_dtype, begin), arguments.grad_dtype, grad_buffer, count);
    if (arguments.mask) {
      const uint8_t* mask = arguments.mask + begin;
      for (int64_t i = 0; i < count; ++i) grad_buffer[i] = mask[i] ? grad[i] : 0.0f;
      grad = grad_buffer;
    }
  }
  int64_t size;
  const float *current, *clean, *grad;
  float current_buffer[kTile], clean_buffer[kTile], grad_buffer[kTile], moved[kTile];
};

template <class Visit>
void for_each_tile(const PgdStep& arguments, int64_t begin, int64_t end, Visit visit) {
  for (; begin < end; begin += kTile) {
    Tiles tiles(arguments, begin, std::min(kTile, end - begin));
    visit(tiles, begin);
  }
}

void pgd_step_linf(const PgdStep& arguments, int64_t begin, int64_t end) {
  const float step = arguments.step, epsilon = arguments.epsilon, low = arguments.low, high = arguments.high;
  float out_buffer[kTile];
  for_each_tile(arguments, begin, end, [&](Tiles& tiles, int64_t at) {
    void* target = advance(arguments.x_adv, arguments.dtype, at);
    float* out = float_target(target, arguments.dtype, out_buffer);
    const float *current = tiles.current, *clean = tiles.clean, *grad = tiles.grad;
#pragma GCC ivdep
    for (int64_t i = 0; i < tiles.size; ++i) {
      const float sign = static_cast<float>((grad[i] > 0.0f) - (grad[i] < 0.0f));
      out[i] = project_linf(current[i] + step * sign, clean[i], epsilon, low, high);
    }
    store_floats(target, arguments.dtype, out, tiles.size);
  });
}

void move_l2(Tiles& tiles, double factor) {
  for (int64_t i = 0; i < tiles.size; ++i) {
    tiles.moved[i] = tiles.current[i] + static_cast<float>(factor * static_cast<double>(tiles.grad[i]));
  }
}

void pgd_step_l2(const PgdStep& arguments, int64_t sample) {
  const int64_t begin = sample * arguments.elements, end = begin + arguments.elements;
  double squares = 0;
  for_each_tile(arguments, begin, end,
                [&](Tiles& tiles, int64_t) { squares += sum_of_squares(tiles.grad, tiles.size); });
  const double norm = std::sqrt(squares);
  const bool usable = norm > 0 && std::isfinite(norm);
  const double factor = usable ? arguments.step_size / norm : 0.0;

  const auto move = [&](Tiles& tiles) {
    if (usable) {
      move_l2(tiles, factor);
    } else {
      memcpy(tiles.moved, tiles.current, tiles.size * sizeof(float));
    }
  };
  double distance = 0;
  for_each_tile(arguments, begin, end, [&](Tiles& tiles, int64_t) {
    move(tiles);
    float delta[kTile];
    for (int64_t i = 0; i < tiles.size; ++i) delta[i] = tiles.moved[i] - tiles.clean[i];
    distance += sum_of_squares(delta, tiles.size);
  });
  distance = std::sqrt(distance);
  const bool outside = distance > arguments.radius;
  const float shrink = outside ? static_cast<float>(arguments.radius / distance) : 1.0f;
  const float low = arguments.low, high = arguments.high;
  for_each_tile(arguments, begin, end, [&](Tiles& tiles, int64_t at) {
    move(tiles);
    for (int64_t i = 0; i < tiles.size; ++i) {
      const float inside = tiles.clean[i] + (tiles.moved[i] - tiles.clean[i]) * shrink;
      tiles.moved[i] = clamp(outside ? inside : tiles.moved[i], low, high);
    }
    void* target = advance(arguments.x_adv, arguments.dtype, at);
    if (arguments.dtype == DType::kFloat32) {
      memcpy(target, tiles.moved, tiles.size * sizeof(float));
    } else {
      store_floats(target, arguments.dtype, tiles.moved, tiles.size);
    }
  });
}

}  // namespace

const Kernels AWP_KERNELS = {
    AWP_INSTRUCTION_SET, sum_of_squares, sum_of_scaled_squares, perturb,       sgd_step,    copy,
    pgd_init_linf,       pgd_init_l2,    pgd_init_normal,       pgd_step_linf, pgd_step_l2,
};

}  // namespace awp::cpu
