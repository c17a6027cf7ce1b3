// What a block of depthwise_weight works on: its tile, and how the tile comes to shared memory.
#pragma once

#include <cstring>

#include "cuda/ptx/copy.cuh"
#include "cuda/types.cuh"

namespace convops::cuda::depthwise_weight {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 128, kMaxWarps = kMaxThreads / kWarp;
constexpr int kVector = 4;  // floats of a 16-byte read: columns of a strip

// float16 or bfloat16: every element is converted once, so which of them is a question at run time,
// and half as many kernels do.
struct Half {
  uint16_t bits;
};
__device__ __forceinline__ float to_float(float value, bool) { return value; }
__device__ __forceinline__ float to_float(Half value, bool is_bfloat16) {
  return is_bfloat16 ? convert<float>(reinterpret_cast<__nv_bfloat16&>(value))
                     : convert<float>(reinterpret_cast<__half&>(value));
}
__device__ __forceinline__ void set(float& element, float value, bool) { element = value; }
__device__ __forceinline__ void set(Half& element, float value, bool is_bfloat16) {
  if (is_bfloat16)
    reinterpret_cast<__nv_bfloat16&>(element) = convert<__nv_bfloat16>(value);
  else
    reinterpret_cast<__half&>(element) = convert<__half>(value);
}

template <typename T>
__device__ __forceinline__ T& weight_at(const Tensor4& weight, T* result, int64_t element) {
  const int64_t kw = element % weight.size[3], line = element / weight.size[3];
  const int64_t kh = line % weight.size[2], channel = line / weight.size[2];
  return result[channel * weight.stride[0] + kh * weight.stride[2] + kw * weight.stride[3]];
}

struct Split {
  int quotient, remainder;
};
// Most of what is divided here is 0 or by 1, which spares a small problem some of its start.
__device__ __forceinline__ Split split(int index, int size) {
  if (index < size) return {0, index};
  if (size == 1) return {index, 0};
  return {index / size, index % size};
}

// What a block reads of a tensor's image and channel.
struct Planes {
  int64_t image_stride, channel_stride, row_stride;
  int height, width;

  explicit Planes(const Tensor4& t)
      : image_stride(t.stride[0]),
        channel_stride(t.stride[1]),
        row_stride(t.stride[2]),
        height(int(t.size[2])),
        width(int(t.size[3])) {}
};
struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  bool even_rows;  // the input's rows have an even length and begin at even elements

  explicit Window(const ConvProblem& p)
      : kernel_h(int(p.weight.size[2])),
        kernel_w(int(p.weight.size[3])),
        stride_h(int(p.stride.h)),
        stride_w(int(p.stride.w)),
        dilation_h(kernel_h > 1 ? int(p.dilation.h) : 1),
        dilation_w(kernel_w > 1 ? int(p.dilation.w) : 1),
        pad_h(int(p.padding.h)),
        pad_w(int(p.padding.w)),
        even_rows(((p.input.size[3] | p.input.stride[0] | p.input.stride[1] | p.input.stride[2]) &
                   1) == 0) {}
  // Input rows and columns under so many outputs.
  __host__ __device__ int rows(int outputs) const {
    return (outputs - 1) * stride_h + (kernel_h - 1) * dilation_h + 1;
  }
  __host__ __device__ int columns(int outputs) const {
    return (outputs - 1) * stride_w + (kernel_w - 1) * dilation_w + 1;
  }
  __host__ __device__ int taps() const { return kernel_h * kernel_w; }
};

// A tensor's part of a tile in shared memory: fp32 with zeros around, and where elements have 16
// bits, the raw elements that were copied. Pitches are in elements, multiples of 16 bytes.
struct Layout {
  int rows, pitch;
  int raw_rows, raw_pitch;

  __host__ __device__ int floats() const { return rows * pitch; }
  __host__ __device__ int raw_bytes() const { return raw_rows * raw_pitch * 2; }
};

// How a problem is cut. Blocks are fewer than 2^31, so images, tiles and chunks are int.
struct Tiling {
  int rows, columns;  // of grad_output in a tile
  int planes;         // images of a step
  int shift;          // columns of the input's tile before the first that is needed
  int stages;         // 2: the next step's tile is copied during the sums
  Layout input, grad;
  int threads;
  int tiles_w, tiles;  // of a plane
  int chunks, chunk_images;

  __host__ __device__ int tile_bytes() const {
    return planes * (input.floats() + grad.floats()) * int(sizeof(float));
  }
  __host__ __device__ int raw_bytes() const {
    return planes * (input.raw_bytes() + grad.raw_bytes());
  }
  int64_t parts() const { return int64_t(tiles) * chunks; }  // partial sums of a weight
  int shared_bytes() const { return stages * tile_bytes() + raw_bytes(); }
};

