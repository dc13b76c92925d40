// The first step of Winograd's filtering: tiles of an image, transformed and laid out as products read them.
#pragma once

#include "channel_patch.h"
#include "conv_plan.h"
#include "winograd_plan.h"

namespace fastgan {

// Tiles that are carried through all steps together: lines of tiles, counted through all samples, and a stretch of
// each.
struct TileBlock {
  int64_t line, lines, column, columns;
  int64_t tiles() const { return lines * columns; }

  // Calls f(sample, row of tiles, lines, line from the block's first) for the samples that its lines are of, of
  // `tiles_h` each.
  template <typename F>
  void for_samples(int64_t tiles_h, F&& f) const {
    for (int64_t done = 0; done < lines;) {
      const int64_t row = (line + done) % tiles_h, count = std::min(lines - done, tiles_h - row);
      f((line + done) / tiles_h, row, count, done);
      done += count;
    }
  }
};

class WinogradInput {
 public:
  // Of an image whose first channel is number `first_channel` of the convolution, rounded to whole numbers unless
  // `quantization` is null. There is room for `depth` words of up to `per_word` channels and for `tiles` tiles.
  WinogradInput(const ConvPlan& conv, const WinogradPlan& plan, const Quantization* quantization, int64_t first_channel,
                int64_t per_word, int64_t depth, int64_t tiles);

  // Floats of a block, [value, chunk of words, panel, kPanelRows, kPanelStride], and where some word of a value lies in
  // them, for the first of so many tiles.
  int64_t size() const { return plan_.values * value_; }
  int64_t offset(int64_t value, int64_t word, int64_t tiles) const;

  // What a thread needs to transform blocks of so many lines and columns.
  ChannelPatch patch(int64_t lines, int64_t columns) const;
  void transform(const ScaledImage& x, const TileBlock& block, ChannelPatch& patch, float* to) const;

 private:
  // Where tiles are read: kGroup channels side by side, as many of them as are there times `scale`, which may be null.
  struct Source {
    const float* pixels;
    int64_t row;
    const float* scale;
  };

  // Tiles of a block, in a group of channels: of so many lines of a sample; the first is number `tile`.
  struct Stretch {
    int64_t sample, channel, line, lines, column, columns, tile;
  };

  // Whether tiles can be read where x lies, and gain by that: several parts, whose pixels lie apart, share a copy.
  bool lies_there(const ScaledImage& x) const {
    return x.grouped && x.least == kLeast && !quantization_ && plan_.parts.size() == 1;
  }
  std::pair<int64_t, int64_t> inner_columns(int64_t line, const TileBlock& block) const;
  void transform_copy(const ScaledImage& x, const Stretch& s, const TileBlock& block, ChannelPatch& patch,
                      float* to) const;
  void transform_there(const ScaledImage& x, const Stretch& s, const TileBlock& block, float* to) const;
  void transform_stretch(const Source& from, const Stretch& s, const TileBlock& block, float* to) const;
  void transform_line(const WinogradPlan::Form& form, const Source& from, int64_t vectors, int64_t first, int64_t count,
                      float* to) const;

  const ConvPlan& conv_;
  const WinogradPlan& plan_;
  const Quantization* const quantization_;
  const int64_t first_channel_, per_word_, step_, value_;  // pixels from tile to tile, floats from value to value
};

}  // namespace fastgan
