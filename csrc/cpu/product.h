// The inner loops of convolutions as matrix products: tiles of sums held in registers, operands addressed through
// tables.
//
// An image in memory is never unfolded into a matrix. Row k of the matrix that im2col would make is the image itself
// from some offset on, so a product reads it there: offsets[k] + columns[v] is where vector v of row k begins.
#pragma once

#include <cstdint>
#include <limits>

#include "common.h"

namespace fastgan {

// Floats per register of the instruction set chosen at run time.
int64_t product_lanes();

// Registers side by side in a tile of panel_products, for panels of more than three rows.
int64_t product_vectors();

// Weights of one panel: rows, most products, and floats between rows: a constant, so that one register addresses
// all rows, and an odd number of cache lines, so that they share no set.
constexpr int64_t kPanelRows = 6, kPanelDepth = 256, kPanelStride = 272;

// What a product fetches meanwhile from further caches: the panel that comes next, of kPanelRows rows, and cache lines
// of the weights that come after, so many with every kFetchSteps steps of each tile of sums.
constexpr int64_t kFetchSteps = 16, kFetchBytes = 64;
struct Ahead {
  const void* panel = nullptr;  // or none, then nothing is fetched
  const char* weights = nullptr;
  int64_t lines = 0;
};

// sums[r, v * lanes + l] (+)= sum_k weights[r, k] * image[offsets[k] + columns[v] + l].
//
// An image in bfloat16 lies pairwise (bf16.h): its vectors are an even number, two side by side.
struct PanelProducts {
  const float* weights;    // [rows, kPanelStride], of which `depth` are used
  int64_t rows;            // 1 ... kPanelRows
  const int32_t* offsets;  // or none: k * step
  int64_t step = 0;
  int64_t depth;
  const float* image;  // or none: narrow_image
  const BFloat16* narrow_image = nullptr;
  const int32_t* columns;
  int64_t vectors;
  float* sums;
  int64_t sums_stride;
  bool overwrite;  // = instead of +=
  Ahead ahead = {};
};
void panel_products(const PanelProducts& p);

// sums[r, i] (+)= sum over samples, lines and pixels of image[starts[r] + sample * sample_stride + line * line_stride +
// pixel] * slab[sample, line, pixel, i], i < lanes * vectors.
struct ShiftedProducts {
  const float* image;
  const int32_t* starts;
  int64_t rows;  // 1 ... kPanelRows
  int64_t samples, sample_stride, lines, line_stride, pixels;
  const float* slab;  // [samples, lines, pixels, lanes * vectors]
  float* sums;        // [rows, lanes * vectors]
  bool overwrite;     // = instead of +=
};
void shifted_products(const ShiftedProducts& p);

// sums[r, v * lanes + l] (+)= sum_k rows[k * row_step + r] * columns[k * column_step + v * lanes + l].
struct OuterProducts {
  const float* rows;
  int64_t row_step, row_count;  // 1 ... kPanelRows rows
  const float* columns;
  int64_t column_step, vectors, depth;
  float* sums;
  int64_t sums_stride;
  bool overwrite;  // = instead of +=
};
void outer_products(const OuterProducts& p);

// sums[r, c, l] += sum over lines and vectors of rows[r, line, v * lanes + l] * image[columns[c] + line * image_line +
// v * lanes + l]: dot products whose lanes the caller adds up when all of them are done.
struct DotProducts {
  const float* rows;
  int64_t row_count, row_stride, row_line;
  const float* image;
  const int32_t* columns;
  int64_t column_count, image_line;
  int64_t lines, vectors;  // a line is this many whole vectors
  float* sums;             // [row_count, column_count, lanes]
};
void dot_products(const DotProducts& p);

// to[r, k] = from[r * row_stride + offsets[k]], k < depth <= kPanelDepth, r < rows <= kPanelRows; to is a panel.
void pack_panel(const float* from, const int32_t* offsets, int64_t depth, int64_t row_stride, int64_t rows, float* to);

// The least of all values: what takes the place of lesser ones where none are to be replaced.
constexpr float kLeast = -std::numeric_limits<float>::infinity();

// NaN stays.
FASTGAN_INLINE float at_least(float value, float least) { return value < least ? least : value; }

// Lines of pixels, `line` and `pixel` apart, scaled and packed: to[l * to_line + i] = scale * from[l * line + i *
// pixel], or `least`.
struct Lines {
  const float* from;
  int64_t line, pixel;
  float scale;
  int64_t lines, pixels;
  float* to;
  int64_t to_line;
  float least = kLeast;
};
void pack_lines(const Lines& l);

// A line from those of its phases: to[i * count + p] = phases[p][i], where that is less than n.
void interleave(const float* const* phases, int64_t count, float* to, int64_t n);

}  // namespace fastgan
