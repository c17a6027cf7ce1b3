// What the kernels of implicit_gemm compute and how it is cut into tiles: plain data, made once on
// the host and passed to every kernel by value.
//
// The convolution becomes one dense stride-1 problem on *cells*. A cell is block.h × block.w
// elements of the result and phases.h × phases.w elements of the source (the tensor read: the
// input, or grad_output for backward-input):
//
//   result(row m, cell)  =  Σ over k, taps:  weight(m, k, tap) · source(k, cell + tap)
//
//   row m = (phase of the result, result channel)
//   sum k = (phase of the source, source channel)
//
// Forward: a cell's side is `block` results and `block · stride` sources. Backward-input of stride
// s turns round: `block · s` results and `block` sources. So strides cost no arithmetic, blocks
// fill the tensor cores' rows where channels are few, and no dilated tensor is ever made.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>
#include <string>

#include "algorithm.h"
#include "integers.h"

namespace convops::cuda {

inline constexpr int64_t kMaxExtent = int64_t{1} << 30;  // coordinates are int
inline constexpr int kOctetLog = 3, kOctet = 8;  // channels of the sum: the 16 bytes wgmma reads
inline constexpr int kStepOctets = 2;  // that an instruction sums over, at a tap or at two
inline constexpr int kMaxTaps = 1024;  // in all lists together; they travel as kernel parameters
inline constexpr int kMaxClasses = 16;
inline constexpr int kMaxStageSums = 64;  // channels of the sum in a stage
// Of a cell of 16 bits in a block of the sum. Where a stage has whole cells, theirs are 1, 2 or 4
// blocks, swizzled: shared memory is a multiple of what that repeats in.
inline constexpr int kBlockBytes = kStepOctets * kOctet * 2;
inline constexpr int kSwizzleBytes = 1024;

// Cells a warpgroup multiplies at once, the instruction's N, and warpgroups that do. There is a
// kernel for each. Sums of 16 bits are not promoted, which leaves registers for more of them, or
// for more warpgroups: they store in less time, as that is bound by latency.
struct GemmShape {
  int columns, consumers;
};
inline constexpr int kConsumers = 2, kMostConsumers = 4;
inline constexpr GemmShape kFloatShapes[] = {
    {96, kConsumers}, {128, kConsumers}, {152, kConsumers}, {160, kConsumers}};
inline constexpr GemmShape kHalfShapes[] = {{128, kConsumers},
                                            {128, kMostConsumers},
                                            {192, kConsumers},
                                            {224, kConsumers},
                                            {256, kConsumers}};
constexpr std::span<const GemmShape> gemm_shapes(int element_bytes) {
  if (element_bytes == 4) return kFloatShapes;
  return kHalfShapes;
}
// What the consumers need no registers for is the converters': up to kFewColumns there are more of
// them, above kRoomyColumns each has fewer registers.
inline constexpr int kFewColumns = 128, kRoomyColumns = 152;
// An instruction's registers must be those of any thread at the launch: above this, of 16 bits,
// there are fewer threads.
inline constexpr int kFewHalves = 192;

// After so many steps sums of float32 are promoted at the latest: 18 truncated additions of three
// products a step (docs/implicit_gemm.md), or as many of one as hardly count beside TF32's
// rounding.
constexpr int promoted_steps(int products) { return products == 3 ? 6 : 128; }
// Sums of 16 bits are not: of so many products they still are far better than their rounding.
inline constexpr int kMostHalfProducts = 1 << 14;

// Converters are in groups, which take stages by turns: what one waits for, the other does not.
// There is one warp each that streams weights and loads sources.
inline constexpr int kConverterGroups = 2;
inline constexpr int kMostConverterThreads = 5 * 32;  // of a group
constexpr int gemm_converter_threads(int element_bytes, int columns, int consumers) {
  if (element_bytes == 2) return columns > kFewHalves || consumers > kConsumers ? 32 : 3 * 32;
  return columns > kFewColumns ? 3 * 32 : kMostConverterThreads;
}
inline constexpr int kMaxSharedMemory = 227 * 1024;  // a block of sm_90
// Elements that memory writes at once, that one tile should write, and that the copy engine's
// places are whole in.
constexpr int sector_elements(int element_bytes) { return 32 / element_bytes; }
constexpr int chunk_elements(int element_bytes) { return 256 / element_bytes; }
constexpr int vector_elements(int element_bytes) { return 16 / element_bytes; }
inline constexpr int kVector = vector_elements(sizeof(float));
// Elements between the channels of staged chunks, against bank conflicts: those of a row are stored
// two at a time, eight bytes of float32 or four.
inline constexpr int kGap = 8;
inline constexpr int kMostRun = 4;         // neighbours of a patch
inline constexpr int kMaxSourceKinds = 8;  // of rows times channels of the source,
inline constexpr int kMaxKinds = 16;       // and of the result
inline constexpr int kMostChannelKindsLog =
    3;  // a block of rows is whole groups of sorted channels
inline constexpr int kMaxRawStages = 4, kMaxSourceStages = 3, kMaxWeightStages = 7;

// Elements between staged rows: an odd multiple of 8, against bank conflicts.
constexpr int gemm_stage_pitch(int columns) { return columns / 16 * 16 + 24; }

// One spatial axis of the problem on cells.
struct GemmAxis {
  int block;                              // results along a cell
  int phases;                             // sources along a cell
  int first;                              // the smallest shift of a tap, in cells
  int shifts;                             // taps are shifted by first, ..., first + shifts - 1
  int source_origin, result_origin;       // places of cell 0 before the tensor; either is 0
  int stride, padding, dilation, kernel;  // of the convolution
  Divisor by_dilation;
  bool transposed;  // backward-input

