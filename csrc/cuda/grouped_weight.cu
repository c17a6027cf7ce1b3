// Backward-weight of grouped convolutions with few channels a group, float32 in NCHW: for every
// group an (out channels) × (channels · taps) matrix of sums over all pixels of all images.
//
// A warp owns a job, 8 channels × 8 out channels × all taps, in a column of 8 output pixels that
// it walks down row by row: mma.sync.m16n8k8 with k = the 8 pixels, n = the out channels and m =
// two times the 8 channels, each for another tap. An input row is read from shared memory and split
// once for all taps: those of a row are neighbouring registers of a lane, which holds the pixels 2t
// and 2t + 1 (the order of k is free as long as both operands agree), and the rows of a kernel stay
// in registers.
//
// Precision: tf32 rounds operands to nearest and multiplies once. ieee splits x into hi, x rounded
// to TF32, and lo, the rest, of which TF32 holds all but the last bit, and adds lo·hi, hi·lo and
// hi·hi; what is left out is at most 2^-21 of the product: half of that lo·lo, half the cut bits.
// Sums leave the tensor cores, which truncate, after every stage. Data for which this fails (sums
// that are not finite, operands so small that lo or products lose bits) is found afterwards and
// summed again by fused multiply-adds in plain fp32.
//
// A block sums a chunk of all rows of all images. Its warps are jobs × columns and one that copies,
// by cp.async into a ring of stages. Where groups have at most 4 channels, several share a job:
// what belongs to two groups is not stored. The second kernel adds the chunks in order.
#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/grouped_weight_walker.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/weight_parts.h"

namespace convops::cuda {
namespace grouped_weight {
namespace {

// Where a block works.
struct Place {
  int channel, out_channel;  // its first of the pack's
  int strip, pack, chunk;

