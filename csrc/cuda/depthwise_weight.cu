// Backward-weight of depthwise convolutions (any channel multiplier) on tensors with dense rows.
// Every weight gradient is a dot product of a grad_output plane and a shifted input plane, summed
// over the images; the work is bound by memory (small kernels) or FMA (7×7), so both tensors are
// read once and everything else stays on the chip:
//
//   block      one output channel, one tile of its plane, a chunk of the images. It copies the
//              tile's rectangle of grad_output and the input under it, halo included, to shared
//              memory as fp32, a few images a step. What lies outside of the tensors is zero there:
//              the same places for every image, so they are cleared once.
//   thread     a strip: 4 columns by kStripRows rows of gradients of one image. It slides down the
//              input rows with 16-byte reads and keeps one sum a tap in registers for all images.
//   block end  warps add their lanes' sums with shuffles, then the block its warps': a partial sum
//              of every tap, or the result where the block had it all.
//   reduction  a second kernel adds the partial sums of a weight in order.
//
// The kernels of the table have their sizes compiled in. The others (run-time sizes, dilation)
// share all but the strips: there a warp owns some of the taps and its lanes walk over the tile.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/depthwise_weight_rows.h"
#include "cuda/depthwise_weight_sums.cuh"
#include "cuda/depthwise_weight_tiling.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/launch.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

using namespace depthwise_weight;

// The block's sum of one tap by its definition: over real outputs only, padding as zeros.
template <typename T>
__device__ float exact_sum(const Gradient& p, const Tile& tile, const T* input, const T* grad,
                           int kh, int kw) {
  const int pixels = tile.rows * tile.columns;
  const int64_t count = int64_t(tile.images_end - tile.image) * pixels;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t image = tile.image + i / pixels;
    const int row = int(i % pixels) / tile.columns, column = int(i % pixels) % tile.columns;
    const int h = tile.ih + row * p.window.stride_h + kh * p.window.dilation_h;
    const int w = tile.iw + p.tiling.shift + column * p.window.stride_w + kw * p.window.dilation_w;
    const bool inside =
        unsigned(h) < unsigned(p.input.height) && unsigned(w) < unsigned(p.input.width);
    const float factor =
        inside ? to_float(input[image * p.input.image_stride + h * p.input.row_stride + w],
                          p.is_bfloat16)
               : 0.0f;
    sum += factor * to_float(grad[image * p.grad.image_stride +
                                  (tile.oh + row) * p.grad.row_stride + tile.ow + column],
                             p.is_bfloat16);
  }
  return sum_of_warp(sum);
}

