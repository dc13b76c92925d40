// How an image lies as products without a transform read it: all channels of a pixel side by side, with the padding
// around.
#pragma once

#include "channel_patch.h"
#include "conv_plan.h"

namespace fastgan {

// Values are floats; or bytes, rounded and counted from the least one on, so that none has a sign.
template <typename T>
class WordImage {
 public:
  // As far as the taps of `plan` reach.
  explicit WordImage(const ConvPlan& plan);

  // Lays x out, by all threads, in `size` values.
  int64_t size() const { return n_ * rows_ * columns_ * depth_; }
  void load(const ScaledImage& x, const Quantization& quantization, T* values) const;

  // The same of one sample that lies there but for its padding.
  void pad(const Quantization& quantization, T* values) const;

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t top() const { return -in_.stride * in_.dy_min; }  // rows before the first of x, columns before its first
  int64_t left() const { return -in_.stride * in_.dx_min; }
  int64_t depth() const { return depth_; }  // values of a pixel: those of no channel stand for 0
  // Where a tap reads for the first result of its line, behind where the line starts.
  int64_t offset(const Tap& tap) const {
    const int64_t row = in_.stride * (tap.dy - in_.dy_min) + tap.plane / in_.stride,
                  column = in_.stride * (tap.dx - in_.dx_min) + tap.plane % in_.stride;
    return (row * columns_ + column) * depth_;
  }
  // Where a line of results of a phase starts, counted through all samples, and the step from one to the next of them.
  const T* line(const T* values, int64_t line) const {
    return values + (line / base_h_ * rows_ + in_.stride * (line % base_h_)) * columns_ * depth_;
  }
  int64_t step() const { return in_.stride * depth_; }

 private:
  void load_row(const ScaledImage& x, const Quantization& quantization, int64_t row, T* to) const;

  Sampling in_;
  int64_t n_, c_in_, base_h_, depth_, rows_, columns_;  // values: [N, rows, columns, depth]
};

}  // namespace fastgan