  __device__ explicit Place(const Tiling& t) {
    unsigned index = blockIdx.x;
    const auto next = [&](unsigned size) {
      const unsigned digit = index % size;
      index /= size;
      return int(digit);
    };
    channel = next(t.blocks) * t.sides * kOctet;
    out_channel = next(t.out_blocks) * t.out_sides * kOctet;
    strip = next(t.strips);
    pack = next(t.packs);
    chunk = int(index);
  }
};

// All threads of the block meet, the copying and the computing ones at different places:
// __syncthreads() would be undefined there.
__device__ __forceinline__ void next_item() {
  constexpr int kBarrier = 1;
  ptx::sync_threads(kBarrier, int(blockDim.x));
}

// Walks down the block's chunk: the last warps copy, the others compute.
template <typename Shape, bool kIeee, bool kExactly>
__device__ __forceinline__ void walk(const Arguments& a, const Place& place, const float* input,
                                     const float* grad, float* ring, Walker<Shape, kIeee>& walker) {
  const Tiling& t = a.tiling;
  const int each = t.items / a.chunks, rest = t.items % a.chunks;
  const int first = place.chunk * each + min(place.chunk, rest);
  const int count = each + (place.chunk < rest ? 1 : 0), row_blocks = t.row_blocks;
  const int stage_floats = a.input.floats() + a.grad.floats();
  const int first_pixel = place.strip * t.columns * kOctet;
  int row_block = first % row_blocks;
  float* stage = ring;
  const auto next = [&] {
    stage = stage == ring + (kStages - 1) * stage_floats ? ring : stage + stage_floats;
    row_block = row_block + 1 == row_blocks ? 0 : row_block + 1;
  };

  const int thread = int(threadIdx.x) - t.warps() * kWarp;
  if (thread >= 0) {
    // Not beyond the pack's channels, nor the tensor's.
    const int64_t channel = int64_t(place.pack) * t.channels + place.channel;
    const int64_t out_channel = int64_t(place.pack) * t.out_channels + place.out_channel;
    const int image = first / row_blocks, top = a.input.first_row;
    Copier copy_input(a.input, input + channel * a.input.channel_stride,
                      first_pixel * Shape::kStride,
                      int(min(int64_t(t.channels - place.channel), a.input.channels - channel)),
                      thread, image, top + row_block * Shape::kNewRows);
    Copier copy_grad(
        a.grad, grad + out_channel * a.grad.channel_stride, first_pixel,
        int(min(int64_t(t.out_channels - place.out_channel), a.grad.channels - out_channel)),
        thread, image, row_block * kRows);
    const auto copy = [&](int item) {
      if (item < count) {
        if constexpr (Shape::kHalo > 0)
          if (kExactly || item == 0 || row_block == 0)
            copy_input.template copy<Shape::kHalo>(stage, 0);
        copy_input.template copy<Shape::kNewRows>(stage, Shape::kHalo);
        copy_grad.template copy<kRows>(stage + a.input.floats(), 0);
        next();
        copy_input.advance(Shape::kNewRows);
        copy_grad.advance(kRows);
        if (row_block == 0) {
          copy_input.advance_image(top);
          copy_grad.advance_image(0);
        }
      }
      ptx::copy_commit();
    };
#pragma unroll 1
    for (int item = 1 - kStages; item < count; ++item) {
      if (item >= 0) {
        ptx::copy_wait<kStages - 2>();
        next_item();  // this one has arrived, the one before has been used
      }
      copy(item + kStages - 1);
    }
    ptx::copy_wait<0>();
    return;
  }

  // The lane's places: channel `lane / 4` and pixels 2t, 2t + 1 as an operand; for the exact sums
  // out channels 2t, 2t + 1 and the whole octet of pixels.
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int column = warp % t.columns, job = warp / t.columns;
  const int quad = lane / 4, pair = lane % 4 * 2;
  const int pixel = column * kOctet + (kExactly ? 0 : pair);
  const int input_offset =
      (job % t.sides * kOctet + quad) * a.input.plane + pixel * Shape::kStride + Shape::kShift;
  const int grad_offset =
      a.input.floats() + pixel + (job / t.sides * kOctet + (kExactly ? pair : quad)) * a.grad.plane;
  const int pixels = min(kOctet, a.grad.width - first_pixel - column * kOctet);
#pragma unroll 1
  for (int item = 0; item < count; ++item, next()) {
    next_item();
    if constexpr (kExactly)
      walker.step_exactly(a, stage + input_offset, stage + grad_offset,
                          min(kRows, a.grad.height - row_block * kRows), pixels);
    else
      walker.step(a, stage + input_offset, stage + grad_offset, item == 0 || row_block == 0);
  }
}

// Partial sums lie [chunk · strips + strip][weight]. Grid: blocks of channels, out channels,
// strips, packs, chunks, from fast to slow, so that blocks that read the same run together.
template <typename Shape, bool kIeee>
__global__ void __launch_bounds__((kMaxWarps + kCopyWarps) * kWarp, 2)
    sum_kernel(const __grid_constant__ Arguments a, const float* __restrict__ input,
               const float* __restrict__ grad, float* __restrict__ partial) {
  extern __shared__ float4 shared[];
  ptx::launch_dependents();
  float* ring = reinterpret_cast<float*>(shared);
  const Tiling& t = a.tiling;
  const Place place(t);
  const int ring_floats = kStages * (a.input.floats() + a.grad.floats());
  for (int i = int(threadIdx.x); i < ring_floats / 4; i += int(blockDim.x)) shared[i] = {};
  __syncthreads();
  Walker<Shape, kIeee> walker;
  walk<Shape, kIeee, false>(a, place, input, grad, ring, walker);
  if (__syncthreads_or(walker.failed())) {
    walker.sums_to_zero();
    walk<Shape, kIeee, true>(a, place, input, grad, ring, walker);
  }

  // The first warp of a job adds the columns of the others.
  constexpr int kSums = Shape::kTaps * 2;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int column = warp % t.columns, job = warp / t.columns;
  const bool computes = warp < t.warps();
  float* mine = ring + warp * kSums * kWarp + lane;
  __syncthreads();
  if (computes) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i * kWarp] = walker.sums[i / 2][i % 2];
  }
  __syncthreads();
  if (!computes || column != 0) return;
  const int channel = place.channel + job % t.sides * kOctet + lane / 4;
  const int64_t weights = a.groups * a.group_out_channels * a.group_channels * Shape::kTaps;
  partial += (int64_t(place.chunk) * t.strips + place.strip) * weights;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int out = place.out_channel + job / t.sides * kOctet + lane % 4 * 2 + side;
    if (channel >= t.channels || out >= t.out_channels) continue;
    const int group = out / a.group_out_channels;
    if (channel / a.group_channels != group || int64_t(place.pack) * t.pack + group >= a.groups)
      continue;
    float* to = partial + ((int64_t(place.pack) * t.out_channels + out) * a.group_channels +
                           channel % a.group_channels) *
                              Shape::kTaps;
#pragma unroll
    for (int tap = 0; tap < Shape::kTaps; ++tap) {
      const int i = tap * 2 + side;
      float sum = walker.sums[i / 2][i % 2];
      for (int other = 1; other < t.columns; ++other) sum += mine[(other * kSums + i) * kWarp];
      to[tap] = sum;
    }
  }
}