// What the kernels are told.
struct Gradient {
  Window window;
  Planes input, grad;
  Tensor4 weight;
  int batch, multiplier;
  bool is_bfloat16;
  Tiling tiling;
};

// A block's tile: the part of it that exists, and where its input begins.
struct Tile {
  int oh, ow, rows, columns;  // of grad_output
  int ih, iw;                 // may be negative
  int image, images_end;

  __device__ Tile(const Gradient& p, int tile, int chunk) {
    const Tiling& t = p.tiling;
    const Split place = split(tile, t.tiles_w);
    oh = place.quotient * t.rows;
    ow = place.remainder * t.columns;
    rows = min(t.rows, p.grad.height - oh);
    columns = min(t.columns, p.grad.width - ow);
    ih = oh * p.window.stride_h - p.window.pad_h;
    iw = ow * p.window.stride_w - p.window.pad_w - t.shift;
    image = chunk * t.chunk_images;
    images_end = min(image + t.chunk_images, p.batch);
  }
};

// A walk of the block over the rows of a rectangle in all images of a step, from one place to
// another. Strides and offsets are in bytes. It is the same for every step, so it is planned once
// and stays in shared memory, which leaves the registers to the sums.
struct Walk {
  int64_t from, from_image, from_row;
  int to, to_image, to_row;
  int rows, units;  // of a row
  int from_unit, to_unit;
  // Lanes lie along the units, several rows a warp where they are few; threads past the last row
  // begin with the next images.
  int lanes, image_step, row_step;
  // The inner loop runs over the images where a step has several, else over the rows.
  bool over_images;
  int64_t inner_from, outer_from;
  int inner_to, outer_to;

  __device__ void share(int planes) {
    lanes = kWarp;
    while (lanes > 1 && lanes / 2 >= units) lanes /= 2;
    if (rows == 0) units = 0;
    const int threads = blockDim.x / lanes;
    image_step = max(1, split(threads, max(rows, 1)).quotient);
    row_step = image_step > 1 ? rows : threads;
    over_images = planes > 1;
    inner_from = over_images ? image_step * from_image : row_step * from_row;
    outer_from = over_images ? row_step * from_row : image_step * from_image;
    inner_to = over_images ? image_step * to_image : row_step * to_row;
    outer_to = over_images ? row_step * to_row : image_step * to_image;
  }

  // For each unit of the thread: store(load(from), to, unit), kGroup loads ahead of their stores.
  // From: a pointer or an offset, to which `from` is added.
  template <int kGroup, typename From, typename Load, typename Store>
  __device__ __forceinline__ void each(From base, int images, Load&& load, Store&& store) const {
    using Offset = std::conditional_t<std::is_pointer_v<From>, int64_t, int>;
    // Read once: the memory clobbers of the copies would read it again and again.
    const Walk w = *this;
    if (w.units == 0) return;
    const int index = threadIdx.x / w.lanes;
    const Split first = w.image_step > 1 ? split(index, w.rows) : Split{0, index};
    if (first.quotient >= w.image_step) return;
    base += Offset(w.from) + first.quotient * Offset(w.from_image) +
            first.remainder * Offset(w.from_row);
    const int place = w.to + first.quotient * w.to_image + first.remainder * w.to_row;
    const int outer_count = w.over_images ? w.rows : images,
              inner_count = w.over_images ? images : w.rows;
    const int inner_first = w.over_images ? first.quotient : first.remainder;
    const int inner_step = w.over_images ? w.image_step : w.row_step;
    const Offset step = Offset(w.inner_from);
    const int place_step = w.inner_to;

    for (int unit = threadIdx.x % w.lanes; unit < w.units; unit += w.lanes) {
      From outer = base + unit * w.from_unit;
      int outer_place = place + unit * w.to_unit;
      for (int i = w.over_images ? first.remainder : first.quotient; i < outer_count;
           i += w.over_images ? w.row_step : w.image_step) {
        From source = outer;
        int target = outer_place;
        int j = inner_first;
        for (; j + (kGroup - 1) * inner_step < inner_count; j += kGroup * inner_step) {
          decltype(load(source)) values[kGroup];
#pragma unroll
          for (auto& value : values) {
            value = load(source);
            source += step;
          }
#pragma unroll
          for (const auto& value : values) {
            store(value, target, unit);
            target += place_step;
          }
        }
#pragma unroll 1
        for (; j < inner_count; j += inner_step) {
          store(load(source), target, unit);
          source += step;
          target += place_step;
        }
        outer += Offset(w.outer_from);
        outer_place += w.outer_to;
      }
    }
  }
};

