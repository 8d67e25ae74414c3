// Cuts a batch of images into pieces for the threads.
#include <algorithm>

#include "augment.h"
#include "processor.h"
#include "tasks.h"

namespace awp::cpu {
namespace {

// Values a thread makes at a time: worth handing out, and small beside the caches.
constexpr int64_t kPiece = 48 * 1024;

const AugmentKernels& kernels() {
#if defined(AWP_HAVE_AVX2)
  static const AugmentKernels* wide = widest(&kAvx2Augment, &kAvx512Augment);
  if (wide) return *wide;
#endif
  return kBaselineAugment;
}

}  // namespace

void augment(const Augment& a, const ParallelFor& parallel_for) {
  const int64_t together = std::max<int64_t>(1, kPiece / (a.channels * a.height * a.width));
  for_each_task((a.samples + together - 1) / together, parallel_for, [&](int64_t piece) {
    kernels().augment(a, piece * together, std::min(a.samples, (piece + 1) * together));
  });
}

}  // namespace awp::cpu
