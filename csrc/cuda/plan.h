// Which block works on which elements: index arithmetic for host and device, free of CUDA so that a host test walks it.
#pragma once

#include <type_traits>

#include "awp/philox.h"
#include "awp/types.h"

#if defined(__CUDA_ARCH__)
#define AWP_NO_UNROLL _Pragma("unroll 1")
#else
#define AWP_NO_UNROLL
#endif

namespace awp::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarp;
constexpr int kSampleThreads = 512;     // of a block that holds one image: there are few of them
constexpr int64_t kShortFilter = 1024;  // up to here a warp takes a filter by itself

// The tables are kernel parameters; they stay under 7.5 KB, and an optimizer step's under 13 KB, of the 32 KB that a
// launch may carry.
constexpr int kPerturbCapacity = 144;
constexpr int kCopyCapacity = 256;
constexpr int kNormCapacity = 304;
constexpr int kSgdCapacity = 224;                 // all parameters of a WRN-70-16
constexpr int64_t kMaxBlocks = int64_t{1} << 27;  // of one launch, so that a scale's index fits 32 bits

// About two waves of blocks on an H200; every block of the second pass reads up to this many partial sums.
constexpr int64_t kChunks = 1024;
constexpr int64_t kChunkUnit = 4096;     // elements; keeps every chunk 16-byte aligned
constexpr int64_t kCopyChunk = 1 << 15;  // bytes: eight 16-byte loads a thread

struct SumPair {
  double weight, grad;
};

struct PerturbTable {
  void* out[kPerturbCapacity];
  const void* weight[kPerturbCapacity];
  const void* grad[kPerturbCapacity];
  void* saved[kPerturbCapacity];
  int64_t run[kPerturbCapacity];  // elements of a filter; of the tensor in the other scopes
  int32_t filters[kPerturbCapacity];
  int32_t first_block[kPerturbCapacity];
  int32_t first_scale[kPerturbCapacity];  // counted from the launch's first scale
  bool adaptive[kPerturbCapacity];        // T = |w| + eta
  int32_t count, blocks, scales;
};

struct CopyTable {
  void* destination[kCopyCapacity];
  const void* source[kCopyCapacity];
  int64_t bytes[kCopyCapacity];
  int32_t first_block[kCopyCapacity];
  int32_t count, blocks;
};

struct SgdTable {
  float* weight[kSgdCapacity];
  const void* grad[kSgdCapacity];
  float* buffer[kSgdCapacity];
  float* average[kSgdCapacity];
  void* out[kSgdCapacity];
  int64_t run[kSgdCapacity];
  int32_t first_block[kSgdCapacity];
  float decay[kSgdCapacity];
  int32_t count, blocks;
};

// Of a table's tensors, the first of the blocks that have summed each up; one entry more than tensors.
struct SumsTable {
  int32_t first[kSgdCapacity + 1];
  int32_t count;
};

struct NormTable {
  const void* data[kNormCapacity];
  int64_t run[kNormCapacity];
  int32_t first_block[kNormCapacity];
  DType dtype[kNormCapacity];
  int32_t count, blocks;
};

static_assert(sizeof(PerturbTable) <= 7680 && sizeof(CopyTable) <= 7680 && sizeof(NormTable) <= 7680);
static_assert(sizeof(SgdTable) <= 13312);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An empty tensor keeps one empty chunk, which writes its scale.
constexpr int64_t chunks_of(int64_t numel, int64_t chunk) { return numel > chunk ? ceil_div(numel, chunk) : 1; }

// Elements a block works on, of any list of tensors.
template <class List>
int64_t chunk_elements(const List& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) total += p.tensors[i].numel;
  const int64_t even = ceil_div(ceil_div(total, kChunks), kChunkUnit) * kChunkUnit;
  return even > kChunkUnit ? even : kChunkUnit;
}

template <class List>
int64_t total_chunks(const List& p, int64_t chunk) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.count; ++i) total += chunks_of(p.tensors[i].numel, chunk);
  return total;
}

// Begins an entry of so many blocks; returns its place, or -1 where the table is full.
template <class Table>
int begin_entry(Table* table, int64_t blocks) {
  constexpr int kCapacity = std::extent_v<decltype(Table::first_block)>;
  if (table->count == kCapacity || table->blocks + blocks > kMaxBlocks) return -1;
  table->first_block[table->count] = table->blocks;
  table->blocks += static_cast<int32_t>(blocks);
  return table->count++;
}

// Empties a table and calls append(i) for the tensors from `begin` on; returns the first one left over, for which it
// returned false.
template <class Table, class Append>
int64_t fill(Table* table, int64_t begin, int64_t count, Append&& append) {
  table->count = table->blocks = 0;
  while (begin < count && append(begin)) ++begin;
  return begin;
}

