// Rotary embedding, cache write and causal attention over paged keys and values. See attention.cpp.
#pragma once

#include <cstdint>

#include "linear.h"

namespace loramux {

struct AttentionCall {
  const bf16 *q, *k, *v;              // [rows, heads, dim], head h of row t at t·stride + h·dim
  int64_t q_stride, k_stride, v_stride;
  const bf16 *cosines, *sines;        // [rows, dim], or null: already rotated
  bf16 *keys, *values;                // [blocks, block_size, kv_heads, dim or value_dim]
  const int64_t* slots;               // [rows]
  const int32_t* query_starts;        // [sequences + 1]
  const int32_t* contexts;            // [sequences]
  const int32_t* tables;              // [sequences, table_stride]
  bf16* out;                          // [rows, heads, value_dim]
  int64_t rows, heads, kv_heads, dim, value_dim, block_size, sequences, table_stride;
  float scaling, softcap;             // softcap 0: none
  int64_t window;                     // 0: none
  const float* sinks;                 // [heads] or null
};

constexpr int kKeys = 32;  // positions of a step

// Position p of sequence s in the cache, in units of [kv_heads, dim].
inline int64_t slot(const AttentionCall& c, int64_t s, int64_t position) {
  return static_cast<int64_t>(c.tables[s * c.table_stride + position / c.block_size]) * c.block_size +
         position % c.block_size;
}

void attention_amx(Pool& pool, const AttentionCall& call);
void attention_avx512(Pool& pool, const AttentionCall& call);
void attention_avx2(Pool& pool, const AttentionCall& call);

}  // namespace loramux
