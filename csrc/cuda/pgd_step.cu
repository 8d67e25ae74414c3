// One ascent step, projection and clipping, and where it is wanted the network's next input. Compile with -fmad=false:
// every rounding is the definition's.
#include "awp/cuda.h"
#include "awp/project.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace awp::cuda {

// x_adv, x and the mask from sample `first` on, in memory order.
template <typename T>
struct Images {
  T* x_adv;
  const T* x;
  const uint8_t* mask;

  __device__ __forceinline__ Images(const PgdStep& p, int64_t first)
      : x_adv(static_cast<T*>(p.x_adv) + first * p.elements),
        x(static_cast<const T*>(p.x) + first * p.elements),
        mask(p.mask != nullptr ? p.mask + first * p.elements : nullptr) {}
  template <int N>
  __device__ __forceinline__ void load_both(int64_t at, float (&value)[N], float (&clean)[N]) const {
    widen(load<N>(x_adv + at), value);
    widen(load<N>(x + at), clean);
  }
  template <int N>
  __device__ __forceinline__ void keep(int64_t at, float (&grad)[N]) const {
    if (mask == nullptr) return;
    uint8_t kept[N];
    load<N>(mask + at).unpack(kept);
#pragma unroll
    for (int i = 0; i < N; ++i) grad[i] = kept[i] != 0 ? grad[i] : 0.0f;
  }
  template <int N>
  __device__ __forceinline__ void write(int64_t at, const float (&value)[N]) const {
    store<N>(x_adv + at, narrow<N, T>(value));
  }
};

// The gradient for an image from that for (image - mean) / std; or a number of its sign, where the quotient could be 0.
template <bool Sign>
__device__ __forceinline__ float through_scale(float grad, float std) {
  if (Sign) return std < 0.0f ? -grad : grad;
  return grad / std;
}

// How a step sees its arrays. An item is what a thread takes at least, kValues values; where `aligned`, it takes kPack;

// The images alone: an item is an element.
template <typename T, typename G>
struct Flat {
  using Arguments = PgdStep;
  static constexpr int kPack = kPackOf<T, G>, kValues = 1;
  Images<T> images;
  const G* grad;

  __device__ __forceinline__ Flat(const PgdStep& p, int64_t first)
      : images(p, first), grad(static_cast<const G*>(p.grad) + first * p.elements) {}
  __device__ __forceinline__ bool aligned() const { return aligned16(images.x_adv, images.x, grad, images.mask); }
  template <int N>
  __device__ __forceinline__ void load_both(int64_t at, float (&value)[N], float (&clean)[N]) const {
    images.load_both(at, value, clean);
  }
  template <bool Sign, int N>
  __device__ __forceinline__ void load_grad(int64_t at, float (&value)[N]) const {
    widen(load<N>(grad + at), value);
    images.keep(at, value);
  }
  template <int N>
  __device__ __forceinline__ void write(int64_t at, const float (&value)[N]) const {
    images.write(at, value);
  }
};

// Three channels in channels_last order and rows of eight: an item is a pixel. Four of them are three accesses of 16
// bytes to every array of images; a row is written whole, and read as far as it has gradients that count.
template <typename G>
struct Pixels {
  using Arguments = PgdStepNormalize;
  static constexpr int kPack = 4, kValues = 3, kRead = 4, kRow = 8;
  Images<float> images;
  const G* grad;
  G* out;
  float mean[kValues], std[kValues];

