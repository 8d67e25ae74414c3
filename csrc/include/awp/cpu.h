// The operations on CPU memory; the caller brings the threads.
#pragma once

#include <functional>

#include "awp/types.h"

namespace awp::cpu {

// Runs body over [0, count) in ranges of at least `grain`, on any number of threads.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

void perturb(const Perturb& arguments, const ParallelFor& parallel_for);
void restore(const CopyTensor* tensors, int64_t count, const ParallelFor& parallel_for);
void sgd_step(const SgdStep& arguments, const ParallelFor& parallel_for);
void total_norm(const TotalNorm& arguments, const ParallelFor& parallel_for);
void pgd_init(const PgdInit& arguments, const ParallelFor& parallel_for);
void pgd_step(const PgdStep& arguments, const ParallelFor& parallel_for);

// The instruction set that was chosen for this processor.
const char* instruction_set();

}  // namespace awp::cpu
