// How depthwise_weight cuts a problem: the tile, the images of a step and those of a block.
#pragma once

#include <algorithm>

#include "algorithm.h"
#include "cuda/depthwise_weight_sums.cuh"
#include "integers.h"

namespace convops::cuda::depthwise_weight {

// A thread adds at most so many products to one sum before the tree of partial sums begins: an
// error of about 0.3 · sqrt(512) roundings.
constexpr int64_t kMaxChain = 512;

// fp32 of a step: what is aimed at, so that a multiprocessor has room for as many blocks as its
// registers allow (strided ones have few threads for their input), and what is taken at most.
template <typename Sums>
constexpr int64_t kTileBytes = (Sums::kStrided ? 24 : 36) * 1024;
constexpr int64_t kMaxTileBytes = 48 * 1024;

// Whether a block has two tiles of half the size. It pays where the sums take long and a plane
// fills such a tile: small planes would rather share a step. 16-bit elements have their raw copies.
template <typename Sums>
bool is_pipelined(const ConvProblem& p) {
  constexpr int kManyTaps = 25, kLargePlane = 512;
  return Sums::kFixed && !Sums::kStrided && Sums::kTaps >= kManyTaps &&
         p.dtype == DType::kFloat32 && p.output_pixels() >= kLargePlane;
}

inline int64_t evenly(int64_t count, int64_t most) {
  return ceil_divide(count, ceil_divide(count, std::max<int64_t>(1, most)));
}

// Tile and step; chunks are chosen after. threads == 0: no tile fits the shared memory.
template <typename Sums>
Tiling tile_for(const ConvProblem& p) {
  const Window window(p);
  Tiling t{};
  t.shift = Sums::kShift;
  t.stages = is_pipelined<Sums>(p) ? 2 : 1;
  const auto lay_out = [&](int64_t rows, int64_t columns, int64_t planes) {
    t.rows = int(rows);
    t.columns = int(columns);
    t.planes = int(planes);
    const int height = window.rows(t.rows), width = t.shift + window.columns(t.columns);
    int64_t read = width;
    if constexpr (Sums::kFixed)
      read = (columns - kVector) * Sums::kStride + Sums::kVectors * kVector;
    t.input = {.rows = height, .pitch = int(round_up(read, kVector))};
    t.grad = {.rows = t.rows, .pitch = int(round_up(columns, kVector))};
    if (p.dtype != DType::kFloat32) {
      constexpr int kRawVector = 8;
      t.input.raw_rows = int(std::min<int64_t>(height, p.input.size[2]));
      t.input.raw_pitch = int(round_up(std::min<int64_t>(width, p.input.size[3]), kRawVector));
      t.grad.raw_rows = int(std::min<int64_t>(rows, p.output.size[2]));
      t.grad.raw_pitch = int(round_up(std::min<int64_t>(columns, p.output.size[3]), kRawVector));
    }
    return planes * (int64_t(height) * t.input.pitch + int64_t(t.rows) * t.grad.pitch) *
           int64_t(sizeof(float));
  };
  const int64_t tile_bytes = kTileBytes<Sums> / t.stages;
  const int64_t height = p.output.size[2], width = p.output.size[3];
  const int64_t unit_rows = Sums::kFixed ? kStripRows : 1,
                unit_columns = Sums::kFixed ? kVector : 1;
  // A tile is as wide as a warp has lanes for, then as high as the threads or the memory allow.
  const int64_t wide = ceil_divide(width, unit_columns), high = ceil_divide(height, unit_rows);
  int64_t columns = evenly(wide, Sums::kFixed ? kWarp : kVector * kWarp), rows = 0, planes = 1;
  for (;; columns = evenly(wide, columns - 1)) {
    const int64_t most = Sums::kFixed ? kMaxThreads / columns : kWarp;
    for (rows = evenly(high, most); rows > 1; rows = evenly(high, rows - 1))
      if (lay_out(rows * unit_rows, columns * unit_columns, 1) <= tile_bytes) break;
    if (lay_out(rows * unit_rows, columns * unit_columns, 1) <= kMaxTileBytes) break;
    if (columns == 1) return Tiling{};
  }
  const int64_t tiles = ceil_divide(wide, columns) * ceil_divide(high, rows);
  if (tiles > INT32_MAX) return Tiling{};
  t.tiles_w = int(ceil_divide(wide, columns));
  t.tiles = int(tiles);
  // Several images a step where they are small.
  const int64_t work = rows * columns, bytes = int64_t(t.tile_bytes());
  planes = std::min(tile_bytes / bytes, Sums::kFixed ? kMaxThreads / work : 4096 / work);
  planes = evenly(p.batch(), std::max<int64_t>(1, std::min(planes, p.batch())));
  lay_out(rows * unit_rows, columns * unit_columns, planes);
  t.threads = Sums::kFixed ? int(round_up(work * planes, kWarp)) : kMaxThreads;
  return t;
}

// Bytes of one partial sum a weight and tile.
inline int64_t chunk_bytes(const ConvProblem& p, const Tiling& t) {
  return p.weight.numel() * t.tiles * int64_t(sizeof(float));
}

template <typename Sums>
int64_t blocks_a_processor(const Tiling& t) {
  constexpr int64_t kSharedBytes = 220 * 1024, kBlockBytes = 2048;  // reserved and static
  const int64_t blocks = std::min<int64_t>(Sums::kBlocks * kMaxThreads / t.threads,
                                           kSharedBytes / (t.shared_bytes() + kBlockBytes));
  return std::clamp<int64_t>(blocks, 1, 32);
}

// Chunks of the images such that the waves of blocks take the fewest steps.
template <typename Sums>
int64_t wanted_chunks(const ConvProblem& p, const Device& device, const Tiling& t) {
  // What a block's begin and end, and the reduction's launch, cost in steps.
  constexpr double kBlockSteps = 0.7, kReductionSteps = 1.5;
  constexpr int64_t kMostTried = 64;
  const int64_t steps = ceil_divide(p.batch(), t.planes);
  const int64_t products =
      Sums::kFixed ? kStripRows * kVector : ceil_divide(t.planes * t.rows * t.columns, kWarp);
  const int64_t slots = device.processors * blocks_a_processor<Sums>(t);
  const int64_t least = ceil_divide(steps * products, std::max(kMaxChain, products));
  int64_t best = least;
  double best_steps = 0;
  for (int64_t chunks = least; chunks <= std::min(steps, least + kMostTried); ++chunks) {
    const int64_t waves = ceil_divide(p.out_channels() * t.tiles * chunks, slots);
    const double cost = double(waves) * (double(ceil_divide(steps, chunks)) + kBlockSteps) +
                        (chunks * t.tiles > 1 ? kReductionSteps : 0);
    if (chunks == least || cost < best_steps) {
      best = chunks;
      best_steps = cost;
    }
  }
  return best;
}

// All of the tiling; no more chunks than the workspace has room for.
template <typename Sums>
Tiling tiling_for(const ConvProblem& p, const Device& device, int64_t workspace_bytes) {
  Tiling t = tile_for<Sums>(p);
  if (t.threads == 0) return t;
  const int64_t steps = ceil_divide(p.batch(), t.planes);
  int64_t chunks = wanted_chunks<Sums>(p, device, t);
  const int64_t room = workspace_bytes / chunk_bytes(p, t);
  chunks = std::max<int64_t>(1, std::min(chunks, room));
  t.chunk_images = int(ceil_divide(steps, chunks)) * t.planes;
  t.chunks = int(ceil_divide(p.batch(), t.chunk_images));
  return t;
}

}  // namespace convops::cuda::depthwise_weight
