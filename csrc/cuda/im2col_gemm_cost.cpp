// How long im2col_gemm takes, by estimate.
#include <algorithm>
#include <cmath>
#include <utility>

#include "columns.h"
#include "cuda/im2col_gemm.h"
#include "integers.h"
#include "matrix.h"

namespace convops::cuda::im2col_gemm {
namespace {

// Fitted on an H200: the share of the peak cuBLAS reaches, the rates of its dtypes
// over float32 FMA, the rows a tile has at least, the share of the bandwidth, how much longer
// results take than what is read, and what a launch costs.
constexpr double kGemmFraction = 0.54;
constexpr double kTf32Speedup = 5.0, kHalfSpeedup = 16.7, kDoubleSpeedup = 0.7;
constexpr double kMergedTf32Speedup = 8.5;  // of 1×1 in channels_last, one product
constexpr double kTileRows = 64;
constexpr double kBandwidthShare = 0.9, kWrites = 0.45, kHalfWrites = 0.15;
// Of that, where backward-weight reads both operands once.
constexpr double kWeightShare = 0.75;
// In TF32 a tile has so many pixels of an image, and the rest is wasted.
constexpr double kTilePixels = 128;
// What copying the columns takes, in trips of theirs through memory besides the product's: more
// where a stride gathers from many sectors, at most from one for each element; with a stride
// col2im's loads are far apart, too, which costs half where the columns stay in L2.
constexpr double kIm2colPasses = 1, kPassesPerStride = 0.17, kMostPasses = 6, kCol2imPasses = 5.5;
constexpr double kCachedShare = 0.5, kCachedBytes = 16 << 20;
// And in backward-weight of 16 bits, where products along the columns are slower, of channels_last
// more (ResNet-50's layers).
constexpr double kHalfWeightPasses = 2, kHalfWeightLastPasses = 4;
constexpr double kPackingPasses = 2;
// What slices of 16 bits take besides: sums of their own, and adding them.
constexpr double kHalfSlicesSeconds = 10e-6;
constexpr double kLaunchSeconds = 3.4e-6;
// Where groups are products of their own: a call, at least; a multiprocessor's tile of 64 pixels of
// an image and group and as many rows, to begin and for each term of its short sums; and each pixel
// that one multiprocessor sums by FMA of tensors whose pixels are apart.
constexpr double kCallSeconds = 1e-6, kGroupTileSeconds = 0.7e-6, kGroupTermSeconds = 11e-9;
constexpr double kApartPixelSeconds = 33e-9;
constexpr int64_t kGroupTile = 64;

// Of the products of groups, however few operations they are.
double seconds_of_groups(const ConvProblem& p, const Device& device) {
  const double pixels = double(p.batch()) * double(p.output_pixels());
  if (p.direction == Direction::kBackwardWeight) {
    const bool fma = p.dtype == DType::kFloat32 && p.precision == Precision::kIeee;
    return fma && pixel_stride(p.output) != 1 ? pixels * kApartPixelSeconds : 0;
  }
  int64_t rows = p.group_out_channels(), terms = p.taps();
  if (p.direction == Direction::kBackwardInput) std::swap(rows, terms);
  const int64_t tiles = p.groups * p.batch() * ceil_divide(p.output_pixels(), kGroupTile) *
                        ceil_divide(rows, kGroupTile);
  return std::max(1.0, double(tiles) / device.processors) *
         (kGroupTileSeconds + double(terms) * kGroupTermSeconds);
}

}  // namespace

double cost(const ConvProblem& p, const Device& device) {
  double rate = device.fp32_flops * kGemmFraction;
  const bool merged = skips_im2col(p) && p.input.is_channels_last() && p.output.is_channels_last();
  if (p.dtype == DType::kFloat64)
    rate *= kDoubleSpeedup;
  else if (p.dtype != DType::kFloat32)
    rate *= kHalfSpeedup;
  else if (p.precision == Precision::kTf32)
    rate *= merged ? kMergedTf32Speedup : kTf32Speedup;
  const double rows = double(p.group_out_channels());
  double tiles = std::max(1.0, kTileRows / rows);  // of which the rest is wasted
  const bool packs = packs_pixels(p);
  if (p.dtype == DType::kFloat32 && p.precision == Precision::kTf32) {
    const double images = packs || merged ? double(p.batch()) : 1;
    const double pixels = images * double(std::max<int64_t>(1, p.output_pixels()));
    tiles *= std::ceil(pixels / kTilePixels) * kTilePixels / pixels;
  }
  const double stride = double(p.stride.h * p.stride.w);
  double passes = p.direction == Direction::kBackwardInput
                      ? kCol2imPasses * stride
                      : std::min(kIm2colPasses + kPassesPerStride * stride, kMostPasses);
  if (p.direction == Direction::kBackwardWeight && element_size(p.dtype) == 2)
    passes += p.input.is_channels_last() ? kHalfWeightLastPasses : kHalfWeightPasses;
  if (p.is_pointwise()) passes = kPackingPasses;
  const double column_bytes = skips_im2col(p) ? 0
                                              : double(p.groups * p.taps()) * double(p.batch()) *
                                                    double(p.output_pixels()) *
                                                    double(element_size(columns_dtype(p)));
  if (p.direction == Direction::kBackwardInput && column_bytes <= kCachedBytes)
    passes *= kCachedShare;
  const double chunks = skips_im2col(p) ? 0 : std::max(1.0, column_bytes / kChunkBytes);
  // Where neither groups nor images merge into one call, the fewer of them are calls of their
  // own.
  const int64_t calls = std::min(p.groups, p.batch());
  const double multiply = std::max(
      p.flops() * tiles / rate,
      p.groups == 1 ? 0 : std::max(double(calls) * kCallSeconds, seconds_of_groups(p, device)));
  const double bandwidth = device.bandwidth * kBandwidthShare;
  const double written = double(p.result().numel()) * double(element_size(p.dtype));
  // Packed outputs are written and read once more.
  const double output = double(p.output.numel()) * double(element_size(p.dtype));
  const double packed = packs ? kPackingPasses * output : 0;
  const double share = p.direction == Direction::kBackwardWeight ? kWeightShare : 1;
  const double writes = element_size(p.dtype) == 2 ? kHalfWrites : kWrites;
  const double memory =
      (p.bytes() + writes * written + column_bytes + packed) / (bandwidth * share);
  const bool slices = p.direction == Direction::kBackwardWeight && element_size(p.dtype) == 2 &&
                      slice_count(p, device) > 1;
  return std::max(multiply, memory) + passes * column_bytes / bandwidth +
         (slices ? kHalfSlicesSeconds : 0) +
         (2 + 2 * chunks + (packs ? chunks : 0) + packs_weight(p)) * kLaunchSeconds;
}

}  // namespace convops::cuda::im2col_gemm
