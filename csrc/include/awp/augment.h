// Random crops, mirroring and Cutout of images of bytes, which come out as floats; the caller brings memory and
// threads.
#pragma once

#include <cstdint>

#include "awp/cpu.h"

namespace awp {

struct Augment {
  const uint8_t* images;
  int64_t image_stride;             // from one image to the next, in bytes
  bool packed;                      // an image is [height, width, channels] in memory, else [channels, height, width]
  int64_t channels, height, width;  //
  const int64_t* rows;              // [samples], which images; null: the first `samples`
  const int64_t* sample_ids;        // [samples]
  int64_t samples;                  //
  uint64_t seed;                    //
  int64_t pad;                      // below 2^30
  bool flip;                        //
  int64_t cutout;                   // side of the square, below 2^30; 0: none
  const float* fill;                // [channels], what the square is filled with
  float* out;                       // [samples, ...], no gaps
  bool out_packed;                  //
};

namespace cpu {

void augment(const Augment& arguments, const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace awp
