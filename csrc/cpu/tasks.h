// Work for threads that take the next piece when they are done with one: another process on a core delays one piece.
#pragma once

#include <atomic>

#include "awp/cpu.h"

namespace awp::cpu {

// Runs task(i) for i in [0, count).
template <class Task>
void for_each_task(int64_t count, const ParallelFor& parallel_for, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel_for(count, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
  });
}

}  // namespace awp::cpu