  // The first source of a cell, an element of the tensor or outside.
  CONVOPS_HOST_DEVICE int source(int cell) const { return cell * phases - source_origin; }
  // Which weight connects result phase q with source phase p of the cell `shift` further on; -1
  // where none does.
  CONVOPS_HOST_DEVICE int tap(int q, int p, int shift) const {
    const int from = source(shift) + p, to = q - result_origin;
    const int distance = transposed ? to + padding - stride * from : from - stride * to + padding;
    const int index = by_dilation.quotient(distance);
    return distance >= 0 && index < kernel && index * dilation == distance ? index : -1;
  }
};

// A tap of the problem on cells, counted from the tile's first source cell.
struct GemmTap {
  int16_t h, w;
};
// Before the first shift no weight connects anything: a tap of zeros.
inline constexpr GemmTap kNoTap = {-1, -1};

// What is computed.
struct GemmProblem {
  GemmAxis h, w;
  Tensor4 source, result;
  // Of the weight, between groups, result channels, source channels and in the window.
  int64_t weight_group_stride, weight_row_stride, weight_sum_stride;
  int64_t weight_h_stride, weight_w_stride;
  int64_t bias_stride;
  int groups, rows, sums;        // result and source channels of a group
  int images, cells_h, cells_w;  // of the result
  DType dtype;
  int element_bytes;
  int products;  // of parts a multiplication takes: of float32 3 for ieee and 1 for tf32, else 1
  // Of float32: scaled so that the largest is 2^14 to 2^15, channels and cells below this lose too
  // many bits.
  float smallest;