template <typename Shape>
Arguments make_arguments(const ConvProblem& p, const Operands& operands) {
  const Tiling t(p);
  const int pixels = t.columns * kOctet, threads = kCopyWarps * kWarp;
  const int columns = (pixels - 1) * Shape::kStride + Shape::kKernel;
  // Loads of 8 bytes go by half warps of four channels, those of 16 by quarters of two.
  constexpr int kBank = Shape::kStride == 2 ? 16 : 8;
  return {.tiling = t,
          .input = Source(p.input, operands.input, p.padding, columns, Shape::kInputRows, t.sides,
                          Shape::kShift, kBank, t.strips, pixels * Shape::kStride, threads),
          .grad = Source(p.output, operands.output, {0, 0}, pixels, kRows, t.out_sides, 0, 8,
                         t.strips, pixels, threads),
          .group_channels = int(p.group_in_channels()),
          .group_out_channels = int(p.group_out_channels()),
          .groups = p.groups,
          .chunks = 1};
}

int shared_bytes(const Arguments& a, int sums) {
  const int ring = kStages * (a.input.floats() + a.grad.floats());
  return int(sizeof(float)) * std::max(ring, a.tiling.warps() * sums * kWarp);
}

int64_t chunk_bytes(const ConvProblem& p) {
  return Tiling(p).strips * p.weight.numel() * int64_t(sizeof(float));
}

// One wave of blocks, or more where lanes would add too many numbers one after the other: that
// bounds the rounding error of large batches.
int64_t wanted_chunks(const ConvProblem& p, const Device& device) {
  constexpr int kMostItems = 1024;
  const Tiling t(p);
  const int64_t resident =
      device.processors * std::max(1, kWarpsPerProcessor / (t.warps() + kCopyWarps));
  const int64_t blocks = t.blocks_of_a_chunk();
  const int64_t chunks = std::max(resident / blocks, ceil_divide(t.items, kMostItems));
  return std::clamp<int64_t>(std::min(chunks, INT32_MAX / blocks), 1, std::max(1, t.items));
}

template <typename Shape, bool kIeee>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  Arguments a = make_arguments<Shape>(p, operands);
  const int64_t affordable = execution.workspace_bytes / chunk_bytes(p);
  a.chunks = int(std::max<int64_t>(1, std::min(wanted_chunks(p, *execution.device), affordable)));
  const int bytes = shared_bytes(a, Shape::kTaps * 2);
  const auto kernel = sum_kernel<Shape, kIeee>;
  CONVOPS_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const auto partial = static_cast<float*>(execution.workspace);
  kernel<<<unsigned(a.tiling.blocks_of_a_chunk() * a.chunks),
           (a.tiling.warps() + kCopyWarps) * kWarp, bytes, stream>>>(
      a, static_cast<const float*>(operands.input), static_cast<const float*>(operands.output),
      partial);
  CONVOPS_LAUNCH_CHECK("grouped backward-weight");
  add_weight_parts(p.weight, partial, int64_t(a.chunks) * a.tiling.strips, p.dtype, operands.weight,
                   execution);
}

