// RMSNorm with residual, and the gated activation of an MLP. See elementwise.cpp.
#pragma once

#include <cstdint>

#include "linear.h"

namespace loramux {

// sum = x + residual (if there is one); y = sum / rms(sum) · weight, all rows of `width`. Rounded as transformers does:
// the sum to bf16, the normalized value to bf16 before the weight.
struct NormCall {
  const bf16 *x, *residual, *weight;
  bf16 *sum, *y;
  int64_t rows, width;
  float epsilon;
};

// y = silu(gate)·up, where a row of `both` is gate and then up.
struct GateCall {
  const bf16* both;
  bf16* y;
  int64_t rows, width;
};

void norm_amx(Pool& pool, const NormCall& call);
void norm_avx512(Pool& pool, const NormCall& call);
void norm_avx2(Pool& pool, const NormCall& call);
void gate_amx(Pool& pool, const GateCall& call);
void gate_avx512(Pool& pool, const GateCall& call);
void gate_avx2(Pool& pool, const GateCall& call);

}  // namespace loramux