  // Rows are ordered (class, phase, channel) so that a tile of rows skips taps which only other
  // phases have: a class is a vertical phase of the result, or all of them.
  int row_classes;
  // The same for the sum: a class is one phase of the source in both axes, or all of them.
  int sum_classes;
  int class_rows, class_sums;  // of one class
  // The sum is taken in blocks of two octets or of one, tap by tap. A step, what one instruction
  // sums, is two octets at a tap, or one octet at two taps.
  int octets, block_sums;  // of a block
  int sum_blocks;          // in class_sums
  // Result channels of as many kinds as there are places in a sector of memory where they begin (0
  // where that does not matter), and how many channels eight rows have. The eight are of one kind.
  int channel_kinds_log, channels_log;
  // The same of source channels, in 16 bytes: an octet of the sum has one kind. Only of 16 bits.
  int sum_kinds_log;
  // Steps of a block of (row class, sum class): from step_begin[r][s] up to step_begin[r][s + 1].
  // Step i has taps[i * step_taps()] and, where it has two, the next: of an odd number of taps the
  // last step has kNoTap.
  int16_t step_begin[kMaxClasses][kMaxClasses + 1];
  GemmTap taps[kMaxTaps];
  // Where the steps of a whole stage find their operands there, lists in the order of step_begin:
  // cells to the first octet, and, in the upper half of the word, from there to the second.
  uint32_t step_cells[kMaxTaps];
  Divisor by_rows, by_block_w, by_phases, by_phases_w;  // of the numbers of that name
  Divisor by_window, by_kernel_w;                       // taps of a channel, and of their rows

