// A whole stack of Llama-shaped decoder layers in one call. See decoder.cpp.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace loramux {

// The kernels of one instruction set.
struct Kernels {
  void (*linear)(Pool&, const LinearCall&);
  void (*attention)(Pool&, const AttentionCall&);
  void (*norm)(Pool&, const NormCall&);
  void (*gate)(Pool&, const GateCall&);
};

struct Layer {
  Part qkv[3], o, gate_up[2], down;
  const bf16 *input_norm, *post_attention_norm;
  float input_epsilon, post_attention_epsilon;
  bf16 *keys, *values;
  int64_t window;
  float scaling;
};

struct DecoderCall {
  bf16* x;  // [rows, hidden], in and out
  int64_t rows, hidden, inner;
  const Layer* layers;
  int64_t num_layers;
  const Segment* segments;
  int64_t num_segments;
  AttentionCall attention;  // all but q, k, v, out and what `Layer` has
};

// Writes the rows' keys and values, and the last layer's output to x. One caller at a time.
void decode(const Kernels& kernels, Pool& pool, const DecoderCall& call);

}  // namespace loramux
