// Residual sum, batch normalisation and activation: see awp/bn_act.h. Every thread stays with its channels and goes
// down the rows; sums over the rows are fp32 in a thread, then fp64 in a fixed order.
#include <cfloat>
#include <type_traits>

#include "awp/cuda.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace awp::cuda {

// How the matrix is cut: a block takes rows of a tile of channels, its threads packs of some rows side by side.
struct BnCut {
  int pack, columns, lanes;     // channels a thread; threads a row; rows at a time
  int64_t tiles, rows, blocks;  // of channels; a block's rows; how often they go into all rows
};

struct BnLaunch {
  BnAct a;
  BnCut cut;
};

namespace {

constexpr int kPack = 8;                 // channels a thread, where they come in eights: 16 bytes of 16-bit values
constexpr int64_t kSumBlocks = 512;      // of rows, whose sums are added up afterwards; about four a multiprocessor
constexpr int kRowsAThread = 8;          // where nothing is summed
constexpr int kChannelsAtOnce = kWarps;  // of a block that adds up; a warp takes a channel

BnCut cut(const BnAct& a, bool wide, bool summed) {
  BnCut c{};
  c.pack = wide ? kPack : 1;
  const int64_t packs = a.channels / c.pack;
  c.columns = static_cast<int>(packs < kThreads ? packs : kThreads);
  c.lanes = kThreads / c.columns;
  c.tiles = ceil_div(packs, c.columns);
  const int64_t least = int64_t{c.lanes} * kRowsAThread, share = ceil_div(a.rows, kSumBlocks);
  c.rows = summed && share > least ? share : least;
  c.blocks = ceil_div(a.rows, c.rows);
  return c;
}

// Sums of the largest cut, that of unaligned memory included.
int64_t sum_blocks(const BnAct& a) {
  const int64_t narrow = cut(a, false, true).blocks, wide = cut(a, a.channels % kPack == 0, true).blocks;
  return narrow > wide ? narrow : wide;
}

// What a thread works on.
struct BnPlace {
  int64_t first, end, channel;  // its first row, the end of the block's, its first channel
  int64_t block;
  int lane;
  bool active;

