// The CUDA kernels, run by the emulator, against plain loops that follow docs/areas/operations.md.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "awp/cuda.h"
#include "awp/project.h"
#include "awp/sgd.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "plan.h"

namespace {

using namespace awp;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
std::mt19937_64 generator(1);
std::string test;

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    if (!(condition)) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, test.c_str(), #condition); \
      std::exit(1);                                                                          \
    }                                                                                        \
  } while (false)

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// An array that begins `shift` elements behind a 16-byte boundary and ends where the address sanitizer's red zone
// begins.
class Array {
 public:
  Array(DType dtype, int64_t count, int64_t shift = 0)
      : dtype_(dtype), count_(count), bytes_((shift + count) * size_of(dtype)), shift_(shift * size_of(dtype)) {
    data_ = static_cast<char*>(std::malloc(static_cast<size_t>(bytes_)));
    CHECK(reinterpret_cast<uintptr_t>(data_) % 16 == 0);
    memset(data_, 0x5A, static_cast<size_t>(bytes_));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
    for (int64_t i = 0; i < shift_; ++i) CHECK(data_[i] == 0x5A);
    std::free(data_);
  }
  char* data() const { return data_ + shift_; }
  int64_t bytes() const { return bytes_ - shift_; }
  int64_t count() const { return count_; }
  uint32_t bits(int64_t i) const {
    uint32_t value = 0;
    memcpy(&value, data() + i * size_of(dtype_), static_cast<size_t>(size_of(dtype_)));
    return value;
  }
  float get(int64_t i) const {
    if (dtype_ == DType::kFloat16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits(i))));
    if (dtype_ == DType::kBFloat16) return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits(i))));
    return bits_to_float(static_cast<int32_t>(bits(i)));
  }
  void set(int64_t i, float value) {
    uint32_t word = static_cast<uint32_t>(float_to_bits(value));
    if (dtype_ == DType::kFloat16) word = __half_as_ushort(__float2half_rn(value));
    if (dtype_ == DType::kBFloat16) word = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    memcpy(data() + i * size_of(dtype_), &word, static_cast<size_t>(size_of(dtype_)));
  }
  void fill(double low, double high) {
    for (int64_t i = 0; i < count_; ++i) set(i, static_cast<float>(uniform(low, high)));
  }
  void copy(const Array& other) { memcpy(data(), other.data(), static_cast<size_t>(bytes())); }
  // What a value becomes when it is stored here.
  uint32_t stored(float value) const {
    Array one(dtype_, 1);
    one.set(0, value);
    return one.bits(0);
  }

 private:
  DType dtype_;
  int64_t count_, bytes_, shift_;
  char* data_;
};

template <int N, int M>
void check_walk() {
  for (const int size : {32, 256, 512}) {
    for (int64_t length = 0; length < 3 * int64_t{N} * M * size; length += length < 100 ? 1 : integer(1, 200)) {
      for (const bool wide : {false, true}) {
        std::vector<int> visits(static_cast<size_t>(length));
        for (int rank = 0; rank < size; ++rank) {
          cuda::walk<N, M>(length, wide, rank, size, [&](auto pack, auto unroll, int64_t first, int64_t step) {
            for (int m = 0; m < unroll(); ++m) {
              const int64_t at = first + m * step;
              CHECK(at % pack() == 0 && at + pack() <= length && (wide || pack() == 1));
              for (int i = 0; i < pack(); ++i) ++visits[static_cast<size_t>(at + i)];
            }
          });
        }
        CHECK(std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; }));
      }
    }
  }
}

void check_long_walk() {
  const int64_t length = (int64_t{1} << 33) + 5;
  int64_t seen = 0, last = 0;
  for (const int rank : {0, 255}) {
    cuda::walk<8, 2>(length, true, rank, 256, [&](auto pack, auto unroll, int64_t first, int64_t step) {
      CHECK(first >= last || pack() == 1);
      last = first + (unroll() - 1) * step;
      CHECK(last + pack() <= length);
      seen += pack() * unroll();
    });
    last = 0;
  }
  CHECK(seen == 2 * (length / 8 / 256 * 8) + 1);  // of the tail of 5, thread 0 takes one
}

std::vector<PerturbTensor> random_tensors(int64_t count, int64_t largest) {
  std::vector<PerturbTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t run = integer(0, 9) == 0 ? 0 : static_cast<int64_t>(std::exp(uniform(0, std::log(double(largest)))));
    const int64_t filters = integer(0, 9) == 0 ? 0 : integer(1, 700);
    tensors.push_back({nullptr, nullptr, nullptr, nullptr, run * filters, filters});
  }
  return tensors;
}

void check_plan(int64_t count, int64_t largest) {
  const auto tensors = random_tensors(count, largest);
  Perturb p{tensors.data(), count, {}, {}, {}, Scope::kLayer, Scale::kRelative, 0, 0, 0, -1, nullptr};
  const int64_t chunk = cuda::chunk_elements(p);
  CHECK(chunk % cuda::kChunkUnit == 0);
  CHECK(cuda::total_chunks(p, chunk) <= cuda::kChunks + count);
  cuda::PerturbTable table;
  int64_t total = 0;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = cuda::fill_chunks(&table, p, begin, chunk);
    CHECK(end == std::min(count, begin + cuda::kPerturbCapacity) && table.count == end - begin);
    int block = 0;
    for (int64_t i = begin; i < end; ++i) {
      int64_t covered = 0;
      do {
        const int entry = cuda::find_entry(table.first_block, table.count, block);
        CHECK(entry == i - begin && table.first_scale[entry] == i - begin);
        CHECK((block - table.first_block[entry]) * chunk == covered);
        covered += chunk;
        ++block;
      } while (covered < tensors[static_cast<size_t>(i)].numel);
    }
    CHECK(block == table.blocks);
    total += table.blocks;
    begin = end;
  }
  CHECK(total == cuda::total_chunks(p, chunk));
  CHECK(cuda::perturb_workspace_bytes(p) == total * 16);

  p.scope = Scope::kFilter;
  int64_t scale = 0;
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = cuda::fill_filters(&table, p, begin);
    CHECK(end > begin);
    int block = 0, local_scale = 0;
    for (int64_t i = begin, entry = 0; i < end; ++i) {
      const PerturbTensor& t = tensors[static_cast<size_t>(i)];
      if (t.filters == 0) continue;
      CHECK(table.run[entry] * t.filters == t.numel && table.filters[entry] == t.filters);
      CHECK(table.first_scale[entry] == local_scale);
      const int64_t step = table.run[entry] > cuda::kShortFilter ? 1 : cuda::kWarps;
      for (int64_t filter = 0; filter < t.filters; filter += step) {
        CHECK(cuda::find_entry(table.first_block, table.count, block++) == entry);
      }
      local_scale += static_cast<int>(t.filters);
      ++entry;
    }
    CHECK(block == table.blocks && local_scale == table.scales);
    scale += local_scale;
    begin = end;
  }
  int64_t filters = 0;
  for (const auto& t : tensors) filters += t.filters;
  CHECK(scale == filters);
}

