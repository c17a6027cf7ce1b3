// grad_output → raw stages of implicit_gemm_weight's main kernel, by the copy engine.
#pragma once

#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::implicit_gemm_weight {

// Copies boxes of out channels × pixels of a row, or the other way round, zeros outside of the
// tensor.
template <typename T>
class Loader {
 public:
  __device__ Loader(const WeightGemm& g, const Place& place)
      : row_(g, place), channel_(place.group * g.out_channels + place.out_channel) {}

  __device__ bool done() const { return row_.done(); }
  // The next stage, if there is one, by one thread.
  __device__ void load(const WeightGemm& g, const WeightOperands& operands, Header& header,
                       uint8_t* raw) {
    if (row_.done()) return;
    uint64_t* const full = &header.raw_full[stage_.index];
    ptx::barrier_wait(&header.raw_empty[stage_.index], stage_.parity ^ 1);
    uint8_t* to = raw + stage_.index * T::kRawBytes;
    for (int i = 0; i < T::stage_rows(g) && !row_.done(); ++i, row_.next(g)) {
      if (T::kHalf && g.grad_last)
        load_channels(g, operands, full, to);
      else
        load_rows(g, operands, full, to);
    }
    ptx::barrier_arrive(full);
    stage_.next(T::kStages);
  }

 private:
  __device__ void load_rows(const WeightGemm& g, const WeightOperands& operands, uint64_t* full,
                            uint8_t*& to) const {
    const RowKinds& kinds = g.grad_kinds;
    const int channels_log = T::channel_kinds_log(g),
              box_channels = T::kTile.out_channels() >> channels_log;
    const int box_bytes = box_channels * T::pitch(g) * int(sizeof(typename T::Raw));
    const int32_t at[4] = {row_.x, row_.y >> kinds.rows_log, channel_ >> channels_log, row_.image};
    for (int kind = kinds.kind(0, row_.y); kind < kinds.rows() << channels_log;
         kind += kinds.rows(), to += box_bytes) {
      ptx::expect_bytes(full, box_bytes);
      ptx::copy_box(to, &operands.grad_maps[kind], at, full);
    }
  }
  __device__ void load_channels(const WeightGemm& g, const WeightOperands& operands, uint64_t* full,
                                uint8_t*& to) const {
    const int box_bytes = (T::pitch(g) - kReach) * kBoxChannels * 2;
    for (int i = 0; i < T::kTile.out_channels(); i += kBoxChannels, to += box_bytes) {
      const int32_t at[4] = {channel_ + i, row_.x, row_.y, row_.image};
      ptx::expect_bytes(full, box_bytes);
      ptx::copy_box(to, &operands.grad_maps[0], at, full);
    }
  }

  Rows row_;
  int channel_;
  Stage stage_;
};

}  // namespace convops::cuda::implicit_gemm_weight