// Grid: x tiles, within channels, within chunks. Partial sums lie [weight][chunk][tile]; `partial`
// is null where there is one a weight.
template <typename Sums, typename T>
__global__ void __launch_bounds__(kMaxThreads, Sums::kBlocks)
    sums_kernel(const __grid_constant__ Gradient p, const T* __restrict__ input,
                const T* __restrict__ grad, float* __restrict__ partial, T* __restrict__ result) {
  ptx::launch_dependents();
  extern __shared__ float4 shared_vectors[];
  __shared__ Copies<T> copies[2];  // of input and grad_output
  __shared__ float warp_sums[kMaxWarps][kMaxTaps];
  char* const shared = reinterpret_cast<char*>(shared_vectors);
  const Tiling& t = p.tiling;
  const Split plane = split(blockIdx.x, t.tiles);
  const Split plane_chunk = split(plane.quotient, int(p.weight.size[0]));
  const int part = plane.remainder, channel = plane_chunk.remainder, chunk = plane_chunk.quotient;
  const int input_channel = split(channel, p.multiplier).quotient;
  const Tile tile(p, part, chunk);
  const int grad_place = t.planes * t.input.floats() * int(sizeof(float));
  if (threadIdx.x < 2) {
    const bool of_grad = threadIdx.x == 1;
    const int raw = t.stages * t.tile_bytes();
    copies[threadIdx.x].plan(of_grad ? grad : input, of_grad ? p.grad : p.input,
                             of_grad ? channel : input_channel, of_grad ? tile.oh : tile.ih,
                             of_grad ? tile.ow : tile.iw,
                             of_grad ? tile.rows : p.window.rows(tile.rows),
                             of_grad ? tile.columns : t.shift + p.window.columns(tile.columns),
                             of_grad ? t.grad : t.input, t.planes, of_grad ? grad_place : 0,
                             of_grad ? raw + t.planes * t.input.raw_bytes() : raw);
  }
  for (int i = threadIdx.x; i < t.stages * t.tile_bytes() / int(sizeof(float4)); i += blockDim.x)
    shared_vectors[i] = {};
  __syncthreads();

  const int steps = (tile.images_end - tile.image + t.planes - 1) / t.planes;
  const auto images = [&](int step) {
    return min(t.planes, tile.images_end - tile.image - step * t.planes);
  };
  const auto tile_of = [&](int step) { return shared + (step & (t.stages - 1)) * t.tile_bytes(); };
  const auto start = [&](int step) {
    const int64_t image = tile.image + step * t.planes;
#pragma unroll 1
    for (int i = 0; i < 2; ++i)
      copies[i].start(
          i == 0 ? input + image * p.input.image_stride : grad + image * p.grad.image_stride,
          images(step), tile_of(step));
  };

  Sums sums(p);
  const auto add = [&](int step) {
    const auto floats = reinterpret_cast<const float*>(tile_of(step));
    sums.add(p, floats, floats + t.planes * t.input.floats(), images(step));
  };
  // Copies are `stages` steps ahead of the sums, a group a step, if an empty one: so they can be
  // counted. They are most of the code, so there is one place for them.
  for (int step = -t.stages; step < steps; ++step) {
    if (step >= 0) {
      if (t.stages > 1)
        ptx::copy_wait<1>();
      else
        ptx::copy_wait<0>();
      __syncthreads();
      if constexpr (Copies<T>::kRaw) {
#pragma unroll 1
        for (const Copies<T>& c : copies)
          if (p.is_bfloat16)
            c.template convert_raw<__nv_bfloat16>(images(step), shared);
          else
            c.template convert_raw<__half>(images(step), shared);
      } else {
        add(step);
      }
      __syncthreads();
    }
    // What has been read makes place; raw elements have been before the sums.
    if (step + t.stages < steps) start(step + t.stages);
    ptx::copy_commit();
    if (Copies<T>::kRaw && step >= 0) add(step);
  }
  sums.reduce(p.window, warp_sums);
  __syncthreads();

  const int warps = blockDim.x / kWarp;
  bool finite = true;
  for (int tap = threadIdx.x; tap < p.window.taps(); tap += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += warp_sums[warp][tap];
    finite = finite && isfinite(sum);
    warp_sums[0][tap] = sum;
  }
  // The zeros around grad_output have been multiplied too. Where that may have made NaN of
  // infinity, add the products of real outputs only.
  if (!__syncthreads_and(finite)) {
    __shared__ float exact[kMaxWarps];
    for (int tap = 0; tap < p.window.taps(); ++tap) {
      const int kh = tap / p.window.kernel_w, kw = tap % p.window.kernel_w;
      const float sum = exact_sum(p, tile, input + input_channel * p.input.channel_stride,
                                  grad + channel * p.grad.channel_stride, kh, kw);
      if (threadIdx.x % kWarp == 0) exact[threadIdx.x / kWarp] = sum;
      __syncthreads();
      if (threadIdx.x == 0) {
        warp_sums[0][tap] = 0;
        for (int warp = 0; warp < warps; ++warp) warp_sums[0][tap] += exact[warp];
      }
      __syncthreads();
    }
  }
  for (int tap = threadIdx.x; tap < p.window.taps(); tap += blockDim.x) {
    const int64_t element = int64_t(channel) * p.window.taps() + tap;
    if (partial)
      partial[(element * t.chunks + chunk) * t.tiles + part] = warp_sums[0][tap];
    else
      set(weight_at(p.weight, result, element), warp_sums[0][tap], p.is_bfloat16);
  }
}

// Adds the partial sums of a weight, a warp each, in an order that depends on their number only.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    reduce_kernel(const __grid_constant__ Tensor4 weight, const float* partial, int64_t parts,
                  bool is_bfloat16, T* __restrict__ result) {
  const int64_t element = int64_t(blockIdx.x) * kMaxWarps + threadIdx.x / kWarp;
  if (element >= weight.numel()) return;
  // kGroup loads in flight, and a sum of sums: large planes of few channels have many parts.
  constexpr int kGroup = 16;
  ptx::wait_for_prerequisites();
  float sum = 0;
  for (int64_t first = threadIdx.x % kWarp; first < parts; first += kGroup * kWarp) {
    float group = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t part = first + i * kWarp;
      if (part < parts) group += partial[element * parts + part];
    }
    sum += group;
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % kWarp == 0) set(weight_at(weight, result, element), sum, is_bfloat16);
}