struct Shape {
  int64_t filters, run;
  int64_t shift = 0;
};

struct Case {
  Scope scope;
  DType out, weight, grad;
  bool in_place = false, save = true;
  Scale scale = Scale::kRelative;
  float eta = 0, bound = -1;
  bool norms = false;  // ||w|| is given
  bool spoil = false;  // the last gradient of every other tensor is infinite, and the weight beside it odd
};

// Where a direction is not followed w is kept: every bit, in its own dtype.
void spoil_last(Array& weight, Array& grad) {
  const int64_t last = weight.count() - 1;
  grad.set(last, -std::numeric_limits<float>::infinity());
  weight.set(last, -0.0f);
  if (last < 1) return;
  weight.set(last - 1, std::numeric_limits<float>::quiet_NaN());
  weight.data()[(last - 1) * weight.bytes() / weight.count()] ^= 5;  // a payload
}

void check_perturb(const Case& c, const std::vector<Shape>& shapes) {
  std::vector<std::unique_ptr<Array>> out, weight, original, grad, saved;
  std::vector<PerturbTensor> tensors;
  int64_t scale_count = 0;
  for (const Shape& shape : shapes) {
    const int64_t numel = shape.filters * shape.run;
    weight.push_back(std::make_unique<Array>(c.weight, numel, shape.shift));
    original.push_back(std::make_unique<Array>(c.weight, numel));
    out.push_back(std::make_unique<Array>(c.out, numel, shape.shift));
    grad.push_back(std::make_unique<Array>(c.grad, numel, shape.shift));
    saved.push_back(std::make_unique<Array>(c.weight, numel, shape.shift));
    weight.back()->fill(-1, 1);
    grad.back()->fill(-1e-3, 1e-3);
    if (numel > 7) weight.back()->set(numel - 1, std::numeric_limits<float>::denorm_min());
    if (c.spoil && numel > 0 && tensors.size() % 2 == 1) spoil_last(*weight.back(), *grad.back());
    original.back()->copy(*weight.back());
    tensors.push_back({c.in_place ? weight.back()->data() : out.back()->data(), weight.back()->data(),
                       grad.back()->data(), c.save ? saved.back()->data() : nullptr, numel, shape.filters,
                       tensors.size() % 3 != 1});
    scale_count += shape.filters;
  }
  const int64_t count = static_cast<int64_t>(shapes.size());
  if (c.scope == Scope::kLayer) scale_count = count;
  if (c.scope == Scope::kGlobal) scale_count = 1;
  Array scales(DType::kFloat32, scale_count);
  const double gamma = 0.01, eps = 1e-20;
  Perturb p{tensors.data(), count, c.out, c.weight, c.grad,  c.scope,
            c.scale,        gamma, eps,   c.eta,    c.bound, reinterpret_cast<float*>(scales.data())};
  std::vector<double> norms;
  for (const auto& w : original) {
    double squares = 0;
    for (int64_t i = 0; i < w->count(); ++i) squares += double{w->get(i)} * w->get(i);
    norms.push_back(std::sqrt(squares));
  }
  if (c.norms) p.weight_norms = norms.data();
  Array workspace(DType::kFloat32, cuda::perturb_workspace_bytes(p) / 4);
  emulator::launches = 0;
  CHECK(cuda::perturb(p, workspace.data(), nullptr) == cudaSuccess);
  const int tables = static_cast<int>((count + cuda::kPerturbCapacity - 1) / cuda::kPerturbCapacity);
  CHECK(emulator::launches == tables * (c.scope == Scope::kFilter ? 1 : 2));

  const auto is_scaled = [&](size_t t) { return c.scale == Scale::kElementwise && tensors[t].adaptive; };
  const auto factor = [&](size_t t, int64_t i) { return std::abs(original[t]->get(i)) + c.eta; };
  const auto weight_squares = [&](size_t t, int64_t begin, int64_t end) {
    long double sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += static_cast<long double>(original[t]->get(i)) * original[t]->get(i);
    return sum;
  };
  const auto grad_squares = [&](size_t t, int64_t begin, int64_t end) {
    long double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const long double value = static_cast<long double>(grad[t]->get(i)) * (is_scaled(t) ? factor(t, i) : 1.0f);
      sum += value * value;
    }
    return sum;
  };
  long double all_weight = 0, all_grad = 0;
  for (size_t t = 0; t < shapes.size(); ++t) {
    all_weight += weight_squares(t, 0, original[t]->count());
    all_grad += grad_squares(t, 0, grad[t]->count());
  }
  int64_t at = 0;
  for (size_t t = 0; t < shapes.size(); ++t) {
    const int64_t numel = original[t]->count();
    const int64_t runs = c.scope == Scope::kFilter ? shapes[t].filters : 1;
    for (int64_t k = 0; k < runs; ++k) {
      const int64_t begin = numel / runs * k, end = numel / runs * (k + 1);
      const bool global = c.scope == Scope::kGlobal;
      const long double w = global ? all_weight : weight_squares(t, begin, end);
      const long double g = global ? all_grad : grad_squares(t, begin, end);
      const double length = c.scale == Scale::kRelative ? std::sqrt(static_cast<double>(w)) : 1.0;
      const double expected = gamma * length / (std::sqrt(static_cast<double>(g)) + eps);
      const float scale = scales.get(global ? 0 : at++);
      const bool followed = (c.scale != Scale::kRelative || w < INFINITY) && g < INFINITY;
      CHECK(followed ? std::abs(scale - expected) <= 6e-8 * expected : std::isnan(scale));
      for (int64_t i = begin; i < end; ++i) {
        const Array& result = c.in_place ? *weight[t] : *out[t];
        const float before = original[t]->get(i), step = grad[t]->get(i);
        float moved = std::fmaf(scale, step, before);
        if (is_scaled(t)) moved = std::fmaf(scale * step * factor(t, i), factor(t, i), before);
        if (c.bound >= 0) moved = project_relative(moved, before, c.bound);
        if (!followed) moved = before;
        CHECK(result.bits(i) == (!followed && c.out == c.weight ? original[t]->bits(i) : result.stored(moved)));
        CHECK(!followed || !(c.bound >= 0) ||
              std::abs(double{moved} - before) <= double{c.bound} * std::abs(double{before}));
        if (c.save) CHECK(saved[t]->bits(i) == original[t]->bits(i));
        if (!c.in_place) CHECK(weight[t]->bits(i) == original[t]->bits(i));
      }
    }
  }
}

struct SgdCase {
  DType grad;
  bool momentum, average;
  int out = -1;  // a dtype, or none
  bool nesterov = false, found_inf = false;
  double grad_norm = 0, max_norm = -1;
  NumberType number = NumberType::kFloat32;
};

