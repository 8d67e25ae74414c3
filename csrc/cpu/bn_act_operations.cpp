// Cuts batch normalisation with an activation into pieces for the threads. Sums are added up in one order, whoever does
// it: fp32 within some rows, fp64 over these.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "bn_act.h"
#include "processor.h"
#include "tasks.h"

namespace awp::cpu {
namespace {

const BnActKernels* kernels() {
#if defined(AWP_HAVE_AVX2)
  static const BnActKernels* chosen = widest(&kAvx2BnAct, &kAvx512BnAct, &kAvx512Bf16BnAct);
  return chosen;
#else
  return nullptr;
#endif
}

// Blocks of rows that stay in the first-level cache or close to it.
struct Blocks {
  explicit Blocks(const BnAct& a, int64_t most = 256)
      : size(std::clamp<int64_t>(16384 / a.channels, 8, most)), count((a.rows + size - 1) / size), rows(a.rows) {}
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return std::min(rows, (block + 1) * size); }

  int64_t size, count, rows;
};

// Rows [begin, end) for every block of several at a time, so that a piece is worth handing out.
template <class Task>
void for_each_block(const Blocks& blocks, const ParallelFor& parallel_for, const Task& task) {
  constexpr int64_t kTogether = 4;
  for_each_task((blocks.count + kTogether - 1) / kTogether, parallel_for, [&](int64_t piece) {
    const int64_t last = std::min(blocks.count, (piece + 1) * kTogether);
    for (int64_t block = piece * kTogether; block < last; ++block) task(block, blocks.begin(block), blocks.end(block));
  });
}

float* row_of(const BnAct& a, BnRow row) { return a.table + row * a.stride; }

void fill_table(const BnAct& a, const BnParameters& p, int64_t channel, double mean, double variance) {
  const double invstd = 1 / std::sqrt(variance + p.eps);
  row_of(a, kBnMean)[channel] = static_cast<float>(mean);
  row_of(a, kBnInvstd)[channel] = static_cast<float>(invstd);
  row_of(a, kBnScale)[channel] = static_cast<float>((p.weight ? p.weight[channel] : 1.0f) * invstd);
  row_of(a, kBnBias)[channel] = p.bias ? p.bias[channel] : 0.0f;
}

// Something close to every channel's mean, so that deviations from it are small: the mean of rows from all over x. It
// lies where the mean will.
void find_pivots(const BnAct& a) {
  constexpr int64_t kMost = 5;  // no power of two, as sizes of images are: rows of all places in them
  const int64_t count = std::min(a.rows, kMost);
  float* pivots = row_of(a, kBnMean);
  std::fill_n(pivots, a.stride, 0.0f);
  std::vector<float> scratch(2 * a.stride);
  std::vector<double> row(2 * a.stride), sums(a.channels);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * a.rows / count;
    kernels()->statistics(a, at, at + 1, scratch.data(), row.data());
    for (int64_t c = 0; c < a.channels; ++c) sums[c] += row[c];
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const double pivot = sums[c] / static_cast<double>(count);
    pivots[c] = std::isfinite(pivot) ? static_cast<float>(pivot) : 0.0f;
  }
}

void normalize(const BnAct& a, bool add, void* y, uint8_t* mask, const ParallelFor& parallel_for) {
  for_each_block(Blocks(a), parallel_for,
                 [&](int64_t, int64_t begin, int64_t end) { kernels()->normalize(a, add, begin, end, y, mask); });
}

}  // namespace

bool bn_act_available() { return kernels() != nullptr; }

void bn_act_train(const BnAct& a, const BnParameters& p, void* y, const ParallelFor& parallel_for) {
  const Blocks blocks(a);
  const std::unique_ptr<double[]> parts(new double[blocks.count * 2 * a.stride]);  // not cleared
  std::vector<double> totals(2 * a.stride);
  find_pivots(a);
  for_each_block(blocks, parallel_for, [&](int64_t block, int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * a.stride);
    kernels()->statistics(a, begin, end, scratch.data(), parts.get() + block * 2 * a.stride);
  });
  for (int64_t block = 0; block < blocks.count; ++block) {
    for (int64_t i = 0; i < 2 * a.stride; ++i) totals[i] += parts[block * 2 * a.stride + i];
  }
  const double rows = static_cast<double>(a.rows);
  for (int64_t c = 0; c < a.channels; ++c) {
    const double distance = totals[c] / rows, mean = row_of(a, kBnMean)[c] + distance;
    const double spread = totals[a.stride + c] - totals[c] * distance;
    const double squares = spread < 0 ? 0 : spread;  // rounding could make it negative; NaN stays
    fill_table(a, p, c, mean, squares / rows);
    if (p.running_mean) {
      p.running_mean[c] = static_cast<float>((1 - p.momentum) * p.running_mean[c] + p.momentum * mean);
    }
    if (p.running_variance) {
      const double unbiased = squares / (rows - 1);
      p.running_variance[c] = static_cast<float>((1 - p.momentum) * p.running_variance[c] + p.momentum * unbiased);
    }
  }
  normalize(a, false, y, nullptr, parallel_for);
}

void bn_act_eval(const BnAct& a, const BnParameters& p, void* y, uint8_t* mask, const ParallelFor& parallel_for) {
  for (int64_t c = 0; c < a.channels; ++c) fill_table(a, p, c, p.running_mean[c], p.running_variance[c]);
  normalize(a, a.residual != nullptr, y, mask, parallel_for);
}

void bn_act_backward(const BnAct& a, const BnGradients& g, const ParallelFor& parallel_for) {
  const Blocks blocks(a, 64);  // longer fp32 sums lose digits
  std::vector<float> coefficients;
  if (!g.mask && (g.train || g.weight || g.bias)) {
    std::vector<float> parts(blocks.count * 2 * a.stride);
    for_each_block(blocks, parallel_for, [&](int64_t block, int64_t begin, int64_t end) {
      kernels()->sums(a, g.y, begin, end, parts.data() + block * 2 * a.stride);
    });
    std::vector<double> totals(2 * a.stride);
    for (int64_t block = 0; block < blocks.count; ++block) {
      for (int64_t i = 0; i < 2 * a.stride; ++i) totals[i] += parts[block * 2 * a.stride + i];
    }
    coefficients.resize(2 * a.stride);
    const double rows = static_cast<double>(a.rows);
    for (int64_t c = 0; c < a.channels; ++c) {
      const double invstd = row_of(a, kBnInvstd)[c], sum = totals[c], product = totals[a.stride + c];
      coefficients[c] = static_cast<float>(sum / rows);
      coefficients[a.stride + c] = static_cast<float>(product * invstd * invstd / rows);
      if (g.weight) g.weight[c] = static_cast<float>(product * invstd);
      if (g.bias) g.bias[c] = static_cast<float>(sum);
    }
  }
  if (!g.x) return;
  for_each_block(blocks, parallel_for, [&](int64_t, int64_t begin, int64_t end) {
    kernels()->grad_x(a, g, g.train ? coefficients.data() : nullptr, begin, end);
  });
}

}  // namespace awp::cpu