// Appends one tensor; false where the table is full.
inline bool append(PerturbTable* table, const Perturb& p, const PerturbTensor& t, int64_t run, int64_t filters,
                   int64_t blocks, int64_t scales) {
  const int at = begin_entry(table, blocks);
  if (at < 0) return false;
  table->out[at] = t.out;
  table->weight[at] = t.weight;
  table->grad[at] = t.grad;
  table->saved[at] = t.saved;
  table->run[at] = run;
  table->filters[at] = static_cast<int32_t>(filters);
  table->first_scale[at] = table->scales;
  table->adaptive[at] = is_adaptive(p, t);
  table->scales += static_cast<int32_t>(scales);
  return true;
}

// Fills a table with chunks of the tensors from `begin` on; returns the first tensor left over.
inline int64_t fill_chunks(PerturbTable* table, const Perturb& p, int64_t begin, int64_t chunk) {
  table->scales = 0;
  return fill(table, begin, p.count, [&](int64_t i) {
    const PerturbTensor& t = p.tensors[i];
    return append(table, p, t, t.numel, 1, chunks_of(t.numel, chunk), p.scope == Scope::kGlobal ? 0 : 1);
  });
}

// The same for an optimizer step.
inline int64_t fill_steps(SgdTable* table, const SgdStep& s, int64_t begin, int64_t chunk) {
  return fill(table, begin, s.count, [&](int64_t i) {
    const SgdTensor& t = s.tensors[i];
    const int at = begin_entry(table, chunks_of(t.numel, chunk));
    if (at < 0) return false;
    table->weight[at] = t.weight;
    table->grad[at] = t.grad;
    table->buffer[at] = t.buffer;
    table->average[at] = t.average;
    table->out[at] = t.out;
    table->run[at] = t.numel;
    table->decay[at] = t.decay;
    return true;
  });
}

// Where the sums of a table's tensors lie.
inline SumsTable sums_of(const SgdTable& table) {
  SumsTable sums;
  for (int i = 0; i < table.count; ++i) sums.first[i] = table.first_block[i];
  sums.first[table.count] = table.blocks;
  sums.count = table.count;
  return sums;
}

// The same for a norm.
inline int64_t fill_norms(NormTable* table, const TotalNorm& n, int64_t begin, int64_t chunk) {
  return fill(table, begin, n.count, [&](int64_t i) {
    const NormTensor& t = n.tensors[i];
    const int at = begin_entry(table, chunks_of(t.numel, chunk));
    if (at < 0) return false;
    table->data[at] = t.data;
    table->run[at] = t.numel;
    table->dtype[at] = t.dtype;
    return true;
  });
}

constexpr int64_t filter_blocks(int64_t run, int64_t filters) {
  return run <= kShortFilter ? ceil_div(filters, kWarps) : filters;
}

// The same with filters. A tensor of more filters than a launch holds is left over for ever: the caller must notice.
inline int64_t fill_filters(PerturbTable* table, const Perturb& p, int64_t begin) {
  table->scales = 0;
  return fill(table, begin, p.count, [&](int64_t i) {
    const PerturbTensor& t = p.tensors[i];
    if (t.filters == 0) return true;
    const int64_t run = t.numel / t.filters;
    return append(table, p, t, run, t.filters, filter_blocks(run, t.filters), t.filters);
  });
}

inline int64_t fill_copies(CopyTable* table, const CopyTensor* tensors, int64_t count, int64_t begin) {
  return fill(table, begin, count, [&](int64_t i) {
    const CopyTensor& t = tensors[i];
    if (t.bytes == 0) return true;
    const int at = begin_entry(table, ceil_div(t.bytes, kCopyChunk));
    if (at < 0) return false;
    table->destination[at] = t.destination;
    table->source[at] = t.source;
    table->bytes[at] = t.bytes;
    return true;
  });
}

// The entry that holds `block`: the last with first_block[i] <= block.
AWP_HOST_DEVICE int find_entry(const int32_t* first_block, int count, int32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <int Value>
using Int = std::integral_constant<int, Value>;

// Every element of [0, length) once, shared out over `size` threads. body(Int<N>, Int<M>, first, step) takes M packs of
// N elements, at first, first + step, ...; all packs lie at multiples of N. Packs of one where `wide` is false.
template <int N, int M, class Body>
AWP_HOST_DEVICE void walk(int64_t length, bool wide, int rank, int size, Body&& body) {
  const int64_t packs = wide ? length / N : 0;
  int64_t i = rank;
  // the body holds what unrolling is wanted; more costs registers
  AWP_NO_UNROLL
  for (; i + (M - 1) * size < packs; i += M * size) body(Int<N>{}, Int<M>{}, i * N, int64_t{N} * size);
  AWP_NO_UNROLL
  for (; i < packs; i += size) body(Int<N>{}, Int<1>{}, i * N, int64_t{0});
  constexpr int kSingles = 4;
  i = packs * N + rank;
  AWP_NO_UNROLL
  for (; i + (kSingles - 1) * size < length; i += kSingles * size) body(Int<1>{}, Int<kSingles>{}, i, int64_t{size});
  AWP_NO_UNROLL
  for (; i < length; i += size) body(Int<1>{}, Int<1>{}, i, int64_t{0});
}

}  // namespace awp::cuda
