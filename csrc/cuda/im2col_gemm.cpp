// Convolution as a matrix product on cuBLAS: the chunk's columns (im2col) times the weights.
//
//   forward          output(o, pixels)  = weight(o, taps) · columns(taps, pixels), onto the bias
//   backward-input   columns(taps, pixels) = weightᵀ · grad_output, then col2im
//   backward-weight  weight(o, taps)   += grad_output(o, pixels) · columnsᵀ, chunk by chunk
//
// A chunk is what fits kChunkBytes. 1×1 convolutions multiply the input as it is. Tensors whose
// pixels lie evenly spaced (NCHW, channels_last) are multiplied in place, others are packed into
// the workspace first. For TF32 cuBLAS rounds the operands to nearest itself (measured; the tests
// hold it to that).
#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/gemm.h"
#include "cuda/im2col.h"
#include "cuda/weight_parts.h"
#include "integers.h"

namespace convops::cuda {
namespace {

// Large: chunks that stay in L2 (32 MB) are products too small to fill an H200 and took up to twice
// as long as these (docs/im2col_gemm.md).
constexpr int64_t kChunkBytes = int64_t{1024} << 20;
// Images with fewer pixels are small ones, see packs_pixels.
constexpr int64_t kFewPixels = 4096;
// Pixels that backward-weight sums in one product. cuBLAS adds them up in float32 whatever their
// number; longer sums had up to three times cuDNN's error, several short ones have less than it.
// More pixels are a batch of slices, as many as make two tiles of kSliceTile² results for each
// multiprocessor and none shorter than kShortestSlice; their sums are added in order.
constexpr int64_t kLongestSum = int64_t{1} << 15, kShortestSlice = 256;
constexpr int64_t kSliceTile = 128, kSliceWaves = 2;
constexpr int64_t kSliceBytes = int64_t{256} << 20;  // of the sums of all, at most
constexpr int64_t kAlignment = 256;

// For the cost, fitted on an H200: the share of the peak cuBLAS reaches, the rates of its dtypes
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

int64_t aligned(int64_t bytes) { return round_up(bytes, kAlignment); }

DType sum_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

void* advance(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// Channels × pixels of some images: an operand of the products. Channels of a group follow each
// other, groups too.
struct PixelMatrix {
  void* data;
  DType dtype;
  int64_t image_stride, channel_stride, pixel_stride;

  // All groups of one image as a batch of (channels × pixels).
  Matrix image(int64_t index, int64_t group_channels) const {
    return {advance(data, index * image_stride, dtype), group_channels * channel_stride,
            channel_stride, pixel_stride};
  }
  // One group of all images as a batch.
  Matrix group(int64_t index, int64_t group_channels) const {
    return {advance(data, index * group_channels * channel_stride, dtype), image_stride,
            channel_stride, pixel_stride};
  }
  // The same without the first pixels.
  PixelMatrix from(int64_t pixel) const {
    return {advance(data, pixel * pixel_stride, dtype), dtype, image_stride, channel_stride,
            pixel_stride};
  }
  // Whether the next image's pixels go on where one's end, and all are still a matrix: images that
  // share memory, such as windows that slide over frames, are not.
  bool is_merged(int64_t images, int64_t image_pixels, int64_t channels) const {
    if (images == 1) return true;
    if (image_stride != image_pixels * pixel_stride) return false;
    if (pixel_stride == 1 && channels > 1) return channel_stride >= images * image_pixels;
    return pixel_stride >= channels;
  }
};

PixelMatrix pixel_matrix(const Tensor4& t, void* data, DType dtype, const Chunk& chunk) {
  return {advance(data, chunk.image * t.stride[0] + chunk.row * t.stride[2], dtype), dtype,
          t.stride[0], t.stride[1], pixel_stride(t)};
}

// Whether backward-weight's sum over the pixels is cut into slices.
bool is_sliced(const ConvProblem& p) {
  return p.direction == Direction::kBackwardWeight && p.groups == 1 && p.dtype != DType::kFloat64 &&
         p.batch() * p.output_pixels() > kLongestSum;
}

// Whether the pixels of small images are packed side by side, one product for all of them. For
// backward-weight because it would be a product for each image, unless each is a slice; otherwise
// because tensor cores take rows that do not begin at multiples of 16 bytes, as of 7×7, at half
// speed and less. (At 8 the copies of a 1×1 convolution cost what they gain.)
bool packs_pixels(const ConvProblem& p) {
  const bool fma = p.dtype == DType::kFloat32 && p.precision == Precision::kIeee;
  const bool small = p.batch() > 1 && p.output_pixels() < kFewPixels && pixel_stride(p.output) == 1;
  const bool weight = p.direction == Direction::kBackwardWeight;
  if (weight && !(is_sliced(p) && p.output_pixels() >= kShortestSlice)) return small;
  if (p.dtype == DType::kFloat64 || fma) return false;
  const int64_t aligned_bytes = p.is_pointwise() ? 8 : 16;
  return small && p.output_pixels() * element_size(p.dtype) % aligned_bytes != 0;
}

// The input is its own column matrix and is read (backward-input: written) in place.
bool skips_im2col(const ConvProblem& p) {
  return p.is_pointwise() && is_pixel_matrix(p.input, p.group_in_channels()) && !packs_pixels(p);
}

// Whether the gradient of the output must be copied into the chunk.
bool packs_output(const ConvProblem& p) {
  if (p.direction == Direction::kForward) return false;
  return !is_pixel_matrix(p.output, p.group_out_channels()) || packs_pixels(p);
}

// The dtype in which the output is made in the workspace before it is copied out; std::nullopt
// where it is made in place. cuBLAS may round a 16-bit product before it adds it to what is there:
// with a bias the sum is made in float32 and rounded as it is copied.
std::optional<DType> staged_dtype(const ConvProblem& p) {
  if (p.direction != Direction::kForward) return std::nullopt;
  if (p.has_bias && p.dtype != sum_dtype(p.dtype)) return sum_dtype(p.dtype);
  if (packs_pixels(p)) return p.dtype;
  return std::nullopt;
}

// Whether the weights are copied to the workspace, or the sums of their gradient from there.
bool packs_weight(const ConvProblem& p) {
  const bool rounds = p.direction == Direction::kBackwardWeight && p.dtype != sum_dtype(p.dtype);
  return rounds || !p.weight.is_contiguous();
}

DType columns_dtype(const ConvProblem& p) {
  return p.direction == Direction::kBackwardInput ? sum_dtype(p.dtype) : p.dtype;
}

// Workspace per row of output pixels; 0 where everything is multiplied in place.
int64_t row_bytes(const ConvProblem& p) {
  const int64_t columns =
      skips_im2col(p) ? 0 : p.groups * p.taps() * element_size(columns_dtype(p));
  int64_t output = 0;
  if (packs_output(p)) output = p.out_channels() * element_size(p.dtype);
  if (const auto staged = staged_dtype(p)) output = p.out_channels() * element_size(*staged);
  return (columns + output) * p.output_size().w;
}

int64_t slice_count(const ConvProblem& p, const Device& device) {
  if (!is_sliced(p) || p.weight.numel() == 0) return 1;
  const int64_t tiles =
      ceil_divide(p.group_out_channels(), kSliceTile) * ceil_divide(p.taps(), kSliceTile);
  const int64_t room = kSliceBytes / (p.weight.numel() * int64_t(sizeof(float)));
  return std::max<int64_t>(1, std::min(kSliceWaves * device.processors / tiles, room));
}

// Of the packed weights or sums, of each slice if there are several.
int64_t weight_bytes(const ConvProblem& p, int64_t slices) {
  const bool sums = p.direction == Direction::kBackwardWeight;
  const int64_t copies = slices > 1 ? slices : packs_weight(p);
  return aligned(copies * p.weight.numel() * element_size(sums ? sum_dtype(p.dtype) : p.dtype));
}

// What the padding of the chunk's rows may take on top.
int64_t padding_bytes(const ConvProblem& p) {
  return padded_pixels(1) * element_size(sum_dtype(p.dtype)) *
         (p.groups * p.taps() + p.out_channels());
}

int64_t fixed_bytes(const ConvProblem& p, int64_t slices) {
  return weight_bytes(p, slices) + (row_bytes(p) ? padding_bytes(p) : 0);
}

// Backward-input works on input rows; one of them needs at most this many output rows.
int64_t minimum_rows(const ConvProblem& p) {
  if (p.direction != Direction::kBackwardInput) return 1;
  return std::min(p.output_size().h, (p.kernel().h - 1) * p.dilation.h / p.stride.h + 1);
}

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

class Run {
 public:
  Run(const ConvProblem& p, const Operands& operands, const Execution& execution)
      : p_(p),
        operands_(operands),
        execution_(execution),
        stream_(execution.stream),
        packed_weight_(execution.workspace),
        slices_(slice_count(p, *execution.device)) {
    const int64_t widest = std::max<int64_t>(1, kMaxGemmExtent / p.output_size().w);
    const int64_t bytes = row_bytes(p);
    const auto left = [&] { return execution.workspace_bytes - fixed_bytes(p, slices_); };
    if (left() < minimum_rows(p) * bytes) slices_ = 1;
    budget_rows_ = bytes ? std::min(widest, left() / bytes) : widest;
    chunk_data_ = static_cast<char*>(execution.workspace) + weight_bytes(p, slices_);
  }

  void forward() {
    const Matrix weight = weight_matrix();
    for_each_output_chunk([&](const Chunk& chunk) {
      const PixelMatrix columns = input_columns(chunk);
      const PixelMatrix output = pixel_matrix(p_.output, operands_.output, p_.dtype, chunk);
      const auto staged = staged_dtype(p_);
      const PixelMatrix result = staged ? packed_output(chunk, *staged) : output;
      if (p_.has_bias) {
        Tensor4 bias = chunk_shape(chunk, result);
        for (int i = 0; i < 4; ++i) bias.stride[i] = i == 1 ? p_.bias_stride : 0;
        copy(chunk_shape(chunk, result), result.data, result.dtype, bias, operands_.bias, p_.dtype,
             stream_);
      }
      multiply_pixels(weight, p_.group_out_channels(), p_.taps(), columns, result, chunk,
                      p_.has_bias ? Accumulate::kYes : Accumulate::kNo);
      if (staged)
        copy(chunk_shape(chunk, output), output.data, p_.dtype, chunk_shape(chunk, result),
             result.data, result.dtype, stream_);
    });
  }

  void backward_input() {
    const Matrix weight = weight_matrix().transposed();
    if (skips_im2col(p_)) {
      for_each_output_chunk([&](const Chunk& chunk) {
        multiply_pixels(weight, p_.taps(), p_.group_out_channels(), grad_output(chunk),
                        pixel_matrix(p_.input, operands_.input, p_.dtype, chunk), chunk,
                        Accumulate::kNo);
      });
      return;
    }
    // As many input rows as keep the output rows they need within the budget.
    const int64_t all = p_.output_size().h, halo = minimum_rows(p_) - 1;
    const int64_t rows = budget_rows_ >= all
                             ? budget_rows_ / all * p_.input_size().h
                             : std::max<int64_t>(1, (budget_rows_ - halo - 1) * p_.stride.h + 1);
    for_each_chunk(p_.batch(), p_.input_size().h, rows, 1, [&](const Chunk& input_rows) {
      const Chunk chunk = output_rows_of(p_, input_rows);
      const Columns columns = packed_columns(chunk_data_, p_, chunk);
      if (chunk.rows > 0)
        multiply_pixels(weight, p_.taps(), p_.group_out_channels(), grad_output(chunk),
                        column_matrix(columns), chunk, Accumulate::kNo);
      col2im(p_, columns, columns_dtype(p_), input_rows, operands_.input, stream_);
    });
  }

  void backward_weight() {
    const DType sum = sum_dtype(p_.dtype);
    const int64_t weights = p_.weight.numel();
    const bool has_slices = slices_ > 1;
    bool in_place = !has_slices && !packs_weight(p_);
    Accumulate accumulate = Accumulate::kNo;
    if (has_slices) {  // a product need not have them all
      CONVOPS_CUDA_CHECK(cudaMemsetAsync(packed_weight_, 0,
                                         size_t(slices_ * weights * element_size(sum)),
                                         static_cast<cudaStream_t>(stream_)));
      accumulate = Accumulate::kYes;
    }
    for_each_output_chunk([&](const Chunk& chunk) {
      const PixelMatrix columns = input_columns(chunk), output = grad_output(chunk);
      for_each_slices(chunk, columns, output, [&](const Slices& s) {
        const auto operand = [&](const PixelMatrix& of, int64_t channels) {
          Matrix matrix = of.from(s.pixel).image(s.image, channels);
          if (s.count > 1)
            matrix.batch_stride = s.images ? of.image_stride : s.length * of.pixel_stride;
          return matrix;
        };
        // A single product rounds its sums itself.
        in_place |= p_.weight.is_contiguous() && s.count == 1 &&
                    s.length == p_.batch() * p_.output_pixels();
        const Matrix weight{in_place ? operands_.weight : packed_weight_, weights / p_.groups,
                            p_.taps(), 1};
        gemm(p_.dtype, in_place ? p_.dtype : sum, p_.precision,
             {s.count > 1 ? s.count : p_.groups, p_.group_out_channels(), p_.taps(), s.length},
             operand(output, p_.group_out_channels()), operand(columns, p_.taps()).transposed(),
             weight, accumulate);
        accumulate = Accumulate::kYes;
      });
    });
    if (in_place) return;
    if (has_slices)
      return add_weight_parts(p_.weight, static_cast<const float*>(packed_weight_), slices_,
                              p_.dtype, operands_.weight, execution_);
    copy(p_.weight, operands_.weight, p_.dtype, packed_weight_shape(), packed_weight_, sum,
         stream_);
  }

 private:
  // `count` slices of `length` pixels each: of images one after the other, or all of one image.
  struct Slices {
    int64_t count, length, image, pixel;
    bool images;
  };

  // Cuts the chunk's pixels: images that are short in slices of their own, `slices_` at a time,
  // longer ones, or all images where they merge into one, in up to so many.
  template <typename F>
  void for_each_slices(const Chunk& chunk, const PixelMatrix& columns, const PixelMatrix& output,
                       const F& f) const {
    const int64_t image_pixels = chunk.rows * p_.output_size().w;
    const bool merged = columns.is_merged(chunk.images, image_pixels, p_.taps()) &&
                        output.is_merged(chunk.images, image_pixels, p_.group_out_channels());
    const int64_t images = merged ? 1 : chunk.images;
    const int64_t pixels = merged ? chunk.images * image_pixels : image_pixels;
    const bool of_images = !merged && slices_ > 1 && pixels < slices_ * kShortestSlice;
    const int64_t most = of_images ? ceil_divide(images, ceil_divide(images, slices_)) : 1;
    for (int64_t image = 0; image < images; image += most)
      for (int64_t pixel = 0, step; pixel < pixels; pixel += step) {
        const int64_t left = pixels - pixel;
        int64_t count = std::min(most, images - image), length = left;
        if (!of_images) {
          count = std::clamp<int64_t>(left / kShortestSlice, 1, slices_);
          if (count > 1) length = left / count / kPixelMultiple * kPixelMultiple;
        }
        length = std::min(length, kLongestSum);
        step = of_images ? length : count * length;
        f(Slices{count, length, image, pixel, of_images});
      }
  }

  // A chunk of an image begins at an aligned row of the output: cuBLAS takes half as long there.
  template <typename F>
  void for_each_output_chunk(const F& f) const {
    for_each_chunk(p_.batch(), p_.output_size().h, budget_rows_, aligned_rows(p_.output_size().w),
                   f);
  }

  Tensor4 packed_weight_shape() const { return Tensor4::contiguous(p_.weight.size); }

  // (group out channels × taps) for every group, packed if need be.
  Matrix weight_matrix() const {
    void* data = operands_.weight;
    if (packs_weight(p_)) {
      data = packed_weight_;
      copy(packed_weight_shape(), data, p_.dtype, p_.weight, operands_.weight, p_.dtype, stream_);
    }
    return {data, p_.group_out_channels() * p_.taps(), p_.taps(), 1};
  }

  PixelMatrix column_matrix(const Columns& columns) const {
    return {columns.data, columns_dtype(p_), columns.image_stride, columns.tap_stride,
            columns.pixel_stride};
  }

  // The input's columns: im2col's, or the input itself.
  PixelMatrix input_columns(const Chunk& chunk) const {
    if (skips_im2col(p_)) return pixel_matrix(p_.input, operands_.input, p_.dtype, chunk);
    const Columns columns = packed_columns(chunk_data_, p_, chunk);
    im2col(p_, operands_.input, columns, stream_);
    return column_matrix(columns);
  }

  // The chunk's part of the workspace for the output, behind the columns: (channel, image, pixel).
  PixelMatrix packed_output(const Chunk& chunk, DType dtype) const {
    const int64_t pixels = padded_pixels(chunk.pixels(p_));
    void* data = chunk_data_;
    if (!skips_im2col(p_)) data = advance(data, p_.groups * p_.taps() * pixels, columns_dtype(p_));
    return {data, dtype, chunk.rows * p_.output_size().w, pixels, 1};
  }

  // The output of a chunk where the matrix lies, as a tensor.
  Tensor4 chunk_shape(const Chunk& chunk, const PixelMatrix& m) const {
    const int64_t width = p_.output_size().w;
    return {{chunk.images, p_.out_channels(), chunk.rows, width},
            {m.image_stride, m.channel_stride, width * m.pixel_stride, m.pixel_stride}};
  }

  // The gradient of the output: in place, or packed.
  PixelMatrix grad_output(const Chunk& chunk) const {
    if (!packs_output(p_)) return pixel_matrix(p_.output, operands_.output, p_.dtype, chunk);
    const PixelMatrix packed = packed_output(chunk, p_.dtype);
    const Tensor4 to = chunk_shape(chunk, packed);
    Tensor4 from = p_.output;  // its strides may fit no matrix
    std::copy(to.size, to.size + 4, from.size);
    const int64_t first = chunk.image * from.stride[0] + chunk.row * from.stride[2];
    copy(to, packed.data, p_.dtype, from, advance(operands_.output, first, p_.dtype), p_.dtype,
         stream_);
    return packed;
  }

  // out(m, pixels) = weight(m, k) · in(k, pixels) for every group and image of the chunk, in as few
  // calls as the layouts allow.
  void multiply_pixels(const Matrix& weight, int64_t m, int64_t k, const PixelMatrix& in,
                       const PixelMatrix& out, const Chunk& chunk, Accumulate accumulate) const {
    const int64_t image_pixels = chunk.rows * p_.output_size().w, images = chunk.images;
    const auto product = [&](int64_t batch, int64_t n, const Matrix& a, const Matrix& b,
                             const Matrix& c) {
      gemm(p_.dtype, out.dtype, p_.precision, {batch, m, n, k}, a, b, c, accumulate);
    };
    if (in.is_merged(images, image_pixels, k) && out.is_merged(images, image_pixels, m)) {
      product(p_.groups, images * image_pixels, weight, in.image(0, k), out.image(0, m));
    } else if (p_.groups < images) {
      for (int64_t group = 0; group < p_.groups; ++group) {
        const Matrix one{advance(weight.data, group * weight.batch_stride, p_.dtype), 0,
                         weight.row_stride, weight.column_stride};
        product(images, image_pixels, one, in.group(group, k), out.group(group, m));
      }
    } else {
      for (int64_t image = 0; image < images; ++image)
        product(p_.groups, image_pixels, weight, in.image(image, k), out.image(image, m));
    }
  }

  const ConvProblem& p_;
  const Operands& operands_;
  const Execution& execution_;
  void* stream_;
  void* packed_weight_;
  int64_t slices_;
  void* chunk_data_;
  int64_t budget_rows_;
};

class Im2colGemm final : public Algorithm {
 public:
  std::string name() const override { return "im2col_gemm"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (p.batch() == 0 || p.taps() == 0) return "nothing to sum";
    if (p.output_pixels() >= kMaxGemmExtent ||
        p.input_size().h * p.input_size().w >= kMaxGemmExtent)
      return "an image has more pixels than cuBLAS can count";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    double rate = device.fp32_flops * kGemmFraction;
    const bool merged =
        skips_im2col(p) && p.input.is_channels_last() && p.output.is_channels_last();
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

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    const int64_t fixed = fixed_bytes(p, 1), all = fixed_bytes(p, slice_count(p, device));
    const int64_t bytes = row_bytes(p);
    if (bytes == 0) return {fixed, all};
    const int64_t least = minimum_rows(p), rows = p.batch() * p.output_size().h;
    const int64_t wanted = std::clamp(kChunkBytes / bytes, least, std::max(rows, least));
    return {fixed + least * bytes, all + wanted * bytes};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    Run run(p, operands, execution);
    switch (p.direction) {
      case Direction::kForward:
        return run.forward();
      case Direction::kBackwardInput:
        return run.backward_input();
      case Direction::kBackwardWeight:
        return run.backward_weight();
    }
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_im2col_gemm() { return std::make_unique<Im2colGemm>(); }

}  // namespace convops::cuda
