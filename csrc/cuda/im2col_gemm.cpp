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
#include "cuda/im2col_gemm.h"

#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/gemm.h"
#include "cuda/im2col.h"
#include "cuda/weight_parts.h"
#include "integers.h"

namespace convops::cuda {
namespace {

using namespace im2col_gemm;

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
    return im2col_gemm::cost(p, device);
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    return im2col_gemm::workspace(p, device);
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