// Coordinates are int: a side times the stride plus a kernel must fit.
constexpr int64_t kMaxSide = int64_t{1} << 29, kMaxStride = 1024;

template <typename Sums_>
struct Tag {
  using Sums = Sums_;
};
template <typename... Sums>
struct SumsList {};
// The kernels that are compiled: with the shift of a padding that keeps the size; without; the last
// three for all other problems.
using AllSums =
    SumsList<StripSums<3, 3, 1, 3>, StripSums<5, 5, 1, 2>, StripSums<7, 7, 1, 1>,
             StripSums<3, 3, 2, 3>, StripSums<5, 5, 2, 2>, StripSums<7, 7, 2, 1>,
             StripSums<3, 3, 1>, StripSums<5, 5, 1>, StripSums<7, 7, 1>, StripSums<3, 1, 1>,
             StripSums<1, 3, 1>, StripSums<3, 7, 1>, StripSums<7, 3, 1>, StripSums<3, 3, 2>,
             StripSums<5, 5, 2>, StripSums<7, 7, 2>, WarpSums<3>, WarpSums<7>, WarpSums<13>>;
static_assert(WarpSums<13>::kTaps >= kMaxTaps);

template <typename Sums>
bool fits(const Window& w) {
  if constexpr (Sums::kFixed)
    return w.kernel_h == Sums::kH && w.kernel_w == Sums::kW && w.stride_h == Sums::kStride &&
           w.stride_w == Sums::kStride && w.dilation_h == 1 && w.dilation_w == 1 &&
           (Sums::kShift == 0 || (w.even_rows && (w.pad_w + Sums::kShift) % kVector == 0));
  else
    return w.taps() <= Sums::kTaps;
}
// Calls f with the first sums that fit.
template <typename F, typename... Sums>
auto with_sums(const Window& window, F&& f, SumsList<Sums...>) {
  decltype(f(Tag<WarpSums<13>>{})) result{};
  ((fits<Sums>(window) && (result = f(Tag<Sums>{}), true)) || ...);
  return result;
}

template <typename Sums, typename T>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  const auto result = static_cast<T*>(operands.weight);
  const auto partial = static_cast<float*>(execution.workspace);
  const bool is_bfloat16 = p.dtype == DType::kBFloat16;
  int64_t parts = 0;
  if (p.output.numel() > 0) {
    const Tiling t = tiling_for<Sums>(p, *execution.device, execution.workspace_bytes);
    const Gradient gradient{Window(p),        Planes(p.input),
                            Planes(p.output), p.weight,
                            int(p.batch()),   int(p.group_out_channels()),
                            is_bfloat16,      t};
    parts = t.parts();
    const auto kernel = sums_kernel<Sums, T>;
    CONVOPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            t.shared_bytes()));
    kernel<<<unsigned(p.out_channels() * parts), t.threads, t.shared_bytes(), stream>>>(
        gradient, static_cast<const T*>(operands.input), static_cast<const T*>(operands.output),
        parts > 1 ? partial : nullptr, result);
    CONVOPS_LAUNCH_CHECK("depthwise_weight");
  }
  if (parts != 1) add_parts(p, parts, operands, execution);
}

}  // namespace

void depthwise_weight::add_parts(const ConvProblem& p, int64_t parts, const Operands& operands,
                                 const Execution& execution) {
  const auto add = [&](auto tag) {
    using T = decltype(tag);
    launch_early(reduce_kernel<T>, ceil_divide(p.weight.numel(), kMaxWarps), kMaxThreads, 0,
                 execution, p.weight, static_cast<const float*>(execution.workspace), parts,
                 p.dtype == DType::kBFloat16, static_cast<T*>(operands.weight));
  };
  p.dtype == DType::kFloat32 ? add(float{}) : add(Half{});
}