// A step, taken where the numbers lie in memory, and taken where the host knows them.
void check_sgd(const SgdCase& c, const std::vector<Shape>& shapes) {
  const DType kind = c.out < 0 ? DType::kFloat32 : static_cast<DType>(c.out);
  std::vector<std::unique_ptr<Array>> weight, grad, buffer, average, out, old_weight, old_buffer, old_average, old_out;
  std::vector<SgdTensor> tensors;
  const auto add = [](auto& list, DType dtype, int64_t numel, int64_t shift) -> Array& {
    list.push_back(std::make_unique<Array>(dtype, numel, shift));
    list.back()->fill(-1, 1);
    return *list.back();
  };
  const auto keep = [](auto& list, DType dtype, const Array& array) {
    list.push_back(std::make_unique<Array>(dtype, array.count()));
    list.back()->copy(array);
  };
  const auto floats = [](const Array& array) { return reinterpret_cast<float*>(array.data()); };
  for (const Shape& shape : shapes) {
    const int64_t numel = shape.filters * shape.run;
    const Array& w = add(weight, DType::kFloat32, numel, shape.shift);
    const Array& g = add(grad, c.grad, numel, shape.shift);
    const Array& b = add(buffer, DType::kFloat32, numel, shape.shift);
    const Array& a = add(average, DType::kFloat32, numel, shape.shift);
    const Array& o = add(out, kind, numel, shape.shift);
    keep(old_weight, DType::kFloat32, w);
    keep(old_buffer, DType::kFloat32, b);
    keep(old_average, DType::kFloat32, a);
    keep(old_out, kind, o);
    tensors.push_back({floats(w), g.data(), c.momentum ? floats(b) : nullptr, c.average ? floats(a) : nullptr,
                       c.out < 0 ? nullptr : o.data(), numel, tensors.size() % 3 == 1 ? 0.0f : 0.05f});
  }
  const int64_t count = static_cast<int64_t>(tensors.size());
  const float scale = 48, found = c.found_inf ? 1 : 0;
  const double rate = 0.1f, share = 0.01f;
  const float rate32 = 0.1f, share32 = 0.01f, norm32 = static_cast<float>(c.grad_norm);
  const uint8_t flag = c.found_inf ? 1 : 0;
  const auto number = [&](double value, const void* wide, const void* narrow) -> Number {
    if (c.number == NumberType::kBool) return {value, nullptr, NumberType::kFloat32};
    return {-1, c.number == NumberType::kFloat64 ? wide : narrow, c.number};
  };
  const Number found_inf{0, c.number == NumberType::kBool ? static_cast<const void*>(&flag) : &found,
                         c.number == NumberType::kBool ? NumberType::kBool : NumberType::kFloat32};
  const double grad_norm = c.number == NumberType::kFloat64 ? c.grad_norm : double{norm32};
  const SgdRule rule{number(rate, &rate, &rate32),
                     number(share, &share, &share32),
                     {1, &scale, NumberType::kFloat32},
                     found_inf,
                     number(grad_norm, &c.grad_norm, &norm32),
                     c.max_norm,
                     0.9f,
                     c.nesterov};
  std::vector<double> norms(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
  const SgdStep s{tensors.data(), count, c.grad, kind, rule, norms.data()};
  Array workspace(DType::kFloat32, cuda::sgd_step_workspace_bytes(s) / 4);
  emulator::launches = 0;
  CHECK(cuda::sgd_step(s, workspace.data(), nullptr) == cudaSuccess);
  CHECK(emulator::launches == 2 * ((count + cuda::kSgdCapacity - 1) / cuda::kSgdCapacity));

  const bool left_out = c.found_inf || !std::isfinite(c.grad_norm);
  double clip = 1;
  if (c.max_norm >= 0) clip = std::min(1.0, c.max_norm / (grad_norm / scale + 1e-6));
  const float factor = static_cast<float>(clip / scale);
  for (size_t t = 0; t < tensors.size(); ++t) {
    long double squares = 0;
    for (int64_t i = 0; i < tensors[t].numel; ++i) {
      float w = old_weight[t]->get(i), b = old_buffer[t]->get(i), a = old_average[t]->get(i);
      if (!left_out) {
        float d = factor * grad[t]->get(i);
        const float decay = tensors[t].decay;
        if (decay != 0) d = std::fmaf(decay, w, d);
        if (c.momentum) {
          b = std::fmaf(0.9f, b, d);
          d = c.nesterov ? std::fmaf(0.9f, b, d) : b;
        }
        w = std::fmaf(-0.1f, d, w);
        if (c.average) a = std::fmaf(0.01f, w - a, a);
      }
      CHECK(weight[t]->bits(i) == weight[t]->stored(w));
      CHECK(buffer[t]->bits(i) == buffer[t]->stored(b));
      CHECK(average[t]->bits(i) == average[t]->stored(a));
      CHECK(out[t]->bits(i) == (c.out < 0 ? old_out[t]->bits(i) : out[t]->stored(w)));
      squares += static_cast<long double>(w) * w;
    }
    CHECK(std::abs(norms[t] - std::sqrt(static_cast<double>(squares))) <= 1e-12 * norms[t]);
  }
}

void check_total_norm(const std::vector<Shape>& shapes) {
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<NormTensor> tensors;
  long double squares = 0;
  for (const Shape& shape : shapes) {
    const DType dtype = kDTypes[tensors.size() % 3];
    arrays.push_back(std::make_unique<Array>(dtype, shape.filters * shape.run, shape.shift));
    arrays.back()->fill(-1, 1);
    tensors.push_back({arrays.back()->data(), dtype, arrays.back()->count()});
    for (int64_t i = 0; i < arrays.back()->count(); ++i) {
      squares += static_cast<long double>(arrays.back()->get(i)) * arrays.back()->get(i);
    }
  }
  double norm = -1;
  const TotalNorm n{tensors.data(), static_cast<int64_t>(tensors.size()), &norm};
  Array workspace(DType::kFloat32, cuda::total_norm_workspace_bytes(n) / 4);
  emulator::launches = 0;
  CHECK(cuda::total_norm(n, workspace.data(), nullptr) == cudaSuccess);
  CHECK(emulator::launches == 1 + static_cast<int>((n.count + cuda::kNormCapacity - 1) / cuda::kNormCapacity));
  CHECK(std::abs(norm - std::sqrt(static_cast<double>(squares))) <= 1e-12 * norm);
}

void check_restore() {
  std::vector<std::unique_ptr<Array>> to, from;
  std::vector<CopyTensor> tensors;
  for (int i = 0; i < 300; ++i) {
    const int64_t count = i < 40 ? i : i % 50 == 0 ? 40000 + i : integer(0, 60);
    const int64_t shift = i % 5;
    to.push_back(std::make_unique<Array>(DType::kFloat16, count, shift));
    from.push_back(std::make_unique<Array>(DType::kFloat16, count, i % 3 ? shift : 0));
    for (int64_t k = 0; k < from.back()->bytes(); ++k) from.back()->data()[k] = static_cast<char>(integer(0, 255));
    tensors.push_back({to.back()->data(), from.back()->data(), to.back()->bytes()});
  }
  emulator::launches = 0;
  CHECK(cuda::restore(tensors.data(), static_cast<int64_t>(tensors.size()), nullptr) == cudaSuccess);
  CHECK(emulator::launches == 2);
  for (size_t i = 0; i < to.size(); ++i) {
    CHECK(memcmp(to[i]->data(), from[i]->data(), static_cast<size_t>(to[i]->bytes())) == 0);
  }
}

struct Images {
  int64_t channels, height, width;
  bool channels_last = false;
  int64_t shift = 0;
};

void check_pgd_init(DType dtype, Norm norm, const Images& images) {
  const int64_t samples = 3, elements = images.channels * images.height * images.width;
  Array x(dtype, samples * elements, images.shift), x_adv(dtype, samples * elements, images.shift);
  x.fill(0, 1);
  const int64_t ids[] = {5, (int64_t{1} << 40) + 7, 0};
  PgdInit p{};
  p.x_adv = x_adv.data();
  p.x = x.data();
  p.sample_ids = ids;
  p.dtype = dtype;
  p.samples = samples;
  p.elements = elements;
  if (images.channels_last) {
    p.dims = 3;
    const int64_t sizes[] = {images.channels, images.height, images.width};
    const int64_t strides[] = {1, images.width * images.channels, images.channels};
    std::copy_n(sizes, 3, p.sizes);
    std::copy_n(strides, 3, p.strides);
  }
  p.norm = norm;
  p.epsilon = 8.0f / 255;
  p.radius = 0.5;
  p.seed = 0x123456789ABCDEF0ull;
  CHECK(cuda::pgd_init(p, nullptr) == cudaSuccess);

  for (int64_t n = 0; n < samples; ++n) {
    const auto word = [&](int64_t element, Stream stream) {
      return sample_words(static_cast<uint32_t>(element / 4), ids[n], p.seed, stream).word[element % 4];
    };
    std::vector<float> z(static_cast<size_t>(elements + 3));
    int64_t q = 0;
    for (int64_t e = 0; e < elements + 2; e += 2) {
      float* pair = &z[static_cast<size_t>(e)];
      normal_pair(word(e, Stream::kNormal), word(e + 1, Stream::kNormal), &pair[0], &pair[1]);
      q += square_fixed_point(pair[0]) + (e + 1 < elements + 2 ? square_fixed_point(pair[1]) : 0);
    }
    const float factor = static_cast<float>(p.radius / std::sqrt(static_cast<double>(q) * 0x1p-32));
    for (int64_t e = 0; e < elements; ++e) {
      const int64_t c = e / (images.height * images.width), pixel = e % (images.height * images.width);
      const int64_t at = n * elements + (images.channels_last ? pixel * images.channels + c : e);
      const float clean = x.get(at);
      float expected = clamp(clean + z[static_cast<size_t>(e)] * factor, 0, 1);
      if (norm == Norm::kLinf) {
        const float delta = uniform_integer(word(e, Stream::kUniform)) * (p.epsilon * 0x1p-24f);
        expected = project_linf(clean + delta, clean, p.epsilon, 0, 1);
      }
      if (norm == Norm::kNormal) expected = clean + z[static_cast<size_t>(e)] * p.epsilon;
      CHECK(x_adv.bits(at) == x_adv.stored(expected));
    }
  }
}

void check_pgd_step(DType dtype, DType grad_dtype, Norm norm, int64_t elements, bool masked, int64_t shift) {
  const int64_t samples = 5, total = samples * elements;
  Array x(dtype, total, shift), x_adv(dtype, total, shift), before(dtype, total), grad(grad_dtype, total, shift);
  std::vector<uint8_t> mask(static_cast<size_t>(total));
  x.fill(0, 1);
  for (int64_t i = 0; i < total; ++i) {
    x_adv.set(i, x.get(i) + static_cast<float>(uniform(-0.03, 0.03)));
    mask[static_cast<size_t>(i)] = static_cast<uint8_t>(integer(0, 2));
  }
  grad.fill(-1, 1);
  for (int64_t i = 0; i < elements; ++i) grad.set(elements + i, 0);
  grad.set(2 * elements, std::numeric_limits<float>::quiet_NaN());
  grad.set(3 * elements, std::numeric_limits<float>::infinity());
  mask[static_cast<size_t>(2 * elements)] = mask[static_cast<size_t>(3 * elements)] = 1;
  before.copy(x_adv);
  PgdStep p{};
  p.x_adv = x_adv.data();
  p.grad = grad.data();
  p.x = x.data();
  p.mask = masked ? mask.data() : nullptr;
  p.dtype = dtype;
  p.grad_dtype = grad_dtype;
  p.samples = samples;
  p.elements = elements;
  p.norm = norm;
  p.step_size = 0.07;
  p.step = 2.0f / 255;
  p.epsilon = 8.0f / 255;
  p.radius = elements % 2 ? 0.05 : 100;
  p.low = 0;
  p.high = 1;
  CHECK(cuda::pgd_step(p, nullptr) == cudaSuccess);

  for (int64_t n = 0; n < samples; ++n) {
    const auto ascent = [&](int64_t i) { return masked && mask[static_cast<size_t>(i)] == 0 ? 0.0f : grad.get(i); };
    double squares = 0, distance = 0;
    for (int64_t i = n * elements; i < (n + 1) * elements; ++i) squares += std::pow(double{ascent(i)}, 2);
    const double length = std::sqrt(squares);
    const auto moved = [&](int64_t i) {
      const bool usable = length > 0 && std::isfinite(length);
      return usable ? before.get(i) + static_cast<float>(p.step_size / length * ascent(i)) : before.get(i);
    };
    for (int64_t i = n * elements; i < (n + 1) * elements; ++i) distance += std::pow(double{moved(i) - x.get(i)}, 2);
    distance = std::sqrt(distance);
    for (int64_t i = n * elements; i < (n + 1) * elements; ++i) {
      const float g = ascent(i), clean = x.get(i);
      if (norm == Norm::kLinf) {
        const float sign = g > 0 ? 1.0f : g < 0 ? -1.0f : 0.0f;
        const float expected = project_linf(before.get(i) + p.step * sign, clean, p.epsilon, 0, 1);
        CHECK(x_adv.bits(i) == x_adv.stored(expected));
      } else {
        float expected = moved(i);
        if (distance > p.radius) expected = clean + (expected - clean) * static_cast<float>(p.radius / distance);
        // the order of the sums may move a factor by one fp32 ulp
        const float tolerance = dtype == DType::kFloat32 ? 2e-7f : dtype == DType::kFloat16 ? 1e-3f : 8e-3f;
        CHECK(std::abs(x_adv.get(i) - clamp(expected, 0, 1)) <= tolerance);
      }
    }
  }
}

struct NormalizeCase {
  DType dtype;  // of the gradient and of the result
  Norm norm;
  Images images;
  int64_t padded;
  bool masked;
  std::string order;  // of the images' channels, rows and columns in memory
};

// Against `pgd_step` along the gradient for the images; then what is made of these.
void check_pgd_step_normalize(const NormalizeCase& c) {
  const auto [channels, height, width, channels_last, shift] = c.images;
  int64_t channel_stride = 1, row_stride = 1, column_stride = 1;
  for (const char inner : c.order) {
    if (inner != 'c' && c.order.find(inner) > c.order.find('c')) channel_stride *= inner == 'h' ? height : width;
    if (inner != 'h' && c.order.find(inner) > c.order.find('h')) row_stride *= inner == 'c' ? channels : width;
    if (inner != 'w' && c.order.find(inner) > c.order.find('w')) column_stride *= inner == 'c' ? channels : height;
  }
  const int64_t samples = 3, pixels = height * width, elements = channels * pixels, total = samples * elements;
  const DType fp32 = DType::kFloat32;
  Array x(fp32, total, shift), x_adv(fp32, total, shift), expected(fp32, total), ascent(fp32, total);
  Array grad(c.dtype, samples * pixels * c.padded, shift), out(c.dtype, grad.count(), shift);
  Array mean(fp32, channels), std(fp32, channels);
  std::vector<uint8_t> mask(static_cast<size_t>(total) + 16);
  // as aligned as the images are
  uint8_t* region = mask.data() + (16 - reinterpret_cast<uintptr_t>(mask.data()) % 16) % 16;
  x.fill(0, 1);
  grad.fill(-1, 1);
  mean.fill(0.3, 0.6);
  std.fill(-0.3, 1.5);  // a sign that is turned counts too
  grad.set(0, 0);
  if (c.norm == Norm::kLinf) grad.set(c.padded, std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < total; ++i) {
    x_adv.set(i, x.get(i) + static_cast<float>(uniform(-0.03, 0.03)));
    region[i] = static_cast<uint8_t>(integer(0, 2));
  }
  expected.copy(x_adv);
  const auto each = [&](const auto& body) {
    for (int64_t row = 0; row < samples * pixels; ++row) {
      const int64_t pixel = row % pixels;
      const int64_t first = row / pixels * elements + pixel / width * row_stride + pixel % width * column_stride;
      for (int64_t k = 0; k < channels; ++k) body(first + k * channel_stride, row, k);
    }
  };
  each([&](int64_t at, int64_t row, int64_t k) {
    const float g = grad.get(row * c.padded + k);
    ascent.set(at, c.norm == Norm::kL2 ? g / std.get(k) : std.get(k) < 0 ? -g : g);
  });
  PgdStep plain{expected.data(),
                ascent.data(),
                x.data(),
                c.masked ? region : nullptr,
                fp32,
                fp32,
                samples,
                elements,
                c.norm,
                0.07,
                2.0f / 255,
                8.0f / 255,
                elements % 2 ? 0.05 : 100,
                0,
                1};
  CHECK(cuda::pgd_step(plain, nullptr) == cudaSuccess);
  PgdStep step = plain;
  step.x_adv = x_adv.data();
  step.grad = grad.data();
  step.grad_dtype = c.dtype;
  const PgdStepNormalize p{step,
                           out.data(),
                           reinterpret_cast<float*>(mean.data()),
                           reinterpret_cast<float*>(std.data()),
                           channels,
                           height,
                           width,
                           c.padded,
                           channel_stride,
                           row_stride,
                           column_stride};
  const int before = emulator::launches;
  const int64_t bytes = emulator::bytes;
  CHECK(cuda::pgd_step_normalize(p, nullptr) == cudaSuccess);
  CHECK(emulator::launches == before + 1);
  // x_adv, x and the mask, and four values of a row; x_adv and whole rows
  if (c.norm == Norm::kLinf && channels == 3 && c.padded == 8 && c.order == "hwc" && shift == 0) {
    CHECK(emulator::bytes - bytes == (12 + c.masked) * total + (4 + 8) * size_of(c.dtype) * samples * pixels);
  }
  each([&](int64_t at, int64_t row, int64_t k) {
    const float moved = x_adv.get(at), wanted = expected.get(at);
    // the order of the sums may move a factor by one fp32 ulp
    CHECK(c.norm == Norm::kLinf ? x_adv.bits(at) == expected.bits(at) : std::abs(moved - wanted) <= 2e-7f);
    CHECK(out.bits(row * c.padded + k) == out.stored((moved - mean.get(k)) / std.get(k)));
    for (int64_t rest = channels; rest < c.padded; ++rest) CHECK(out.bits(row * c.padded + rest) == 0);
  });
}

const char* name(DType dtype) { return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16"; }

std::vector<float> values(const Array& array) {
  std::vector<float> found;
  for (int64_t i = 0; i < array.count(); ++i) found.push_back(array.get(i));
  return found;
}

double activation_of(Activation kind, double u) {
  if (kind == Activation::kSilu) return u / (1 + std::exp(-u));
  return kind == Activation::kRelu && u <= 0 ? 0 : u;
}

double slope_of(Activation kind, double u) {
  const double s = 1 / (1 + std::exp(-u));
  if (kind == Activation::kSilu) return s * (1 + u * (1 - s));
  return kind == Activation::kRelu && u <= 0 ? 0 : 1;
}

// Relative to the largest of the expected values, which is at least 1; a stored value may be rounded once.
struct Near {
  explicit Near(DType dtype) : rounding(dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 1e-3 : 8e-3) {}
  bool operator()(double value, double expected, double largest) const {
    return std::fabs(value - expected) <= rounding * std::max(std::fabs(expected), std::max(1.0, largest));
  }
  double rounding;
};

struct BnCase {
  DType dtype;
  int64_t rows, channels;
  Activation activation;
  bool train, residual, plain;  // plain: neither weight, bias, running statistics nor gradients for them
  double mean = 0.5;
  int64_t shift = 0;
  bool split = false;  // in halves, between which ranks add up what they found
};

void check_bn_act(const BnCase& c) {
  const int64_t count = c.rows * c.channels, stride = (c.channels + 15) / 16 * 16;
  Array x(c.dtype, count, c.shift), residual(c.dtype, count, c.shift), z(c.dtype, count), y(c.dtype, count);
  Array grad(c.dtype, count, c.shift), grad_z(c.dtype, count), grad_x(c.dtype, count);
  Array vectors[6] = {{DType::kFloat32, c.channels}, {DType::kFloat32, c.channels}, {DType::kFloat32, c.channels},
                      {DType::kFloat32, c.channels}, {DType::kFloat32, c.channels}, {DType::kFloat32, c.channels}};
  Array &weight = vectors[0], &bias = vectors[1], &mean = vectors[2], &variance = vectors[3];
  Array table(DType::kFloat32, 4 * stride);
  x.fill(c.mean - 1, c.mean + 1);
  residual.fill(-1, 1);
  grad.fill(-1, 1);
  grad_z.fill(-1, 1);
  weight.fill(0.5, 1.5);
  bias.fill(-1, 1);
  mean.fill(-0.5, 1);
  variance.fill(0.5, 2);
  const std::vector<float> old_mean = values(mean), old_variance = values(variance);
  const auto floats = [](Array& array) { return reinterpret_cast<float*>(array.data()); };
  const double eps = 1e-5, momentum = 0.1;
  const bool tracked = !c.plain || !c.train;
  const BnAct a{x.data(),
                c.residual ? residual.data() : nullptr,
                c.residual ? z.data() : x.data(),
                c.dtype,
                c.rows,
                c.channels,
                c.activation,
                floats(table),
                stride};
  const BnParameters p{c.plain ? nullptr : floats(weight),
                       c.plain ? nullptr : floats(bias),
                       tracked ? floats(mean) : nullptr,
                       tracked ? floats(variance) : nullptr,
                       momentum,
                       eps,
                       nullptr};
  const Array workspace(DType::kFloat32, cuda::bn_act_workspace_bytes(a) / 4);
  const bool masked = !c.train && c.plain && c.activation == Activation::kRelu && c.channels % 8 == 0 && !c.shift;
  Array mask(DType::kFloat32, c.rows * stride / 32);
  int before = emulator::launches;
  const double total_rows = static_cast<double>(c.rows);
  if (c.split) {
    std::vector<double> own(static_cast<size_t>(2 * c.channels));
    CHECK(cuda::bn_act_train(a, {nullptr, nullptr, nullptr, nullptr, 0, eps, own.data()}, nullptr, workspace.data(),
                             nullptr) == cudaSuccess);
    CHECK(emulator::launches == before + 2);
    std::vector<float> given(own.begin(), own.end());
    for (auto k = static_cast<size_t>(c.channels); k < own.size(); ++k)
      given[k] = static_cast<float>(own[k] / total_rows);
    BnAct rest = a;
    rest.x = a.z;
    rest.residual = nullptr;
    const BnParameters by{p.weight, p.bias, given.data(), given.data() + c.channels, 0, eps, nullptr};
    CHECK(cuda::bn_act_eval(rest, by, y.data(), nullptr, nullptr) == cudaSuccess);
    CHECK(emulator::launches == before + 3);
  } else if (c.train) {
    CHECK(cuda::bn_act_train(a, p, y.data(), workspace.data(), nullptr) == cudaSuccess);
    CHECK(emulator::launches == before + 3);
  } else {
    auto* bits = masked ? reinterpret_cast<uint8_t*>(mask.data()) : nullptr;
    CHECK(cuda::bn_act_eval(a, p, y.data(), bits, nullptr) == cudaSuccess);
    CHECK(emulator::launches == before + 1);
  }
  const BnGradients g{grad.data(),
                      c.residual ? grad_z.data() : nullptr,
                      masked ? reinterpret_cast<uint8_t*>(mask.data()) : nullptr,
                      c.train,
                      nullptr,
                      grad_x.data(),
                      c.plain ? nullptr : floats(vectors[4]),
                      c.plain ? nullptr : floats(vectors[5])};
  BnAct back = a;
  if (masked) back.x = back.residual = back.z = nullptr;
  before = emulator::launches;
  if (c.split) {
    BnGradients half = g;
    half.x = nullptr;
    half.weight = floats(vectors[4]);
    half.bias = floats(vectors[5]);
    CHECK(cuda::bn_act_backward(back, half, workspace.data(), nullptr) == cudaSuccess);
    CHECK(emulator::launches == before + 2);
    std::vector<float> coefficients(static_cast<size_t>(2 * stride));
    for (int64_t k = 0; k < c.channels; ++k) {
      coefficients[static_cast<size_t>(k)] = static_cast<float>(vectors[5].get(k) / total_rows);
      coefficients[static_cast<size_t>(stride + k)] =
          static_cast<float>(vectors[4].get(k) * table.get(kBnInvstd * stride + k) / total_rows);
    }
    half = g;
    half.coefficients = coefficients.data();
    half.weight = half.bias = nullptr;
    CHECK(cuda::bn_act_backward(back, half, nullptr, nullptr) == cudaSuccess);
  } else {
    CHECK(cuda::bn_act_backward(back, g, workspace.data(), nullptr) == cudaSuccess);
  }
  CHECK(emulator::launches == before + (c.train || !c.plain ? 3 : 1));

  const Near stored(c.dtype), exact(DType::kFloat32);
  for (int64_t k = 0; k < c.channels; ++k) {
    double sum = 0, square = 0;
    std::vector<double> from(static_cast<size_t>(c.rows));
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t at = r * c.channels + k;
      double& value = from[static_cast<size_t>(r)];
      value = x.get(at);
      if (c.residual) {
        CHECK(z.bits(at) == z.stored(x.get(at) + residual.get(at)));
        value = z.get(at);
      }
      sum += value;
    }
    const double rows = static_cast<double>(c.rows), batch_mean = sum / rows;
    for (const double value : from) square += (value - batch_mean) * (value - batch_mean);
    const double m = c.train ? batch_mean : old_mean[static_cast<size_t>(k)];
    const double v = c.train ? square / rows : old_variance[static_cast<size_t>(k)];
    const double invstd = 1 / std::sqrt(v + eps), w = c.plain ? 1 : weight.get(k), b = c.plain ? 0 : bias.get(k);
    double of_bias = 0, of_weight = 0;
    for (int64_t r = 0; r < c.rows; ++r) {
      const double normalised = (from[static_cast<size_t>(r)] - m) * invstd;
      const double g0 = grad.get(r * c.channels + k) * slope_of(c.activation, normalised * w + b);
      of_bias += g0;
      of_weight += g0 * normalised;
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t at = r * c.channels + k;
      const double normalised = (from[static_cast<size_t>(r)] - m) * invstd, u = normalised * w + b;
      // the mean is rounded once
      CHECK(stored(y.get(at), activation_of(c.activation, u), std::max(std::fabs(u), 0.1 * m * invstd)));
      // rounding decides on which side of the kink it lies
      if (std::fabs(u) < 1e-4) continue;
      const double g0 = grad.get(at) * slope_of(c.activation, u);
      const double owed = c.train ? (of_bias + normalised * of_weight) / rows : 0;
      const double expected = w * invstd * (g0 - owed) + (c.residual ? grad_z.get(at) : 0);
      CHECK(stored(grad_x.get(at), expected, invstd * std::max(w, 0.1 * m * invstd)));
    }
    if (!c.plain) {
      CHECK(exact(vectors[4].get(k), of_weight, std::max(1.0, 0.1 * m * invstd) * std::sqrt(rows)));
      CHECK(exact(vectors[5].get(k), of_bias, std::sqrt(rows)));
    }
    const bool moved = c.train && tracked && !c.split;
    const size_t i = static_cast<size_t>(k);
    CHECK(exact(mean.get(k), moved ? 0.9 * old_mean[i] + 0.1 * m : old_mean[i], 0));
    CHECK(exact(variance.get(k), moved ? 0.9 * old_variance[i] + 0.1 * v * rows / (rows - 1) : old_variance[i], 0));
  }
}

// How often an array of the images' size goes from or to memory, forward and backward: docs/areas/operations.md.
void check_bn_act_moves() {
  for (const DType dtype : kDTypes) {
    for (const bool train : {true, false}) {
      for (const bool split : {false, train}) {
        for (const bool residual : {true, false}) {
          test = std::string("moves of bn_act ") + name(dtype) + (train ? " train" : " eval") +
                 (split ? " split" : "") + (residual ? " residual" : "");
          const int64_t rows = 8192, channels = 64, count = rows * channels;
          Array images[] = {{dtype, count}, {dtype, count}, {dtype, count}, {dtype, count}, {dtype, count}};
          for (Array& image : images) image.fill(-1, 1);
          Array table(DType::kFloat32, 4 * channels), running(DType::kFloat32, 2 * channels);
          std::vector<double> own(2 * channels);
          Array mask(DType::kFloat32, rows * channels / 32);
          running.fill(0.5, 1);
          auto* statistics = reinterpret_cast<float*>(running.data());
          const BnAct a{images[0].data(),
                        residual ? images[1].data() : nullptr,
                        images[residual ? 2 : 0].data(),
                        dtype,
                        rows,
                        channels,
                        Activation::kRelu,
                        reinterpret_cast<float*>(table.data()),
                        channels};
          const BnParameters p{
              nullptr, nullptr, statistics, statistics + channels, 0.1, 1e-5, split ? own.data() : nullptr};
          BnAct rest = a;
          if (split) {
            rest.x = a.z;
            rest.residual = nullptr;
          }
          auto* bits = train ? nullptr : reinterpret_cast<uint8_t*>(mask.data());
          const Array workspace(DType::kFloat32, cuda::bn_act_workspace_bytes(a) / 4);
          const auto moves = [&](const auto& call) {
            const int64_t before = emulator::bytes;
            CHECK(call() == cudaSuccess);
            return static_cast<double>(emulator::bytes - before) / static_cast<double>(count * size_of(dtype));
          };
          double forward = 0;
          if (train) {
            void* y = split ? nullptr : images[3].data();
            forward += moves([&] { return cuda::bn_act_train(a, p, y, workspace.data(), nullptr); });
          }
          if (!train || split) {
            forward += moves([&] { return cuda::bn_act_eval(rest, p, images[3].data(), bits, nullptr); });
          }
          // four rows of every block beforehand
          const int expected = train ? (residual ? 5 : 3) : residual ? 4 : 2;
          CHECK(forward >= expected && forward <= expected + 0.25);
          BnGradients g{images[3].data(), residual ? images[1].data() : nullptr, bits, train, nullptr, nullptr, nullptr,
                        nullptr};
          const auto back = [&] { return cuda::bn_act_backward(a, g, workspace.data(), nullptr); };
          double backward = split ? moves(back) : 0;
          g.x = images[4].data();
          g.coefficients = split ? statistics : nullptr;
          backward += moves(back);
          CHECK(backward == (train ? (residual ? 6 : 5) : residual ? 3 : 2));
        }
      }
    }
  }
}

void check_bn_acts() {
  for (const DType dtype : kDTypes) {
    for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kSilu}) {
      for (const bool train : {true, false}) {
        for (const bool residual : {true, false}) {
          for (const bool plain : {true, false}) {
            test = std::string("bn_act ") + name(dtype) + " activation " + std::to_string(int(activation)) +
                   (train ? " train" : " eval") + (residual ? " residual" : "") + (plain ? " plain" : "");
            check_bn_act({dtype, 70, 24, activation, train, residual, plain});
            check_bn_act({dtype, 33, 5, activation, train, residual, plain});
            check_bn_act({dtype, 9, 16, activation, train, residual, plain, 0.5, 1});
            if (train) check_bn_act({dtype, 70, 24, activation, train, residual, plain, 0.5, 0, true});
            if (train) check_bn_act({dtype, 33, 5, activation, train, residual, plain, 0.5, 0, true});
          }
        }
      }
    }
  }
  test = "bn_act, more channels than threads";
  check_bn_act({DType::kFloat16, 5, 2056, Activation::kRelu, true, true, false});
  check_bn_act({DType::kFloat32, 5, 261, Activation::kRelu, true, true, false});
  test = "bn_act, many blocks of rows";
  check_bn_act({DType::kFloat16, 2 * 512 * 8 + 3, 256, Activation::kRelu, true, false, true, 0.5, 1});
  check_bn_act({DType::kFloat32, 70'001, 2, Activation::kNone, true, true, false});
  test = "bn_act, a mean far from 0";
  check_bn_act({DType::kFloat32, 3000, 8, Activation::kNone, true, false, true, 100});
}

}  // namespace