class GroupedWeight final : public Algorithm {
 public:
  std::string name() const override { return "grouped_weight"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (p.direction != Direction::kBackwardWeight)
      return std::string(to_string(p.direction)) + ": only backward-weight";
    if (p.dtype != DType::kFloat32) return std::string(to_string(p.dtype)) + ": only float32";
    if (p.groups < 2) return "not grouped";
    for (const int64_t channels : {p.group_in_channels(), p.group_out_channels()})
      if (channels < 1 || channels > kMaxGroupChannels)
        return std::to_string(channels) + " channels a group";
    if (p.group_in_channels() == 1 && p.group_out_channels() == 1) return "depthwise";
    if (p.is_dilated()) return "dilated";
    if (!with_shape(p, [](auto) {}, AllShapes{}))
      return "no kernel of " + window_text(p) + " is compiled";
    for (const Tensor4* t : {&p.input, &p.output})
      if (!t->has_dense_columns()) return "column stride " + std::to_string(t->stride[3]);
    for (const Pair side :
         {p.input_size(), p.output_size(), p.padding, Pair{p.in_channels(), p.out_channels()}})
      if (std::max(side.h, side.w) > kMaxExtent)
        return "a side, padding or number of channels of more than 2^29";
    if (ceil_divide(p.output.size[2], kRows) * p.batch() > INT32_MAX)
      return "more than 2^33 output rows";
    if (Tiling(p).blocks_of_a_chunk() > INT32_MAX) return "more than 2^31 blocks";
    if (device.compute_capability < 80) return "no TF32 tensor cores";
    // What is left out of a product is 8 times what rounding it leaves out: no more than a sum of
    // so many terms loses anyway.
    constexpr int64_t kFewestTerms = 8;
    const int64_t terms = p.batch() * p.output_pixels();
    if (p.precision == Precision::kIeee && terms > 0 && terms < kFewestTerms)
      return "ieee sums of " + std::to_string(terms) + " products";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Operations that plain fp32 does while a job does a row of 8 pixels; measured on an H200.
    constexpr double kPointwise = 8e3, kStride2 = 22e3, kIeee = 14e3, kTf32 = 12e3;
    constexpr double kBandwidthFraction = 0.6, kLaunchSeconds = 11e-6;
    constexpr double kWeightSeconds = 30e-12;  // to store and to add a weight's parts
    const Tiling t(p);
    const double rows = double(t.items) * kRows * t.columns * t.strips;
    const double jobs = double(t.packs) * t.jobs() * t.blocks * t.out_blocks;
    const double each = p.kernel().h == 1                 ? kPointwise
                        : p.stride.h == 2                 ? kStride2
                        : p.precision == Precision::kIeee ? kIeee
                                                          : kTf32;
    return std::max(p.bytes() / (device.bandwidth * kBandwidthFraction),
                    rows * jobs * each / device.fp32_flops) +
           double(p.weight.numel()) * kWeightSeconds + kLaunchSeconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    return {chunk_bytes(p), wanted_chunks(p, device) * chunk_bytes(p)};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const auto start = [&](auto shape) {
      using S = decltype(shape);
      if (p.precision == Precision::kIeee)
        launch<S, true>(p, operands, execution);
      else
        launch<S, false>(p, operands, execution);
    };
    with_shape(p, start, AllShapes{});
  }
};

}  // namespace
}  // namespace grouped_weight

std::unique_ptr<Algorithm> make_grouped_weight() {
  return std::make_unique<grouped_weight::GroupedWeight>();
}

}  // namespace convops::cuda