  static bool fits(const PgdStepNormalize& p) {
    const bool rows = ((reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.grad)) & 15) == 0;
    // images without gaps have no other row stride then
    return rows && p.channels == kValues && p.padded == kRow && p.channel_stride == 1 && p.column_stride == kValues;
  }
  __device__ __forceinline__ Pixels(const PgdStepNormalize& p, int64_t first)
      : images(p, first),
        grad(static_cast<const G*>(p.grad) + first * p.height * p.width * kRow),
        out(static_cast<G*>(p.out) + first * p.height * p.width * kRow) {
#pragma unroll
    for (int c = 0; c < kValues; ++c) {
      mean[c] = p.mean[c];
      std[c] = p.std[c];
    }
  }
  __device__ __forceinline__ bool aligned() const { return aligned16(images.x_adv, images.x, images.mask); }
  template <int N>
  __device__ __forceinline__ void load_both(int64_t at, float (&value)[N], float (&clean)[N]) const {
    images.load_both(kValues * at, value, clean);
  }
  template <bool Sign, int N>
  __device__ __forceinline__ void load_grad(int64_t at, float (&value)[N]) const {
    // all of them before the first division, which may branch
    Pack<G, kRead> rows[N / kValues];
#pragma unroll
    for (int i = 0; i < N / kValues; ++i) rows[i] = load<kRead>(grad + (at + i) * kRow);
#pragma unroll
    for (int i = 0; i < N / kValues; ++i) {
      float row[kRead];
      widen(rows[i], row);
#pragma unroll
      for (int c = 0; c < kValues; ++c) value[kValues * i + c] = through_scale<Sign>(row[c], std[c]);
    }
    images.keep(kValues * at, value);
  }
  template <int N>
  __device__ __forceinline__ void write(int64_t at, const float (&value)[N]) const {
    images.write(kValues * at, value);
#pragma unroll
    for (int i = 0; i < N / kValues; ++i) {
      float row[kRow] = {};
#pragma unroll
      for (int c = 0; c < kValues; ++c) row[c] = (value[kValues * i + c] - mean[c]) / std[c];
      store<kRow>(out + (at + i) * kRow, narrow<kRow, G>(row));
    }
  }
};

// Any number of channels in any order: an item is an element, counted with channels innermost.
template <typename G>
struct Elements {
  using Arguments = PgdStepNormalize;
  static constexpr int kPack = 1, kValues = 1;
  const PgdStepNormalize& p;
  Images<float> images;
  const G* grad;
  G* out;
  unsigned channels, width;

  struct Place {
    unsigned channel;
    int64_t image, row;
  };
  __device__ __forceinline__ Elements(const PgdStepNormalize& arguments, int64_t first)
      : p(arguments),
        images(p, first),
        grad(static_cast<const G*>(p.grad) + first * p.height * p.width * p.padded),
        out(static_cast<G*>(p.out) + first * p.height * p.width * p.padded),
        channels(static_cast<unsigned>(p.channels)),
        width(static_cast<unsigned>(p.width)) {}
  __device__ __forceinline__ bool aligned() const { return false; }
  __device__ __forceinline__ Place place(int64_t at) const {
    const int64_t sample = at / p.elements;
    const unsigned element = static_cast<unsigned>(at - sample * p.elements);
    const unsigned pixel = element / channels, channel = element - pixel * channels, line = pixel / width;
    return {channel,
            sample * p.elements + channel * p.channel_stride + line * p.row_stride +
                (pixel - line * width) * p.column_stride,
            (sample * p.height * p.width + pixel) * p.padded + channel};
  }
  __device__ __forceinline__ void load_both(int64_t at, float (&value)[1], float (&clean)[1]) const {
    images.load_both(place(at).image, value, clean);
  }
  template <bool Sign>
  __device__ __forceinline__ void load_grad(int64_t at, float (&value)[1]) const {
    const Place to = place(at);
    widen(load<1>(grad + to.row), value);
    value[0] = through_scale<Sign>(value[0], p.std[to.channel]);
    images.keep(to.image, value);
  }
  __device__ __forceinline__ void write(int64_t at, const float (&value)[1]) const {
    const Place to = place(at);
    images.write(to.image, value);
    const float normalized[] = {(value[0] - p.mean[to.channel]) / p.std[to.channel]};
    store<1>(out + to.row, narrow<1, G>(normalized));
    if (to.channel + 1 < channels) return;
    const float zero[] = {0.0f};
#pragma unroll 1
    for (int64_t i = 1; i <= p.padded - p.channels; ++i) store<1>(out + to.row + i, narrow<1, G>(zero));
  }
};

namespace {

template <int Items, class View>
__device__ __forceinline__ void step_linf(const PgdStep& p, const View& view, int64_t at) {
  constexpr int N = Items * View::kValues;
  float value[N], x[N], grad[N];
  view.load_both(at, value, x);
  view.template load_grad<true>(at, grad);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // NaN compares false twice: sign 0
    const float sign = static_cast<float>((grad[i] > 0.0f) - (grad[i] < 0.0f));
    value[i] = project_linf(value[i] + p.step * sign, x[i], p.epsilon, p.low, p.high);
  }
  view.write(at, value);
}

