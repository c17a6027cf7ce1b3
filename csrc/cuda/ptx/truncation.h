// What tensor cores do to a sum: each addition to one that is not zero cuts off what it has no bits
// for, towards zero. Of a single convolution that is far below what fp32 sums are off anyway, but
// it has a direction: in a network in inference, gains below 1 multiply from layer to layer.
#pragma once

namespace convops::cuda::ptx {

// What a sum of products of random signs loses by one addition, of itself on average: measured for
// m64n96k16 of fp16 and m16n8k8 of TF32, chains of 3 to 140 additions (1.6e-8 to 1.75e-8). If all
// have one sign it is two to five times as much.
constexpr float kLostByAddition = 1.65e-8f;

// By a chain of additions that begins at zero.
constexpr float lost_by(float additions) { return kLostByAddition * (additions - 1); }

}  // namespace convops::cuda::ptx