int main() {
  test = "walk";
  check_walk<4, 1>();
  check_walk<4, 2>();
  check_walk<8, 2>();
  check_long_walk();

  test = "plan";
  for (const int64_t count : {0, 1, 98, 144, 145, 433}) {
    for (const int64_t largest : {int64_t{100}, int64_t{100'000}, int64_t{10'000'000'000}}) check_plan(count, largest);
  }

  const std::vector<Shape> shapes{{4, 0},    {1, 1},    {3, 27},    {5, 288}, {2, 2500},
                                  {9, 1024}, {3, 1025}, {2, 41, 1}, {1, 9001}};
  for (const Scope scope : {Scope::kLayer, Scope::kGlobal, Scope::kFilter}) {
    for (const DType out : kDTypes) {
      for (const DType weight : kDTypes) {
        for (const DType grad : kDTypes) {
          // global differs from layer in its scale alone; the output's dtype is chosen at run time
          if (scope == Scope::kGlobal && (out != weight || weight != grad)) continue;
          if (scope == Scope::kFilter && out != kDTypes[0] && out != weight) continue;
          test = std::string("perturb scope ") + std::to_string(static_cast<int>(scope)) + " out " + name(out) +
                 " weight " + name(weight) + " grad " + name(grad);
          check_perturb({scope, out, weight, grad}, shapes);
        }
      }
    }
    test = "perturb in place, scope " + std::to_string(static_cast<int>(scope));
    check_perturb({scope, DType::kFloat32, DType::kFloat32, DType::kFloat32, true, true}, shapes);
    check_perturb({scope, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, true, false}, shapes);
    test = "perturb many tensors, scope " + std::to_string(static_cast<int>(scope));
    std::vector<Shape> many(150, {1, 30});
    many[145] = {3, 5000};
    check_perturb({scope, DType::kFloat32, DType::kFloat32, DType::kFloat32}, many);
  }

  const std::vector<Shape> few{{4, 0}, {9, 27}, {2, 1025, 1}, {1, 4101}};
  for (const Scope scope : {Scope::kLayer, Scope::kGlobal, Scope::kFilter}) {
    for (const Scale scale : {Scale::kRelative, Scale::kAbsolute, Scale::kElementwise}) {
      for (const float bound : {-1.0f, 0.01f}) {
        if (scale == Scale::kRelative && bound < 0) continue;
        test = "perturb scope " + std::to_string(static_cast<int>(scope)) + " scale " +
               std::to_string(static_cast<int>(scale)) + " bound " + std::to_string(bound);
        const float eta = scale == Scale::kElementwise ? 0.01f : 0;
        check_perturb({scope, DType::kFloat32, DType::kFloat32, DType::kFloat32, true, true, scale, eta, bound}, few);
        if (bound < 0) continue;
        check_perturb({scope, DType::kFloat16, DType::kFloat32, DType::kBFloat16, false, false, scale, eta, bound},
                      few);
      }
    }
  }
  for (const DType weight : kDTypes) {
    for (const DType grad : kDTypes) {
      test = std::string("perturb elementwise bounded weight ") + name(weight) + " grad " + name(grad);
      check_perturb({Scope::kLayer, weight, weight, grad, true, true, Scale::kElementwise, 0.0f, 0.5f},
                    {{1, 1025}, {3, 27}, {2, 41, 1}});
    }
  }

  for (const Scope scope : {Scope::kLayer, Scope::kGlobal, Scope::kFilter}) {
    for (const DType weight : kDTypes) {
      for (const DType out : kDTypes) {
        for (const Scale scale : {Scale::kRelative, Scale::kAbsolute, Scale::kElementwise}) {
          if (out != weight && scale != Scale::kAbsolute) continue;
          test = std::string("perturb not followed, scope ") + std::to_string(static_cast<int>(scope)) + " scale " +
                 std::to_string(static_cast<int>(scale)) + " weight " + name(weight) + " out " + name(out);
          Case c{scope, out, weight, weight, out == weight && scale == Scale::kAbsolute, scale != Scale::kElementwise};
          c.scale = scale;
          c.bound = scale == Scale::kElementwise ? 0.5f : -1;
          c.norms = scale == Scale::kRelative && scope == Scope::kGlobal;
          c.spoil = true;
          check_perturb(c, {{4, 0}, {9, 27}, {2, 1025, 1}, {1, 4101}, {3, 41}, {1, 1}});
        }
      }
    }
  }

  test = "perturb with the weights' norms";
  for (const Scope scope : {Scope::kLayer, Scope::kGlobal}) {
    std::vector<Shape> many(150, {1, 30});
    many[145] = {3, 5000};
    for (const float bound : {-1.0f, 0.01f}) {
      Case c{scope, DType::kBFloat16, DType::kFloat32, DType::kFloat16, false, false};
      c.bound = bound;
      c.norms = true;
      check_perturb(c, bound < 0 ? many : shapes);
    }
  }

  const double infinity = std::numeric_limits<double>::infinity();
  const std::vector<Shape> stepped{{4, 0}, {1, 1}, {3, 27}, {2, 41, 1}, {1, 9001}, {1, 2048, 3}, {5, 4096}};
  for (const DType grad : kDTypes) {
    for (const bool momentum : {false, true}) {
      for (const bool average : {false, true}) {
        for (int out = -1; out < 3; ++out) {
          test = std::string("sgd grad ") + name(grad) + (momentum ? " momentum" : "") + (average ? " average" : "") +
                 " out " + std::to_string(out);
          const auto number = static_cast<NumberType>((out + 1) % 3);
          check_sgd({grad, momentum, average, out, average, false, 3.0, -1, number}, stepped);
          check_sgd({grad, momentum, average, out, !average, false, 100.0, 0.7, number}, stepped);
          check_sgd({grad, momentum, average, out, false, out % 2 == 0, out % 2 ? infinity : 1, 0.7, number}, stepped);
        }
      }
    }
  }
  test = "sgd many tensors";
  std::vector<Shape> many(470, {1, 30});
  many[230] = {3, 5000};
  check_sgd({DType::kBFloat16, true, true, 2}, many);
  test = "total norm";
  check_total_norm(stepped);
  check_total_norm(many);
  many.resize(cuda::kNormCapacity);
  check_total_norm(many);

  test = "restore";
  check_restore();

  const Images images[] = {{1, 1, 1},   {1, 1, 3},           {1, 2, 2},       {1, 8, 8},         {3, 3, 3},
                           {3, 32, 32}, {1, 8, 8, false, 1}, {3, 5, 7, true}, {3, 32, 32, true}, {3, 4, 4, true, 1}};
  for (const Norm norm : {Norm::kLinf, Norm::kL2, Norm::kNormal}) {
    for (const DType dtype : kDTypes) {
      for (const Images& image : images) {
        test = std::string("pgd_init ") + name(dtype) + " norm " + std::to_string(static_cast<int>(norm)) + " " +
               std::to_string(image.channels * image.height * image.width);
        check_pgd_init(dtype, norm, image);
      }
      if (norm == Norm::kNormal) continue;
      for (const Images& image : images) {
        for (const int64_t padded : {image.channels, int64_t{8}}) {
          for (const bool masked : {false, true}) {
            test = std::string("pgd_step_normalize ") + name(dtype) + (norm == Norm::kL2 ? " l2 " : " linf ") +
                   std::to_string(image.channels * image.height * image.width) + " in " + std::to_string(padded) +
                   (masked ? " masked" : "");
            check_pgd_step_normalize({dtype, norm, image, padded, masked, image.channels_last ? "hwc" : "chw"});
          }
        }
      }
      for (const char* order : {"chw", "cwh", "hcw", "wch", "hwc", "whc"}) {
        test = std::string("pgd_step_normalize in the order ") + order;
        check_pgd_step_normalize({dtype, norm, {3, 3, 8}, 8, true, order});
      }
      for (const DType grad : kDTypes) {
        for (const int64_t elements : {1, 64, 3072, 4105}) {
          test = std::string("pgd_step ") + name(dtype) + " grad " + name(grad) +
                 (norm == Norm::kL2 ? " l2 " : " linf ") + std::to_string(elements);
          check_pgd_step(dtype, grad, norm, elements, (elements + static_cast<int>(grad)) % 3 == 0, elements == 64);
        }
      }
    }
  }
  check_bn_acts();
  check_bn_act_moves();
  std::puts("ok");
}
