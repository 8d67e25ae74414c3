// Cuts the operations into pieces for the threads. Sums are added up in an order that does not depend on their number.
#include <algorithm>
#include <cmath>
#include <vector>

#include "awp/cpu.h"
#include "awp/perturb.h"
#include "kernels.h"

namespace awp::cpu {
namespace {

// Elements a thread takes at a time.
constexpr int64_t kChunk = 16 * 1024;
// Tensors are taken together until they hold this many elements, so that the second pass finds them in the cache.
constexpr int64_t kGroup = 512 * 1024;

const Kernels& kernels() {
#if defined(AWP_HAVE_AVX2)
  static const Kernels& chosen =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
          ? kAvx2Kernels
          : kBaselineKernels;
  return chosen;
#else
  return kBaselineKernels;
#endif
}

struct Squares {
  double weight, grad;
};

struct Chunk {
  int64_t tensor, begin, count;
  Squares sum;
};

// The tensors [first, last) in chunks, in their order.
template <class List>
std::vector<Chunk> chunks_of(const List& list, int64_t first, int64_t last) {
  std::vector<Chunk> chunks;
  for (int64_t i = first; i < last; ++i) {
    for (int64_t begin = 0; begin < list.tensors[i].numel; begin += kChunk) {
      chunks.push_back({i, begin, std::min(kChunk, list.tensors[i].numel - begin), {}});
    }
  }
  return chunks;
}

// Sums of squares of w, where they are wanted, and of g or T g.
Squares squares(const Perturb& p, const PerturbTensor& t, int64_t begin, int64_t count) {
  Squares result{0, 0};
  if (p.scale == Scale::kRelative && !p.weight_norms)
    result.weight = kernels().sum_of_squares(advance(t.weight, p.weight_dtype, begin), p.weight_dtype, count);
  result.grad = is_adaptive(p, t) ? kernels().sum_of_scaled_squares(p, t, begin, count)
                                  : kernels().sum_of_squares(advance(t.grad, p.grad_dtype, begin), p.grad_dtype, count);
  return result;
}

float scale_from(const Perturb& p, Squares sum) {
  return perturb_scale(p.gamma, p.eps, p.scale == Scale::kRelative, sum.weight, sum.grad);
}

void perturb_filters(const Perturb& p, const ParallelFor& parallel_for) {
  float* scales = p.scales;
  for (int64_t i = 0; i < p.count; ++i) {
    const PerturbTensor& t = p.tensors[i];
    const int64_t length = t.filters ? t.numel / t.filters : 0;
    parallel_for(t.filters, std::max<int64_t>(1, kChunk / std::max<int64_t>(1, length)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t filter = begin; filter < end; ++filter) {
                     const int64_t at = filter * length;
                     scales[filter] = scale_from(p, squares(p, t, at, length));
                     kernels().perturb(p, t, at, length, scales[filter]);
                   }
                 });
    scales += t.filters;
  }
}

// Norms, then the move, of the tensors [first, last); with one common norm or one each.
void perturb_group(const Perturb& p, int64_t first, int64_t last, bool common, const ParallelFor& parallel_for) {
  std::vector<Chunk> chunks = chunks_of(p, first, last);
  const int64_t count = static_cast<int64_t>(chunks.size());
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Chunk& chunk = chunks[c];
      chunk.sum = squares(p, p.tensors[chunk.tensor], chunk.begin, chunk.count);
    }
  });
  const int64_t norms = common ? 1 : last - first;
  std::vector<Squares> sums(norms);
  for (const Chunk& chunk : chunks) {
    Squares& sum = sums[common ? 0 : chunk.tensor - first];
    sum.weight += chunk.sum.weight;
    sum.grad += chunk.sum.grad;
  }
  for (int64_t i = first; p.weight_norms && i < last; ++i) {
    sums[common ? 0 : i - first].weight += p.weight_norms[i] * p.weight_norms[i];
  }
  float* scales = p.scales + (common ? 0 : first);
  for (int64_t norm = 0; norm < norms; ++norm) scales[norm] = scale_from(p, sums[norm]);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    // backwards: what a thread read last is what its caches still hold
    for (int64_t c = end - 1; c >= begin; --c) {
      const Chunk& chunk = chunks[c];
      const float scale = scales[common ? 0 : chunk.tensor - first];
      kernels().perturb(p, p.tensors[chunk.tensor], chunk.begin, chunk.count, scale);
    }
  });
}

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