  CONVOPS_HOST_DEVICE int phases() const { return h.phases * w.phases; }  // of the source
  // What elements of 16 bits are multiplied as they are, and summed without promotion.
  CONVOPS_HOST_DEVICE bool is_half() const { return element_bytes == 2; }
  int sector() const { return sector_elements(element_bytes); }
  int vector() const { return vector_elements(element_bytes); }
  // Whether a block of the sum has several of them.
  CONVOPS_HOST_DEVICE bool mixes_phases() const { return sum_classes == 1 && phases() > 1; }
  CONVOPS_HOST_DEVICE int step_taps() const { return kStepOctets / octets; }
  CONVOPS_HOST_DEVICE int step_count(int row_class, int sum_class) const {
    return step_begin[row_class][sum_class + 1] - step_begin[row_class][sum_class];
  }
  // Of a block of rows, in all blocks of the sum.
  CONVOPS_HOST_DEVICE int steps(int row_class) const {
    return (step_begin[row_class][sum_classes] - step_begin[row_class][0]) * sum_blocks;
  }
};

struct GemmRow {
  int channel;           // of the group
  int phase_h, phase_w;  // of the cell
};
// Channels as they lie in the rows, those of a kind side by side, and back.
CONVOPS_HOST_DEVICE inline int sort_kinds(int line, int kinds_log, int channels_log) {
  const int low = line & ((1 << (kinds_log + channels_log)) - 1);
  return line - low + ((low & ((1 << channels_log) - 1)) << kinds_log) + (low >> channels_log);
}
// Horizontal phases are neighbouring rows, because their results are neighbours in memory.
CONVOPS_HOST_DEVICE inline GemmRow gemm_row(const GemmProblem& g, int row_class, int row) {
  const int line = sort_kinds(g.by_block_w.quotient(row), g.channel_kinds_log, g.channels_log);
  return {g.by_rows.remainder(line), g.row_classes > 1 ? row_class : g.by_rows.quotient(line),
          g.by_block_w.remainder(row)};
}

// Where that finds a channel, a vertical phase (of the row class) and a horizontal one.
CONVOPS_HOST_DEVICE inline int find_gemm_row(const GemmProblem& g, int channel, int phase_h,
                                             int phase_w) {
  const int line = sort_kinds(phase_h * g.rows + channel, g.channels_log, g.channel_kinds_log);
  return line * g.w.block + phase_w;
}

struct GemmSum {
  int channel;
  int phase_h, phase_w;
};
CONVOPS_HOST_DEVICE inline GemmSum gemm_sum(const GemmProblem& g, int sum_class, int k) {
  const int phase = g.sum_classes > 1 ? sum_class : g.by_phases.remainder(k);
  const int channel = g.sum_classes > 1 ? k : g.by_phases.quotient(k);
  return {sort_kinds(channel, g.sum_kinds_log, kOctetLog), g.by_phases_w.quotient(phase),
          g.by_phases_w.remainder(phase)};
}

// How it is cut. The cells of all images lie one below the other, image_rows rows each, of which
// those past cells_h are computed for nothing; a tile is a window of that tall image. All widths
// are in cells; rows of a tile lie `pitch` cells apart, and what a tap reads past a row's end is
// the result of no cell that is kept.
struct GemmTile {
  int row_tile;   // rows of the weight: 128 (64 a warpgroup), or 64, the warpgroups sharing them
  int columns;    // cells a warpgroup multiplies at once: the N of the instruction
  int consumers;  // warpgroups that do so
  int pitch;      // cells between rows of a tile
  int height;     // rows of a warpgroup's part of a tile
  int tile_rows;  // rows of the whole tile
  int width;      // cells of a row that are kept
  int step;       // cells from a tile to the next in the row
  int image_rows;
  bool straddles;  // tiles may reach into the next image
  int tiles_h, tiles_w;
  int row_blocks;  // of a class
  int units;       // blocks of rows in all groups and classes: jobs on the same source tile
  int jobs;
  int source_cells;  // of a tile, with what the taps reach
  // Results leave through shared memory, eight rows of a warp at a time: one by one, or, where they
  // are neighbours in memory, many at a time, 2^woven_log horizontal phases woven together.
  bool neighbours;
  int woven_log;
  // Or by cells, of 16 bits whose channels are neighbours (channels_last), in boxes of so many.
  bool across;
  int cell_rows;
  // Results by which neighbouring tiles overlap, less than a sector of memory: each row's border is
  // put where a sector begins. All rows begin at multiples of a sector less the overlap.
  int overlap;
  // In boxes of a row of the tile, where maps are few: rows of the result are of kinds by where in
  // 16 bytes they begin, and for every pair of kinds there is a map of the tensor.
  bool boxed;
  int row_kinds_log;
  // Of a channel's results, and in shared memory from one to the next and of a box. Tiles of whole
  // chunks of memory have gaps between channels there, so that those lie in different banks.
  int box_width, box_pitch, box_elements;
  bool has_edges;  // results that are in no box
  // In lines: a row of the tile, or those that follow each other in an image, are a run.
  bool joined;       // the tile's rows follow each other in an image of the result
  int runs;          // at most so many are in a row of the weight
  int slot, line;    // elements of a row of the tile, of all its rows
  int staged_bytes;  // of eight rows, and what they are as lines, should boxes be impossible
  int line_bytes;
  int staged_halves;  // of a warp's 16 rows, each with its own memory
  bool paired;        // two results of a thread are always aligned together there
  int depth;          // blocks of the sum in a stage: 1, 2 or 4, and 1 where they are one octet
  bool staggered;     // the warpgroups promote by turns
  // Sources as they come from memory. By bulk copies (boxes of rows, which begin at multiples of 16
  // bytes: rows of the tensor are of as many kinds as there are places between those where they
  // begin, and every kind has its map and its box), or cell by cell, as they lie in the tile.
  bool bulk;
  bool by_octets;  // or, where channels of 16 bits are neighbours, by octets of a cell
  bool direct;     // or as boxes of whole cells, as they are multiplied (kBlockBytes)
  int run;         // of patches, neighbours that are read at once; 0 where a cell is one element
  int source_kinds_log;
  int raw_channels;          // of a stage: channels in bulk copies, else channels in a phase
  int raw_pitch, raw_cells;  // elements of a row, of a channel in a box, in whole vectors
  // Elements of all boxes of a kind of rows, and from an octet to the next: octets of several kinds
  // have boxes of their own. Bytes of a stage.
  int raw_box, raw_octet, raw_bytes;
  bool octets_apart;
  // To find the largest of every channel, or of several pieces of a channel, groups of threads.
  int max_groups, max_pieces_log;
  // In shared memory: cells from an octet to the next, of a block's high parts or of its low ones,
  // and of a stage.
  int plane, part, stage_cells;
  uint32_t operand_layout;  // the upper word of wgmma's descriptors of operands there
  int raw_stages, source_stages, weight_stages;
  int weight_stage_bytes;
  // Of the weights, where all that a block ever needs stay in shared memory; 0 where they pass
  // through the ring.
  int resident_bytes;
  Divisor by_max_lanes;  // threads of such a group
  Divisor by_units, by_row_blocks, by_row_classes, by_tiles_w, by_image_rows, by_pitch, by_runs;

