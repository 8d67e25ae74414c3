// Runs the threads of a block in turn, each until it waits for others.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

Index threadIdx, blockIdx;

namespace emulator {

int launches = 0;
int64_t bytes = 0;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Slot {
  alignas(16) char bytes[16];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Thread>> pool;
std::vector<Slot> slots;
std::vector<Barrier> warps;
Barrier block;
unsigned block_size;
bool moved;
const std::function<void()>* current;

void enter() {
  (*current)();
  pool[threadIdx.x]->done = moved = true;
}

void wait(Barrier& barrier, unsigned size) {
  const unsigned self = threadIdx.x, generation = barrier.generation;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
    moved = true;
  }
  while (barrier.generation == generation) swapcontext(&pool[self]->context, &scheduler);
}

void run_block() {
  for (unsigned i = 0; i < block_size; ++i) {
    Thread& thread = *pool[i];
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  for (unsigned left = block_size; left > 0;) {
    moved = false;
    left = 0;
    for (unsigned i = 0; i < block_size; ++i) {
      if (pool[i]->done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &pool[i]->context);
      left += pool[i]->done ? 0 : 1;
    }
    if (left > 0 && !moved) {
      std::fprintf(stderr, "block %u: %u threads wait at a barrier that the others never reach\n", blockIdx.x, left);
      std::abort();
    }
  }
}

}  // namespace

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  while (pool.size() < threads) pool.push_back(std::make_unique<Thread>());
  slots.resize(threads);
  warps.assign(threads / kWarp, {});
  block = {};
  block_size = threads;
  current = &kernel;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    run_block();
  }
}

void exchange(void* value, size_t bytes, int lanes) {
  const unsigned self = threadIdx.x;
  Barrier& warp = warps[self / kWarp];
  memcpy(slots[self].bytes, value, bytes);
  wait(warp, kWarp);
  memcpy(value, slots[self ^ static_cast<unsigned>(lanes)].bytes, bytes);
  wait(warp, kWarp);
}

}  // namespace emulator

void __syncthreads() { emulator::wait(emulator::block, emulator::block_size); }