  __device__ __forceinline__ explicit BnPlace(const BnLaunch& l) {
    const int column = static_cast<int>(threadIdx.x) % l.cut.columns;
    lane = static_cast<int>(threadIdx.x) / l.cut.columns;
    block = blockIdx.x / l.cut.tiles;
    channel = (blockIdx.x % l.cut.tiles * l.cut.columns + column) * l.cut.pack;
    active = lane < l.cut.lanes && channel < l.a.channels;
    first = block * l.cut.rows + lane;
    const int64_t last = (block + 1) * l.cut.rows;
    end = active ? (last < l.a.rows ? last : l.a.rows) : 0;
  }
};

// Calls f(count, row), count a constant, for rows count * lanes apart that are loaded together.
template <int Count, class F>
__device__ __forceinline__ void for_rows(const BnPlace& at, int lanes, const F& f) {
  int64_t row = at.first;
#pragma unroll 1
  for (; row + (Count - 1) * int64_t{lanes} < at.end; row += int64_t{Count} * lanes)
    f(std::integral_constant<int, Count>{}, row);
#pragma unroll 1
  for (; row < at.end; row += lanes) f(std::integral_constant<int, 1>{}, row);
}

// Rows in flight a thread, where it reads one or two arrays, and where it reads three.
template <typename T>
constexpr int kRows = sizeof(T) == 4 ? 2 : 4;
template <typename T>
constexpr int kRowsOfThree = kRows<T> / 2;

// z as it is stored; with Add it is made of x and the residual, and written.
template <int N, typename T, bool Add>
struct Source {
  const T *x, *residual;
  T* z;
  __device__ __forceinline__ explicit Source(const BnAct& a)
      : x(static_cast<const T*>(Add ? a.x : a.z)),
        residual(static_cast<const T*>(a.residual)),
        z(static_cast<T*>(a.z)) {}
  template <int M>
  __device__ __forceinline__ void load_all(int64_t at, int64_t step, float (&value)[M][N]) const {
    Pack<T, N> packs[M], others[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      packs[m] = load<N>(x + at + m * step);
      if constexpr (Add) others[m] = load<N>(residual + at + m * step);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if constexpr (Add) {
        float sum[N], other[N];
        widen(packs[m], sum);
        widen(others[m], other);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += other[i];
        packs[m] = narrow<N, T>(sum);
        store<N>(z + at + m * step, packs[m]);
      }
      widen(packs[m], value[m]);
    }
  }
};

// A pivot close to the mean of the block's rows, so that deviations from it are small.
template <int N, typename T, bool Add>
__device__ __forceinline__ void find_pivot(const BnLaunch& l, const BnPlace& at, float (&pivot)[N]) {
  constexpr int kPlaces = 4;
  const T *x = static_cast<const T*>(Add ? l.a.x : l.a.z), *residual = static_cast<const T*>(l.a.residual);
  const int64_t begin = at.block * l.cut.rows, step = (at.end - begin) / kPlaces;
  float sum[N] = {};
#pragma unroll
  for (int place = 0; place < kPlaces; ++place) {
    const int64_t from = (begin + place * step) * l.a.channels + at.channel;
    float value[N], other[N] = {};
    widen(load<N>(x + from), value);
    if constexpr (Add) widen(load<N>(residual + from), other);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += value[i] + other[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float mean = sum[i] * (1.0f / kPlaces);
    pivot[i] = fabsf(mean) <= FLT_MAX ? mean : 0.0f;
  }
}

// Adds two sums a channel up over the block's lanes, lane after lane; f(channel of the block, sum, other) takes them.
template <int N, class F>
__device__ __forceinline__ void over_lanes(const BnLaunch& l, const BnPlace& at, const float (&one)[N],
                                           const float (&two)[N], const F& f) {
  __shared__ float shared[2][kThreads * N];
  const int width = l.cut.columns * N;
  const int own = at.lane * width + static_cast<int>(threadIdx.x) % l.cut.columns * N;
  if (at.lane < l.cut.lanes) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      shared[0][own + i] = one[i];
      shared[1][own + i] = two[i];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kThreads) {
    const int64_t channel = blockIdx.x % l.cut.tiles * width + c;
    if (channel >= l.a.channels) continue;
    float first = 0, second = 0;
#pragma unroll 4
    for (int lane = 0; lane < l.cut.lanes; ++lane) {
      first += shared[0][lane * width + c];
      second += shared[1][lane * width + c];
    }
    f(c, channel, first, second);
  }
}

__device__ __forceinline__ float sigmoid(float u) { return 1.0f / (1.0f + expf(-u)); }

// ReLU and none: `floor` is 0 or minus infinity; NaN goes through.
template <bool Silu>
__device__ __forceinline__ float activated(float u, float floor) {
  if constexpr (Silu) return u * sigmoid(u);
  return u <= floor ? floor : u;
}

template <bool Silu>
__device__ __forceinline__ float through_activation(float u, float floor, float gradient) {
  if constexpr (Silu) {
    const float s = sigmoid(u);
    return gradient * (s + u * (s * (1.0f - s)));
  }
  return u <= floor ? 0.0f : gradient;
}

__device__ __forceinline__ float floor_of(Activation kind) {
  return kind == Activation::kRelu ? 0.0f : -__builtin_huge_valf();
}

struct Affine {
  float mean, scale, bias;
  __device__ __forceinline__ float operator()(float z) const { return fmaf(z - mean, scale, bias); }
};

template <int N>
__device__ __forceinline__ void load_affine(const BnAct& a, int64_t channel, Affine (&of)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float* column = a.table + channel + i;
    of[i] = {column[kBnMean * a.stride], column[kBnScale * a.stride], column[kBnBias * a.stride]};
  }
}