  // From a cell to the next in the source ring, in units of 16 bytes.
  CONVOPS_HOST_DEVICE int cell_octets() const { return direct ? depth * kStepOctets : 1; }

  // Results from a place in the tensor to where tiles may meet next: the border of a sector. To
  // write a part of one costs as much as several whole ones.
  CONVOPS_HOST_DEVICE int to_border(int offset) const { return -offset & overlap; }
  CONVOPS_HOST_DEVICE bool has_gaps() const { return box_pitch > box_width; }
};

// A job of the main kernel: a block of rows on a tile of cells.
struct GemmJob {
  int group, row_class, row_block;
  int row, column;  // the tile's first cell: row of the tall image, column
};
CONVOPS_HOST_DEVICE inline GemmJob gemm_job(const GemmProblem& g, const GemmTile& t, int index) {
  const int unit = t.by_units.remainder(index), tile = t.by_units.quotient(index);
  const int row_class = t.by_row_blocks.quotient(unit);  // of all groups
  const int group = t.by_row_classes.quotient(row_class);
  const int tile_h = t.by_tiles_w.quotient(tile);
  return {group, row_class - group * g.row_classes, t.by_row_blocks.remainder(unit),
          tile_h * t.tile_rows, (tile - tile_h * t.tiles_w) * t.step};
}

// Of a step.
CONVOPS_HOST_DEVICE constexpr int gemm_weight_bytes(int products, int row_tile) {
  return row_tile * kStepOctets * kOctet * 2 * (products == 3 ? 2 : 1);
}

// Of a stage of weights: two steps, or four where they are small, because a copy of less is not
// worth its barriers.
inline constexpr int kLeastWeightStage = 8192;
CONVOPS_HOST_DEVICE constexpr int gemm_weight_stage_bytes(int products, int row_tile) {
  const int two = 2 * gemm_weight_bytes(products, row_tile);
  return two > kLeastWeightStage ? two : kLeastWeightStage;
}

// Where the weights of a job begin, counted in steps; they lie in the order of units.
CONVOPS_HOST_DEVICE inline int64_t gemm_weight_step(const GemmProblem& g, const GemmTile& t,
                                                    const GemmJob& job) {
  int64_t group_steps = 0, class_begin = 0;
  for (int row_class = 0; row_class < g.row_classes; ++row_class) {
    if (row_class == job.row_class) class_begin = group_steps;
    group_steps += int64_t(g.steps(row_class)) * t.row_blocks;
  }
  return job.group * group_steps + class_begin + int64_t(job.row_block) * g.steps(job.row_class);
}

// Shared memory of the main kernel, in bytes from its start.
struct GemmSharedMemory {
  int weights, raw, sources, staged, bytes;

  static constexpr int kHeader = 7040;  // barriers and notes: every byte is one less for tiles