void perturb(const Perturb& p, const ParallelFor& parallel_for) {
  if (p.scope == Scope::kFilter) return perturb_filters(p, parallel_for);
  if (p.scope == Scope::kGlobal) return perturb_group(p, 0, p.count, true, parallel_for);
  for (int64_t first = 0; first < p.count;) {
    int64_t last = first, elements = 0;
    while (last < p.count && (last == first || elements + p.tensors[last].numel <= kGroup)) {
      elements += p.tensors[last++].numel;
    }
    perturb_group(p, first, last, false, parallel_for);
    first = last;
  }
}

void restore(const CopyTensor* tensors, int64_t count, const ParallelFor& parallel_for) {
  constexpr int64_t kBytes = 4 * kChunk;
  std::vector<CopyTensor> pieces;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t begin = 0; begin < tensors[i].bytes; begin += kBytes) {
      pieces.push_back({static_cast<char*>(tensors[i].destination) + begin,
                        static_cast<const char*>(tensors[i].source) + begin,
                        std::min(kBytes, tensors[i].bytes - begin)});
    }
  }
  parallel_for(static_cast<int64_t>(pieces.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().copy(pieces[i].destination, pieces[i].source, pieces[i].bytes);
  });
}

void sgd_step(const SgdStep& s, const ParallelFor& parallel_for) {
  const SgdFactors factors = sgd_factors(s.rule);
  std::vector<Chunk> chunks = chunks_of(s, 0, s.count);
  parallel_for(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Chunk& chunk = chunks[c];
      chunk.sum.weight = kernels().sgd_step(s, s.tensors[chunk.tensor], factors, chunk.begin, chunk.count);
    }
  });
  std::fill_n(s.norms, s.count, 0.0);
  for (const Chunk& chunk : chunks) s.norms[chunk.tensor] += chunk.sum.weight;
  for (int64_t i = 0; i < s.count; ++i) s.norms[i] = std::sqrt(s.norms[i]);
}

void total_norm(const TotalNorm& n, const ParallelFor& parallel_for) {
  std::vector<Chunk> chunks = chunks_of(n, 0, n.count);
  parallel_for(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const NormTensor& t = n.tensors[chunks[c].tensor];
      chunks[c].sum.grad =
          kernels().sum_of_squares(advance(t.data, t.dtype, chunks[c].begin), t.dtype, chunks[c].count);
    }
  });
  double total = 0;
  for (const Chunk& chunk : chunks) total += chunk.sum.grad;
  *n.norm = std::sqrt(total);
}

void pgd_init(const PgdInit& arguments, const ParallelFor& parallel_for) {
  const auto sample = arguments.norm == Norm::kLinf ? kernels().pgd_init_linf
                      : arguments.norm == Norm::kL2 ? kernels().pgd_init_l2
                                                    : kernels().pgd_init_normal;
  parallel_for(arguments.samples, std::max<int64_t>(1, 1024 / arguments.elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sample(arguments, i);
  });
}

void pgd_step(const PgdStep& arguments, const ParallelFor& parallel_for) {
  if (arguments.norm == Norm::kLinf) {
    parallel_for(arguments.samples * arguments.elements, kChunk,
                 [&](int64_t begin, int64_t end) { kernels().pgd_step_linf(arguments, begin, end); });
    return;
  }
  parallel_for(arguments.samples, std::max<int64_t>(1, kChunk / arguments.elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().pgd_step_l2(arguments, i);
  });
}

}  // namespace awp::cpu