// From the running statistics; the first block of rows leaves them to the backward pass.
template <int N>
__device__ __forceinline__ void fill_affine(const BnAct& a, const BnParameters& p, const BnPlace& at, Affine (&of)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t c = at.channel + i;
    const float invstd = 1.0f / sqrtf(p.running_variance[c] + static_cast<float>(p.eps));
    of[i] = {p.running_mean[c], p.weight != nullptr ? p.weight[c] * invstd : invstd,
             p.bias != nullptr ? p.bias[c] : 0.0f};
    if (at.block != 0 || at.lane != 0) continue;
    a.table[kBnMean * a.stride + c] = of[i].mean;
    a.table[kBnInvstd * a.stride + c] = invstd;
    a.table[kBnScale * a.stride + c] = of[i].scale;
    a.table[kBnBias * a.stride + c] = of[i].bias;
  }
}

}  // namespace

// Pivot, mean less the pivot, and sum of squared deviations of every block of rows: parts[block][3][channels].
template <int N, typename T, bool Add>
__global__ void __launch_bounds__(kThreads, 2) bn_statistics(const __grid_constant__ BnLaunch l, float* parts) {
  const BnPlace at(l);
  const Source<N, T, Add> source(l.a);
  float pivot[N] = {}, sum[N] = {}, square[N] = {};
  __shared__ float pivots[kThreads * N];
  float* own = pivots + static_cast<int>(threadIdx.x) % l.cut.columns * N;
  if (at.lane == 0 && at.active) find_pivot<N, T, Add>(l, at, pivot);
  if (at.lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] = pivot[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) pivot[i] = own[i];
  for_rows<kRows<T>>(at, l.cut.lanes, [&](auto count, int64_t row) {
    constexpr int M = decltype(count)::value;
    float value[M][N];
    source.load_all(row * l.a.channels + at.channel, l.cut.lanes * l.a.channels, value);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float deviation = value[m][i] - pivot[i];
        sum[i] += deviation;
        square[i] = fmaf(deviation, deviation, square[i]);
      }
    }
  });
  const int64_t begin = at.block * l.cut.rows, left = l.a.rows - begin;
  const float rows = static_cast<float>(left < l.cut.rows ? left : l.cut.rows);
  over_lanes<N>(l, at, sum, square, [&](int c, int64_t channel, float first, float second) {
    float* to = parts + at.block * 3 * l.a.channels + channel;
    const float mean = first / rows;
    to[0] = pivots[c];
    to[l.a.channels] = mean;
    to[2 * l.a.channels] = second - first * mean;
  });
}

// A warp adds up a channel's parts, fills the table and moves the running statistics.
__global__ void __launch_bounds__(kThreads, 2)
    bn_finish_statistics(const __grid_constant__ BnLaunch l, const __grid_constant__ BnParameters p,
                         const float* parts) {
  const int64_t channel = int64_t{blockIdx.x} * kChannelsAtOnce + threadIdx.x / kWarp;
  const bool inside = channel < l.a.channels;
  const double origin = inside ? parts[channel] : 0.0;
  SumPair total{0, 0};
#pragma unroll 4
  for (int64_t block = threadIdx.x % kWarp; inside && block < l.cut.blocks; block += kWarp) {
    const float* part = parts + block * 3 * l.a.channels + channel;
    const int64_t left = l.a.rows - block * l.cut.rows;
    const double rows = static_cast<double>(left < l.cut.rows ? left : l.cut.rows);
    const double distance = static_cast<double>(part[0]) - origin + static_cast<double>(part[l.a.channels]);
    total.weight += rows * distance;
    total.grad += static_cast<double>(part[2 * l.a.channels]) + rows * distance * distance;
  }
  total = warp_sum(total);
  if (!inside || threadIdx.x % kWarp != 0) return;
  const double rows = static_cast<double>(l.a.rows), distance = total.weight / rows, mean = origin + distance;
  const double spread = total.grad - total.weight * distance;
  // rounding could make it negative; NaN stays
  const double squares = spread < 0 ? 0 : spread, invstd = 1 / sqrt(squares / rows + p.eps);
  float* table = l.a.table + channel;
  table[kBnMean * l.a.stride] = static_cast<float>(mean);
  table[kBnInvstd * l.a.stride] = static_cast<float>(invstd);
  table[kBnScale * l.a.stride] = static_cast<float>((p.weight != nullptr ? p.weight[channel] : 1.0f) * invstd);
  table[kBnBias * l.a.stride] = p.bias != nullptr ? p.bias[channel] : 0.0f;
  if (p.statistics != nullptr) {
    p.statistics[channel] = mean;
    p.statistics[l.a.channels + channel] = squares;
  }
  const auto move = [&](float* running, double value) {
    if (running == nullptr) return;
    running[channel] = static_cast<float>((1 - p.momentum) * running[channel] + p.momentum * value);
  };
  move(p.running_mean, mean);
  move(p.running_variance, squares / (rows - 1));
}