// The largest copy that the addresses and the length of rows allow: 16, 8, 4 or 2 bytes.
__device__ __forceinline__ int copy_unit(uint64_t bits) {
  return int(min(uint64_t(16), bits & -bits));
}

// Copies of a tile's rectangle of one tensor: what lies inside of it. float goes straight into the
// tile; 16-bit elements into a raw copy beside it, which is converted when it has arrived.
template <typename T>
struct Copies {
  static constexpr bool kRaw = sizeof(T) < sizeof(float);
  Walk copy, conversion;
  int columns;

  // `h` and `w`: of the tensor at the tile's first element. `tile` and `raw`: places in shared
  // memory, in bytes.
  __device__ void plan(const T* tensor, const Planes& planes, int channel, int h, int w, int rows,
                       int columns_, const Layout& layout, int images, int tile, int raw) {
    const int top = max(0, -h), left = max(0, -w);
    rows = max(0, min(rows, planes.height - h) - top);
    const int inside = max(0, planes.width - w - left);
    columns = max(0, min(columns_ - left, inside));
    const int first = tile + (top * layout.pitch + left) * int(sizeof(float));
    const int row_bytes = layout.pitch * int(sizeof(float));

    copy.from = (channel * planes.channel_stride + (h + top) * planes.row_stride + (w + left)) *
                int(sizeof(T));
    copy.from_image = planes.image_stride * int(sizeof(T));
    copy.from_row = planes.row_stride * int(sizeof(T));
    copy.rows = rows;
    copy.to = kRaw ? raw : first;
    copy.to_row = kRaw ? layout.raw_pitch * int(sizeof(T)) : row_bytes;
    copy.to_image = (kRaw ? layout.raw_rows : layout.rows) * copy.to_row;
    uint64_t bits = (reinterpret_cast<uint64_t>(tensor) + copy.from) | uint64_t(copy.from_image) |
                    uint64_t(copy.from_row) | unsigned(copy.to);
    int unit = copy_unit(bits);
    // A row's end may take more than it needs where the tensor has it.
    int bytes = columns * int(sizeof(T));
    const int more = (bytes + unit - 1) / unit * unit;
    if (more <= inside * int(sizeof(T)) && more <= (layout.pitch - left) * int(sizeof(T)))
      bytes = more;
    unit = copy_unit(bits | unsigned(bytes));
    copy.from_unit = copy.to_unit = unit;
    copy.units = bytes / unit;
    copy.share(images);
    if (!kRaw) return;
    conversion = copy;
    conversion.from = raw;
    conversion.from_image = copy.to_image;
    conversion.from_row = copy.to_row;
    conversion.from_unit = 2 * int(sizeof(T));
    conversion.to = first;
    conversion.to_row = row_bytes;
    conversion.to_image = layout.rows * row_bytes;
    conversion.to_unit = 2 * int(sizeof(float));
    conversion.units = (columns + 1) / 2;
    conversion.share(images);
  }

  // `tensor`: the first image of the step.
  __device__ __forceinline__ void start(const T* tensor, int images, char* shared) const {
    const auto base = reinterpret_cast<const char*>(tensor);
    switch (copy.from_unit) {
      case 16:
        return start_units<16>(base, images, shared);
      case 8:
        return start_units<8>(base, images, shared);
      case 4:
        return start_units<4>(base, images, shared);
      default:  // there are no asynchronous copies of 2 bytes
        const auto load = [](const char* from) { return *reinterpret_cast<const uint16_t*>(from); };
        const auto store = [&](uint16_t value, int to, int) {
          *reinterpret_cast<uint16_t*>(shared + to) = value;
        };
        copy.each<kGroup>(base, images, load, store);
    }
  }

  template <typename Element>
  __device__ __forceinline__ void convert_raw(int images, char* shared) const {
    const int count = columns;
    const auto load = [&](int from) { return *reinterpret_cast<const uint32_t*>(shared + from); };
    const auto store = [&](uint32_t pair, int to, int unit) {
      Element values[2];
      memcpy(values, &pair, sizeof pair);
      float* place = reinterpret_cast<float*>(shared + to);
      place[0] = convert<float>(values[0]);
      if (2 * unit + 1 < count) place[1] = convert<float>(values[1]);
    };
    conversion.each<kGroup>(0, images, load, store);
  }

 private:
  static constexpr int kGroup = 4;  // loads in flight through registers

  template <int kBytes>
  __device__ __forceinline__ void start_units(const char* base, int images, char* shared) const {
    const auto place = uint32_t(__cvta_generic_to_shared(shared));
    const auto load = [](const char* from) { return from; };
    const auto store = [&](const char* from, int to, int) {
      ptx::copy_bytes<kBytes>(place + to, from);
    };
    copy.each<kGroup>(base, images, load, store);
  }
};

}  // namespace convops::cuda::depthwise_weight