namespace {

class DepthwiseWeight final : public Algorithm {
 public:
  std::string name() const override { return "depthwise_weight"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (p.direction != Direction::kBackwardWeight) return "not backward-weight";
    if (!p.is_depthwise()) return "not depthwise";
    if (p.dtype == DType::kFloat64) return "float64";
    const Pair kernel = p.kernel();
    if (kernel.h * kernel.w > kMaxTaps)
      return "kernel " + std::to_string(kernel.h) + 'x' + std::to_string(kernel.w) +
             " of more than " + std::to_string(kMaxTaps) + " taps";
    for (const Tensor4* t : {&p.input, &p.output})
      if (!t->has_dense_columns()) return "column stride " + std::to_string(t->stride[3]);
    for (const Pair side : {p.input_size(), p.output_size(), p.padding})
      if (std::max(side.h, side.w) > kMaxSide) return "a side or padding of more than 2^29";
    for (const Pair step : {p.stride, p.dilation})
      if (std::max(step.h, step.w) > kMaxStride) return "a stride or dilation of more than 1024";
    if (p.output.numel() == 0) return "";
    return with_sums(
        Window(p),
        [&](auto tag) -> std::string {
          const Tiling t = tile_for<typename decltype(tag)::Sums>(p);
          if (t.threads == 0)
            return "no tile fits: the input under one exceeds shared memory, or tiles are too many";
          // Chunks at most double what the longest chain of sums asks for.
          if (p.out_channels() * t.tiles * p.batch() > INT32_MAX) return "more than 2^31 blocks";
          return "";
        },
        AllSums{});
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted on an H200 (20% root mean square on the layers of docs/depthwise_weight.md). To bring
    // an element takes as long as so many FMAs at the peak: padded rows are copied by words unless
    // they are even, 16-bit elements converted. A run-time shape is bound by reads of shared
    // memory.
    constexpr double kElementFmas = 4, kPaddedFmas = 23, kEvenFmas = 12, kHalfFmas = 19;
    constexpr double kFlopsFraction = 0.7, kWarpFlopsFraction = 0.1;
    // Of a problem that is too small for all of that: a block's sums, conversions, both launches.
    constexpr double kStartSeconds = 6.5e-6, kTapSeconds = 50e-9, kHalfSeconds = 1.2e-6;
    constexpr double kReductionSeconds = 2e-6;
    // Rows are not copied, nor converted beforehand.
    constexpr double kRowsStartSeconds = 5e-6;
    const bool rows = takes_rows(p, device);
    const bool fixed =
        with_sums(Window(p), [](auto tag) { return decltype(tag)::Sums::kFixed; }, AllSums{});
    const bool half = p.dtype != DType::kFloat32;
    const bool reduces = workspace(p, device).wanted > 0;
    double start = reduces ? kReductionSeconds : 0;
    start += double(p.kernel().h * p.kernel().w) * kTapSeconds +
             (rows ? kRowsStartSeconds : kStartSeconds + (half ? kHalfSeconds : 0));
    double element = kElementFmas + (half && !rows ? kHalfFmas : 0);
    if (p.padding.w > 0 && !rows) element += Window(p).even_rows && !half ? kEvenFmas : kPaddedFmas;
    const double elements = double(p.input.numel()) + double(p.output.numel());
    const double flops =
        2 * element * elements + p.flops() / (fixed ? kFlopsFraction : kWarpFlopsFraction);
    return p.bytes() / device.bandwidth + flops / device.fp32_flops + start;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    if (p.output.numel() == 0) return {0, 0};
    WorkspaceRange range = with_sums(
        Window(p),
        [&](auto tag) -> WorkspaceRange {
          const Tiling t = tiling_for<typename decltype(tag)::Sums>(p, device, INT64_MAX);
          return {t.tiles > 1 ? chunk_bytes(p, t) : 0,
                  t.parts() > 1 ? t.chunks * chunk_bytes(p, t) : 0};
        },
        AllSums{});
    range.wanted = std::max(range.wanted, rows_workspace(p, device));
    return range;
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    if (p.weight.numel() == 0 || run_rows(p, operands, execution)) return;
    with_sums(
        Window(p),
        [&](auto tag) {
          using S = typename decltype(tag)::Sums;
          if (p.dtype == DType::kFloat32)
            launch<S, float>(p, operands, execution);
          else
            launch<S, Half>(p, operands, execution);
          return true;
        },
        AllSums{});
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_depthwise_weight() { return std::make_unique<DepthwiseWeight>(); }

}  // namespace convops::cuda
