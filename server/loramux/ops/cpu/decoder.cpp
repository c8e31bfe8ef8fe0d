// norm, q/k/v, rotary attention, o, residual and norm, gate and up, silu·mul, down, residual: thirty layers of that are
// three hundred operations, and calling them one by one from Python takes longer than some of them.

#include "decoder.h"

#include <cstring>
#include <vector>

namespace loramux {
namespace {

// Grow-only memory of the calling thread, for what passes between operations.
bf16* scratch(size_t elements) {
  static thread_local std::vector<bf16> memory;
  if (memory.size() < elements + 32) memory.resize(elements + elements / 2 + 32);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-address & 63) / sizeof(bf16);
}

}  // namespace

void decode(const Kernels& kernels, Pool& pool, const DecoderCall& c) {
  const int64_t rows = c.rows, hidden = c.hidden;
  const int64_t q_width = c.attention.heads * c.attention.dim, kv_width = c.attention.kv_heads * c.attention.dim;
  const int64_t qkv_width = q_width + 2 * kv_width;
  bf16* normed = scratch(static_cast<size_t>(rows * (2 * hidden + qkv_width + q_width + 3 * c.inner)));
  bf16* delta = normed + rows * hidden;  // what the residual has yet to take in
  bf16* qkv = delta + rows * hidden;
  bf16* attended = qkv + rows * qkv_width;
  bf16* both = attended + rows * q_width;
  bf16* gated = both + rows * 2 * c.inner;
  const auto linear = [&](const bf16* x, int64_t k, bf16* y, int64_t width, const Part* parts, int64_t count,
                          const Part* next, int64_t num_next, int64_t next_k) {
    kernels.linear(pool, {x, rows, k, k, y, width, parts, count, c.segments, c.num_segments, next, num_next, next_k});
  };
  AttentionCall attention = c.attention;
  attention.q = qkv;
  attention.k = qkv + q_width;
  attention.v = attention.k + kv_width;
  attention.q_stride = attention.k_stride = attention.v_stride = qkv_width;
  attention.out = attended;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const Layer& layer = c.layers[i];
    kernels.norm(pool, {c.x, i == 0 ? nullptr : delta, layer.input_norm, c.x, normed, rows, hidden, layer.input_epsilon});
    linear(normed, hidden, qkv, qkv_width, layer.qkv, 3, &layer.o, 1, q_width);
    attention.keys = layer.keys;
    attention.values = layer.values;
    attention.window = layer.window;
    attention.scaling = layer.scaling;
    kernels.attention(pool, attention);
    linear(attended, q_width, delta, hidden, &layer.o, 1, layer.gate_up, 2, hidden);
    kernels.norm(pool, {c.x, delta, layer.post_attention_norm, c.x, normed, rows, hidden, layer.post_attention_epsilon});
    linear(normed, hidden, both, 2 * c.inner, layer.gate_up, 2, &layer.down, 1, c.inner);
    kernels.gate(pool, {both, gated, rows, c.inner});
    linear(gated, c.inner, delta, hidden, &layer.down, 1, c.layers[i + 1].qkv, i + 1 < c.num_layers ? 3 : 0, hidden);
  }
  // A norm that only adds: its other output goes where nobody looks.
  kernels.norm(pool, {c.x, delta, c.layers[0].input_norm, c.x, normed, rows, hidden, c.layers[0].input_epsilon});
}

}  // namespace loramux
