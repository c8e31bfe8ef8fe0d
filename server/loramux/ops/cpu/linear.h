// y_p = scale ⊙ (W_p·x + Σ weight·(B·(A·x) + lora_bias)) + bias_p, for parts p that share x. See linear_tiles.cpp and linear_vectors.cpp.
#pragma once

#include <cstdint>

#include "pool.h"

namespace loramux {

using bf16 = uint16_t;

// One weight [n, k]: NF4 in tile order (codes != nullptr) or dense bf16 row-major (dense != nullptr).
//
// Tile order: rows in tiles of 16, k in blocks of 64. codes [tiles][k/64][16][32]. For AMX: byte j of a row's 32 holds
// weight j in the high nibble and weight 32 + j in the low one. For vectors: 32 bytes hold four inputs of all rows, see
// packed.py. absmax [tiles][k/64][16], as bytes into `table256` with the scale of its group of 256 blocks (in canonical
// order: row·k/64 + block) and `offset` to add; or as floats.
struct Part {
  const uint8_t* codes;
  const bf16* dense;
  const uint8_t* absmax;
  const float* absmax_float;
  const float* group_scale;
  const float* table256;
  const float* bias;
  float offset;
  int64_t n;
  int64_t site;
  int64_t column;  // where its outputs begin in a row of y
};

// Rows start ≤ m < stop get `weight` times an adapter's branch. The adapter is one buffer of bf16: offsets[site][4] are
// the elements where A [r, k], B [n, r], the bias [n] and the scale [n] (of floats; DoRA) begin, -1 where there is none;
// ranks[site] is r. A segment with a scale shares no row with another.
struct Segment {
  int64_t start, stop;
  float weight;
  const bf16* buffer;
  const int64_t* offsets;
  const int32_t* ranks;

  bool changes(int64_t site) const { return start < stop && site >= 0 && ranks[site] != 0; }
  const bf16* a(int64_t site) const { return buffer + offsets[4 * site]; }
  const bf16* b(int64_t site) const { return buffer + offsets[4 * site + 1]; }
  const bf16* bias(int64_t site) const { return optional(offsets[4 * site + 2]); }
  const float* scale(int64_t site) const { return reinterpret_cast<const float*>(optional(offsets[4 * site + 3])); }

 private:
  const bf16* optional(int64_t at) const { return at < 0 ? nullptr : buffer + at; }
};

struct LinearCall {
  const bf16* x;  // [m, k]
  int64_t m, k, x_stride;
  bf16* y;  // [m, y_stride]
  int64_t y_stride;
  const Part* parts;
  int64_t num_parts;
  const Segment* segments;
  int64_t num_segments;
  // What is called after this with the same segments, if that is known: parts of inputs next_k.
  const Part* next = nullptr;
  int64_t num_next = 0, next_k = 0;
};

void linear_amx(Pool& pool, const LinearCall& call);
void linear_avx512(Pool& pool, const LinearCall& call);
void linear_avx2(Pool& pool, const LinearCall& call);

}  // namespace loramux