// By the table; or, where p has running statistics, by those.
template <int N, typename T, bool Add, bool Silu>
__global__ void __launch_bounds__(kThreads, 2)
    bn_normalize(const __grid_constant__ BnLaunch l, const __grid_constant__ BnParameters p, void* y, uint8_t* mask) {
  const BnPlace at(l);
  if (!at.active) return;
  const Source<N, T, Add> source(l.a);
  Affine affine[N];
  if (p.running_mean != nullptr) {
    fill_affine(l.a, p, at, affine);
  } else {
    load_affine(l.a, at.channel, affine);
  }
  const float floor = floor_of(l.a.activation);
  for_rows<kRows<T>>(at, l.cut.lanes, [&](auto count, int64_t row) {
    constexpr int M = decltype(count)::value;
    const int64_t from = row * l.a.channels + at.channel, step = l.cut.lanes * l.a.channels;
    float value[M][N];
    source.load_all(from, step, value);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float u = affine[i](value[m][i]);
        bits |= u <= 0.0f ? 0u : 1u << i;
        value[m][i] = activated<Silu>(u, floor);
      }
      store<N>(static_cast<T*>(y) + from + m * step, narrow<N, T>(value[m]));
      if (N == kPack && mask != nullptr) {
        mask[(row + m * l.cut.lanes) * (l.a.stride / 8) + at.channel / 8] = static_cast<uint8_t>(bits);
      }
    }
  });
}

// Sums of g and of g (z - mean) over every block of rows: parts[block][2][channels].
template <int N, typename T, bool Silu>
__global__ void __launch_bounds__(kThreads, 2)
    bn_gradient_sums(const __grid_constant__ BnLaunch l, const void* grad, float* parts) {
  const BnPlace at(l);
  const Source<N, T, false> source(l.a);
  Affine affine[N] = {};
  if (at.active) load_affine(l.a, at.channel, affine);
  const float floor = floor_of(l.a.activation);
  float sum[N] = {}, product[N] = {};
  for_rows<kRows<T>>(at, l.cut.lanes, [&](auto count, int64_t row) {
    constexpr int M = decltype(count)::value;
    const int64_t from = row * l.a.channels + at.channel, step = l.cut.lanes * l.a.channels;
    Pack<T, N> packs[M];
#pragma unroll
    for (int m = 0; m < M; ++m) packs[m] = load<N>(static_cast<const T*>(grad) + from + m * step);
    float value[M][N];
    source.load_all(from, step, value);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float given[N];
      widen(packs[m], given);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float g = through_activation<Silu>(affine[i](value[m][i]), floor, given[i]);
        sum[i] += g;
        product[i] = fmaf(g, value[m][i] - affine[i].mean, product[i]);
      }
    }
  });
  over_lanes<N>(l, at, sum, product, [&](int, int64_t channel, float first, float second) {
    float* to = parts + at.block * 2 * l.a.channels + channel;
    to[0] = first;
    to[l.a.channels] = second;
  });
}