  explicit GemmSharedMemory(const GemmTile& t) {
    weights = kHeader;
    raw = weights +
          (t.resident_bytes > 0 ? t.resident_bytes : t.weight_stages * t.weight_stage_bytes);
    sources = raw + t.raw_stages * t.raw_bytes;
    if (t.direct) sources = (sources + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
    const int alignment = t.across ? kSwizzleBytes : 128;
    staged = (sources + t.source_stages * t.stage_cells * kOctet * 2 + alignment - 1) / alignment *
             alignment;
    const int halves = t.staged_halves * t.staged_bytes;
    bytes = staged + t.consumers * 4 * (halves > t.line_bytes ? halves : t.line_bytes);
  }
};

// Where GemmOperands' parts of the workspace begin, in bytes.
struct GemmWorkspace {
  int64_t packed_weights, row_scales, bad_jobs, bytes;
};

struct GemmPlan {
  std::string reason;  // why there is none; empty if there is
  GemmProblem problem;
  GemmTile tile;
  double seconds;
  GemmWorkspace workspace;
};

// What there is to choose for the problem on cells: their size, whether they are snug, rows and
// sums are in classes and an image is one row, and how many octets a block of the sum has.
struct CellChoice {
  int block_h, block_w, octets;
  bool snug, row_classes, sum_classes, join;
};

// That problem; false where it is not to be had, or no different from another.
bool describe_cells(const ConvProblem& problem, const CellChoice& choice, GemmProblem& gemm);
// Of what is this far apart: the places in so many elements where it begins.
int kinds_log(int64_t stride, int elements);
// Whether results of a row of cells can be written as neighbours in memory.
bool are_neighbours(const GemmProblem& gemm);

// fp16 parts resolve 2^-25. What that makes of a sum of elements this small, each of them off by as
// much, stays within 1.5 · sqrt(length) units of the precision, relative to their magnitudes. It is
// held against the largest of a channel or cell. Where a result sums few channels, by a single tap
// perhaps (at a corner, of a stride's phase), all its elements may happen to be far smaller than
// that: room for it; with one product there is room for elements a thousand times smaller.
float smallest_element(int products, int64_t channels, int64_t taps);

// The fastest by estimate of all blocks and tiles.
GemmPlan plan_gemm(const ConvProblem& problem, const Device& device);
int64_t packed_steps(const GemmProblem& gemm, const GemmTile& tile);  // of all packed weights
// The seconds of a call whose tensors have so many bytes, to choose by.
enum class Compared { kTiles, kAlgorithms };
double estimate_gemm(const GemmProblem& gemm, const GemmTile& tile, const Device& device,
                     double bytes, Compared compared);
// Whether octets of a tensor's channels are 16 aligned bytes.
bool has_octets(int element_bytes, const Tensor4& tensor);
// Gives up bulk copies, or all but those of an element, for a source whose address they cannot
// take.
void copy_by_cells(const GemmProblem& gemm, GemmTile& tile);
void copy_by_elements(GemmProblem& gemm, GemmTile& tile);
// Gives up boxes, for a result whose address they cannot take.
void store_lines(GemmTile& tile);
// Whether the source can be read by bulk copies, its kinds of rows, and the copies' descriptions.
bool can_copy_bulk(const GemmProblem& gemm);
// The same as boxes of whole cells, where channels are neighbours: a map for each class of the sum.
bool can_copy_direct(const GemmProblem& gemm);
int source_kinds(const GemmProblem& gemm);
void make_source_maps(const GemmProblem& gemm, const GemmTile& tile, const void* source,
                      CUtensorMap* maps);
void make_cell_maps(const GemmProblem& gemm, const GemmTile& tile, const void* source,
                    CUtensorMap* maps);
void make_result_maps(const GemmProblem& gemm, const GemmTile& tile, void* result,
                      CUtensorMap* maps);
CUtensorMap make_result_cells_map(const GemmProblem& gemm, const GemmTile& tile, void* result);

// The kernels, in the order they run; each launches on the stream and checks the launch.
struct GemmOperands {
  const void *source, *weight, *bias;  // bias: nullptr without
  void* result;
  // In the workspace: the weights as the main kernel streams them; of float32 the power of two just
  // under every result channel's largest weight, with a minus where fp16 cannot hold its weights;
  // and which jobs it cannot hold.
  uint8_t* packed_weights;
  float* row_scales;
  uint8_t* bad_jobs;
  // Only with GemmTile::bulk: [row kind][channel kind], or with direct: [class of the sum].
  CUtensorMap source_maps[kMaxSourceKinds];
  // Only with GemmTile::boxed: [row kind][channel kind], or with across: one.
  CUtensorMap result_maps[kMaxKinds];
};
void pack_weights(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                  void* stream);
void multiply_float(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                    int processors, void* stream);
void multiply_half(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                   int processors, void* stream);
void multiply_bfloat16(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                       int processors, void* stream);
// Computes the jobs marked bad again, in sums of plain float32.
void recompute_bad_jobs(const GemmProblem& gemm, const GemmTile& tile, const GemmOperands& operands,
                        int processors, void* stream);

}  // namespace convops::cuda
