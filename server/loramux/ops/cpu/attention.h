// Rotary embedding, cache write and causal attention over paged keys and values. See attention.cpp.
#pragma once

#include <cstdint>

#include "linear.h"

namespace loramux {

struct AttentionCall {
  const bf16 *q, *k, *v;              // [rows, heads, dim], head h of row t at t·stride + h·dim
  int64_t q_stride, k_stride, v_stride;
  const bf16 *cosines, *sines;        // [rows, dim], or null: already rotated
  bf16 *keys, *values;                // [blocks, kv_heads, block_size, dim or value_dim]
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

constexpr int kKeys = 32;           // positions of a step
constexpr int kWidestHead = 512;    // elements of the zeros that stand in for positions after the last

// Where a head's key or value for a slot stands in the cache, in rows.
inline int64_t row_of_slot(const AttentionCall& c, int64_t slot, int64_t head) {
  return (slot / c.block_size * c.kv_heads + head) * c.block_size + slot % c.block_size;
}
// The same for a position of sequence s.
inline int64_t row_of(const AttentionCall& c, int64_t s, int64_t head, int64_t position) {
  const int64_t block = c.tables[s * c.table_stride + position / c.block_size];
  return (block * c.kv_heads + head) * c.block_size + position % c.block_size;
}

void attention_amx(Pool& pool, const AttentionCall& call);
void attention_avx512(Pool& pool, const AttentionCall& call);
void attention_avx2(Pool& pool, const AttentionCall& call);

}  // namespace loramux
