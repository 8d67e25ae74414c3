// Single-threaded parts of the Winograd convolution, compiled once for each instruction set and chosen at run time.
//
// A tile is 4x4 pixels of the output and 6x6 of the input. Transformed, it has 36 positions, and the convolution is one
// matrix product a position: [tiles, inputs] x [inputs, outputs].
#pragma once

#include "awp/conv.h"

namespace awp::cpu {

constexpr int64_t kPositions = 36;

// Transformed tiles: values[position * stride + (channel / lanes * tiles + tile) * lanes + channel % lanes].
struct Tiles {
  void* values;    // fp32, or bf16 where these are multiplied
  int64_t stride;  // elements a position
  int64_t tiles;   // room for so many
};

// The convolution, by the dtype that is multiplied; sums are fp32.
struct Products {
  int64_t bytes;     // an element; 0: not on this processor
  int64_t together;  // inputs whose products are added up at once
  int64_t block;  // tiles that a thread keeps in its second-level cache, a multiple of the rows it keeps in registers

  // Panels [begin, end) of the transformed weights: [panel][position][inputs / together][2 * lanes][together].
  void (*weights)(const Filters& weights, bool transposed, void* transformed, bool stream, int64_t begin, int64_t end);
  // Tiles [first, first + count) of the images, put at `at`; `zeros` holds a zero for every channel.
  void (*input)(const Images& x, int64_t first, int64_t count, const float* zeros, const Tiles& into, int64_t at);
  // Tiles [first, first + count) of the output, the first of `from`, channels of one panel. `products` is scratch.
  void (*output)(const Tiles& from, const void* transformed, int64_t panel, int64_t inputs, const Images& y,
                 int64_t first, int64_t count, float* products);
};

struct Winograd {
  const char* instruction_set;
  int64_t lanes;  // floats a vector; a panel of the transformed weights is two vectors of outputs
  Products fp32, bf16;

  // The weight's gradient, whose products are fp32. Tiles of the output's gradient, as `input` does.
  void (*grad_output)(const Images& grad_y, int64_t first, int64_t count, const float* zeros, const Tiles& into,
                      int64_t at);
  // Products of `outputs` channels from `output` on by `inputs` channels from `input` on, summed over the first `count`
  // tiles; both start at a multiple of `lanes`. `add`: to what `sums` holds.
  void (*grad_products)(const Tiles& x, const Tiles& grad_y, int64_t count, int64_t output, int64_t outputs,
                        int64_t input, int64_t inputs, bool add, float* sums);
  // The gradient of these channels from the sums; `add`: to what it holds.
  void (*grad_weight)(const float* sums, int64_t output, int64_t outputs, int64_t input, int64_t inputs, bool add,
                      const Filters& grad);
};

#if defined(AWP_HAVE_AVX2)
extern const Winograd kAvx2Winograd;
extern const Winograd kAvx512Winograd;
extern const Winograd kAvx512Bf16Winograd;
#endif

}  // namespace awp::cpu