// The image after the ascent step, before the projection, and the clean one.
template <int N, class View>
__device__ __forceinline__ void load_moved(const View& view, int64_t at, bool usable, double factor, float (&value)[N],
                                           float (&x)[N]) {
  float grad[N];
  view.load_both(at, value, x);
  view.template load_grad<false>(at, grad);
  if (!usable) return;
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] += static_cast<float>(factor * static_cast<double>(grad[i]));
}

}  // namespace

// One pack a thread.
template <class View>
__global__ void __launch_bounds__(kThreads)
    pgd_step_linf(const __grid_constant__ typename View::Arguments p, int64_t items) {
  constexpr int N = View::kPack;
  const View view(p, 0);
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (first + N <= items && view.aligned()) {
    step_linf<N>(p, view, first);
  } else {
#pragma unroll 1
    for (int64_t at = first; at < first + N && at < items; ++at) step_linf<1>(p, view, at);
  }
}

// One block a sample. The moved image is computed three times from L1 and L2 instead of being kept. Registers of a
// whole multiprocessor: with those for two blocks the divisions' slow path spills.
template <class View>
__global__ void __launch_bounds__(kSampleThreads, 1) pgd_step_l2(const __grid_constant__ typename View::Arguments p) {
  constexpr int kPack = View::kPack;
  __shared__ double shared[kSampleThreads / kWarp];
  const View view(p, blockIdx.x);
  const int64_t items = p.elements / View::kValues;
  const bool wide = view.aligned();
  const int rank = static_cast<int>(threadIdx.x);

  double squares = 0;
  walk<kPack, 2>(items, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value * View::kValues, M = decltype(unroll)::value;
    float grad[M][N];
#pragma unroll
    for (int m = 0; m < M; ++m) view.template load_grad<false>(first + m * step, grad[m]);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares = fma(static_cast<double>(grad[m][i]), static_cast<double>(grad[m][i]), squares);
      }
    }
  });
  const double norm = sqrt(block_sum<kSampleThreads>(squares, shared));
  // also false for NaN
  const bool usable = norm > 0.0 && norm <= 1.7976931348623157e308;
  const double factor = usable ? p.step_size / norm : 0.0;

  double distance_squares = 0;
  walk<kPack, 1>(items, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value * View::kValues, M = decltype(unroll)::value;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float value[N], x[N];
      load_moved(view, first + m * step, usable, factor, value, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double delta = static_cast<double>(value[i] - x[i]);
        distance_squares = fma(delta, delta, distance_squares);
      }
    }
  });
  const double distance = sqrt(block_sum<kSampleThreads>(distance_squares, shared));
  const bool outside = distance > p.radius;
  const float shrink = outside ? static_cast<float>(p.radius / distance) : 1.0f;

  walk<kPack, 1>(items, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value * View::kValues, M = decltype(unroll)::value;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float value[N], x[N];
      load_moved(view, first + m * step, usable, factor, value, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (outside) value[i] = x[i] + (value[i] - x[i]) * shrink;
        value[i] = clamp(value[i], p.low, p.high);
      }
      view.write(first + m * step, value);
    }
  });
}

namespace {

template <class View>
cudaError_t step(const typename View::Arguments& p, cudaStream_t stream) {
  if (p.norm == Norm::kL2) return launch(pgd_step_l2<View>, p.samples, kSampleThreads, stream, p);
  const int64_t items = p.samples * p.elements / View::kValues;
  return launch(pgd_step_linf<View>, ceil_div(items, int64_t{kThreads} * View::kPack), kThreads, stream, p, items);
}

}  // namespace

cudaError_t pgd_step(const PgdStep& p, cudaStream_t stream) {
  if (p.samples * p.elements == 0) return cudaSuccess;
  return visit(p.dtype, [&](auto dtype) {
    return visit(p.grad_dtype, [&](auto grad_dtype) {
      return step<Flat<typename decltype(dtype)::type, typename decltype(grad_dtype)::type>>(p, stream);
    });
  });
}

cudaError_t pgd_step_normalize(const PgdStepNormalize& p, cudaStream_t stream) {
  if (p.samples * p.elements == 0) return cudaSuccess;
  return visit(p.grad_dtype, [&](auto dtype) {
    using G = typename decltype(dtype)::type;
    return Pixels<G>::fits(p) ? step<Pixels<G>>(p, stream) : step<Elements<G>>(p, stream);
  });
}

}  // namespace awp::cuda