// A warp adds up a channel's parts: coefficients[2][stride] of the gradient for x, and those for weight and bias.
__global__ void __launch_bounds__(kThreads, 2)
    bn_finish_sums(const __grid_constant__ BnLaunch l, const __grid_constant__ BnGradients g, const float* parts,
                   float* coefficients) {
  const int64_t channel = int64_t{blockIdx.x} * kChannelsAtOnce + threadIdx.x / kWarp;
  const bool inside = channel < l.a.channels;
  SumPair total{0, 0};
#pragma unroll 4
  for (int64_t block = threadIdx.x % kWarp; inside && block < l.cut.blocks; block += kWarp) {
    const float* part = parts + block * 2 * l.a.channels + channel;
    total.weight += static_cast<double>(part[0]);
    total.grad += static_cast<double>(part[l.a.channels]);
  }
  total = warp_sum(total);
  if (!inside || threadIdx.x % kWarp != 0) return;
  const double rows = static_cast<double>(l.a.rows), invstd = l.a.table[kBnInvstd * l.a.stride + channel];
  coefficients[channel] = static_cast<float>(total.weight / rows);
  coefficients[l.a.stride + channel] = static_cast<float>(total.grad * invstd * invstd / rows);
  if (g.weight != nullptr) g.weight[channel] = static_cast<float>(total.grad * invstd);
  if (g.bias != nullptr) g.bias[channel] = static_cast<float>(total.weight);
}

// scale (g - constant - (z - mean) slope) and z's own gradient; without coefficients scale g.
template <int N, typename T, bool Silu>
__global__ void __launch_bounds__(kThreads, 2)
    bn_gradient(const __grid_constant__ BnLaunch l, const __grid_constant__ BnGradients g, const float* coefficients) {
  const BnPlace at(l);
  if (!at.active) return;
  Affine affine[N];
  load_affine(l.a, at.channel, affine);
  float constant[N] = {}, slope[N] = {};
  if (coefficients != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      constant[i] = coefficients[at.channel + i];
      slope[i] = coefficients[l.a.stride + at.channel + i];
    }
  }
  const float floor = floor_of(l.a.activation);
  for_rows<kRowsOfThree<T>>(at, l.cut.lanes, [&](auto count, int64_t row) {
    constexpr int M = decltype(count)::value;
    const int64_t from = row * l.a.channels + at.channel, step = l.cut.lanes * l.a.channels;
    Pack<T, N> given[M], value[M], beside[M];
    uint8_t bits[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      given[m] = load<N>(static_cast<const T*>(g.y) + from + m * step);
      if (g.z != nullptr) beside[m] = load<N>(static_cast<const T*>(g.z) + from + m * step);
      if (g.mask != nullptr) {
        bits[m] = g.mask[(row + m * l.cut.lanes) * (l.a.stride / 8) + at.channel / 8];
      } else {
        value[m] = load<N>(static_cast<const T*>(l.a.z) + from + m * step);
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float gradient[N], z[N], other[N] = {};
      widen(given[m], gradient);
      if (g.z != nullptr) widen(beside[m], other);
      if (g.mask == nullptr) widen(value[m], z);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (g.mask != nullptr) {
          gradient[i] = (bits[m] >> i & 1) != 0 ? gradient[i] : 0.0f;
        } else {
          const float before = through_activation<Silu>(affine[i](z[i]), floor, gradient[i]);
          gradient[i] = before - fmaf(z[i] - affine[i].mean, slope[i], constant[i]);
        }
        gradient[i] = fmaf(gradient[i], affine[i].scale, other[i]);
      }
      store<N>(static_cast<T*>(g.x) + from + m * step, narrow<N, T>(gradient));
    }
  });
}

