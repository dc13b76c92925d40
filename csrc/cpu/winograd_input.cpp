#include "winograd_input.h"

#include <algorithm>
#include <array>

#include "product.h"
#include "winograd.h"

namespace fastgan {
namespace {

constexpr int64_t kPanelSize = kPanelRows * kPanelStride;

int64_t panels(int64_t tiles) { return ceil_div(tiles, kPanelRows); }

}  // namespace

WinogradInput::WinogradInput(const ConvPlan& conv, const WinogradPlan& plan, const Quantization* quantization,
                             int64_t first_channel, int64_t per_word, int64_t depth, int64_t tiles)
    : conv_(conv),
      plan_(plan),
      quantization_(quantization),
      first_channel_(first_channel),
      per_word_(per_word),
      step_(plan.stride * plan.m),
      value_(ceil_div(depth, kPanelDepth) * panels(tiles) * kPanelSize + kCacheLine) {}

int64_t WinogradInput::offset(int64_t value, int64_t word, int64_t tiles) const {
  return value * value_ + word / kPanelDepth * panels(tiles) * kPanelSize + word % kPanelDepth;
}

ChannelPatch WinogradInput::patch(int64_t lines, int64_t columns) const {
  return ChannelPatch(conv_.c_in - first_channel_, conv_.input.h_in, conv_.input.w_in,
                      step_ * (std::min(lines, plan_.tiles_h) - 1) + plan_.span.y, step_ * (columns - 1) + plan_.span.x,
                      conv_.input.reflect);
}

// Pixels of 16 channels at a time are copied side by side, unless they lie so: then only those of tiles that read
// padding are.
void WinogradInput::transform(const ScaledImage& x, const TileBlock& block, ChannelPatch& patch, float* to) const {
  for (int64_t channel = first_channel_; channel < conv_.c_in; channel += kGroup) {
    block.for_samples(plan_.tiles_h, [&](int64_t sample, int64_t row, int64_t lines, int64_t done) {
      const Stretch all{sample, channel, row, lines, block.column, block.columns, done * block.columns};
      if (!lies_there(x)) return transform_copy(x, all, block, patch, to);
      for (int64_t l = 0; l < lines; ++l) {
        const auto [first, last] = inner_columns(row + l, block);
        const auto stretch = [&](int64_t from, int64_t end) {
          const int64_t tile = all.tile + l * block.columns + from - block.column;
          return Stretch{sample, channel, row + l, 1, from, end - from, tile};
        };
        transform_copy(x, stretch(block.column, first), block, patch, to);
        transform_there(x, stretch(first, last), block, to);
        transform_copy(x, stretch(last, block.column + block.columns), block, patch, to);
      }
    });
  }
}

// Of a line of tiles, those that read no padding.
std::pair<int64_t, int64_t> WinogradInput::inner_columns(int64_t line, const TileBlock& block) const {
  const int64_t y = line * step_ + plan_.origin.y, end = block.column + block.columns;
  if (y < 0 || y + plan_.span.y > conv_.input.h_in) return {end, end};
  const int64_t room = conv_.input.w_in - plan_.span.x - plan_.origin.x;
  const int64_t first = std::clamp(ceil_div(-plan_.origin.x, step_), block.column, end);
  return {first, std::clamp(room < 0 ? 0 : room / step_ + 1, first, end)};
}

void WinogradInput::transform_copy(const ScaledImage& x, const Stretch& s, const TileBlock& block, ChannelPatch& patch,
                                   float* to) const {
  if (!s.columns) return;
  const int64_t rows = (s.lines - 1) * step_ + plan_.span.y, columns = (s.columns - 1) * step_ + plan_.span.x;
  patch.load(x, s.sample, s.channel - first_channel_, s.line * step_ + plan_.origin.y, rows,
             s.column * step_ + plan_.origin.x, columns);
  if (quantization_) patch.quantize(*quantization_, rows, columns);
  transform_stretch({patch.data(), patch.row_stride(), nullptr}, s, block, to);
}

void WinogradInput::transform_there(const ScaledImage& x, const Stretch& s, const TileBlock& block, float* to) const {
  const int64_t channel = s.channel - first_channel_;
  const int64_t y = s.line * step_ + plan_.origin.y, column = s.column * step_ + plan_.origin.x;
  const float* const pixels =
      x.data + s.sample * x.stride_n + channel * x.stride_c + y * x.stride_h + column * x.stride_w;
  std::array<float, kGroup> scale;
  for (int64_t c = 0; c < kGroup; ++c) scale[c] = x.scale.at(s.sample, channel + c);
  transform_stretch({pixels, x.stride_h, x.scale.data ? scale.data() : nullptr}, s, block, to);
}

void WinogradInput::transform_stretch(const Source& from, const Stretch& s, const TileBlock& block, float* to) const {
  const int64_t vectors = std::min(kGroup, plan_.part_depth - s.channel) / product_lanes();
  int64_t channel = s.channel;
  for (const auto& part : plan_.parts) {
    for (const auto& form : plan_.forms) {
      const float* corner =
          from.pixels + (part.y + form.y - plan_.origin.y) * from.row + (part.x + form.x - plan_.origin.x) * kGroup;
      float* const tiles = to + offset(form.first, channel / per_word_, block.tiles());
      for (int64_t l = 0; l < s.lines; ++l, corner += step_ * from.row) {
        transform_line(form, {corner, from.row, from.scale}, vectors, s.tile + l * block.columns, s.columns, tiles);
      }
    }
    channel += plan_.part_depth;
  }
}

// Tiles [first, first + count) of a block, one behind the other.
void WinogradInput::transform_line(const WinogradPlan::Form& form, const Source& from, int64_t vectors, int64_t first,
                                   int64_t count, float* to) const {
  const int64_t row = plan_.stride * from.row, column = plan_.stride * kGroup;
  const auto* const floats =
      quantization_ ? nullptr : &winograd_kernels(plan_.m, plan_.r, form.single_y, form.single_x);
  const auto* const whole = quantization_ ? &whole_kernels(plan_.m, plan_.r, form.single_y, form.single_x) : nullptr;
  const float* corner = from.pixels;
  int64_t place = first % kPanelRows;  // in its panel
  float* at = to + first / kPanelRows * kPanelSize + place * kPanelStride;
  for (int64_t i = 0; i < count; ++i, corner += plan_.m * column) {
    if (whole) {
      whole->input(corner, row, column, vectors, reinterpret_cast<int16_t*>(at), 2 * value_, 2 * kPanelStride);
    } else {
      floats->input(corner, row, column, from.scale, vectors, at, value_, kPanelStride);
    }
    at += kPanelStride;
    if (++place == kPanelRows) {
      at += kPanelSize - kPanelRows * kPanelStride;
      place = 0;
    }
  }
}

}  // namespace fastgan