namespace {

// f(dtype, pack), with 8 channels a thread where the memory allows them.
template <class F, class... Pointers>
cudaError_t by_width(const BnAct& a, const F& f, Pointers... pointers) {
  const bool wide = a.channels % kPack == 0 && ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
  return visit(a.dtype, [&](auto dtype) {
    return wide ? f(dtype, std::integral_constant<int, kPack>{}) : f(dtype, std::integral_constant<int, 1>{});
  });
}

template <class F>
cudaError_t by_flag(bool flag, const F& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

cudaError_t normalize(const BnAct& a, const BnParameters& p, void* y, uint8_t* mask, cudaStream_t stream) {
  return by_width(
      a,
      [&](auto dtype, auto pack) {
        using T = typename decltype(dtype)::type;
        constexpr int N = decltype(pack)::value;
        const BnCut pieces = cut(a, N == kPack, false);
        return by_flag(a.residual != nullptr && p.running_mean != nullptr, [&](auto add) {
          return by_flag(a.activation == Activation::kSilu, [&](auto silu) {
            return launch(bn_normalize<N, T, add.value, silu.value>, pieces.tiles * pieces.blocks, kThreads, stream,
                          BnLaunch{a, pieces}, p, y, mask);
          });
        });
      },
      a.x, a.residual, static_cast<const void*>(a.z), static_cast<const void*>(y));
}

}  // namespace

int64_t bn_act_workspace_bytes(const BnAct& a) {
  return (3 * sum_blocks(a) * a.channels + 2 * a.stride) * static_cast<int64_t>(sizeof(float));
}

cudaError_t bn_act_train(const BnAct& a, const BnParameters& p, void* y, void* workspace, cudaStream_t stream) {
  float* parts = static_cast<float*>(workspace);
  cudaError_t error = by_width(
      a,
      [&](auto dtype, auto pack) {
        using T = typename decltype(dtype)::type;
        constexpr int N = decltype(pack)::value;
        const BnLaunch l{a, cut(a, N == kPack, true)};
        const cudaError_t failed = by_flag(a.residual != nullptr, [&](auto add) {
          return launch(bn_statistics<N, T, add.value>, l.cut.tiles * l.cut.blocks, kThreads, stream, l, parts);
        });
        if (failed != cudaSuccess) return failed;
        return launch(bn_finish_statistics, ceil_div(a.channels, int64_t{kChannelsAtOnce}), kThreads, stream, l, p,
                      static_cast<const float*>(parts));
      },
      a.x, a.residual, static_cast<const void*>(a.z));
  if (error != cudaSuccess || y == nullptr) return error;
  BnParameters by_table = p;
  by_table.running_mean = by_table.running_variance = nullptr;
  return normalize(a, by_table, y, nullptr, stream);
}

cudaError_t bn_act_eval(const BnAct& a, const BnParameters& p, void* y, uint8_t* mask, cudaStream_t stream) {
  return normalize(a, p, y, mask, stream);
}

cudaError_t bn_act_backward(const BnAct& a, const BnGradients& g, void* workspace, cudaStream_t stream) {
  float *coefficients = static_cast<float*>(workspace), *parts = coefficients + 2 * a.stride;
  const bool own = g.train && g.coefficients == nullptr;
  return by_width(
      a,
      [&](auto dtype, auto pack) {
        using T = typename decltype(dtype)::type;
        constexpr int N = decltype(pack)::value;
        return by_flag(a.activation == Activation::kSilu, [&](auto silu) {
          if (g.mask == nullptr && (own || g.weight != nullptr || g.bias != nullptr)) {
            const BnLaunch l{a, cut(a, N == kPack, true)};
            cudaError_t error =
                launch(bn_gradient_sums<N, T, silu.value>, l.cut.tiles * l.cut.blocks, kThreads, stream, l, g.y, parts);
            if (error != cudaSuccess) return error;
            error = launch(bn_finish_sums, ceil_div(a.channels, int64_t{kChannelsAtOnce}), kThreads, stream, l, g,
                           static_cast<const float*>(parts), coefficients);
            if (error != cudaSuccess) return error;
          }
          if (g.x == nullptr) return cudaSuccess;
          const BnLaunch l{a, cut(a, N == kPack, false)};
          return launch(bn_gradient<N, T, silu.value>, l.cut.tiles * l.cut.blocks, kThreads, stream, l, g,
                        own ? static_cast<const float*>(coefficients) : g.coefficients);
        });
      },
      static_cast<const void*>(a.z), g.y, g.z, static_cast<const void*>(g.x));
}

}  // namespace awp::cuda
