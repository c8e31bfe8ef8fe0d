// Causal attention over paged keys and values, compiled once for each instruction set (LORAMUX_SET names it).
//
// A work item is one key-value head and as many (query row, query head) pairs of one sequence as fit into sixteen
// columns. Keys come in steps of 32 positions, counted from the sequence's start: scores q·k with keys where they lie
// in the cache, an online softmax (Milakov & Gimelshein 2018), then the values by their weights. `Products` has the two
// products; a file for tiles and one for vectors.
//
// Order of summation: a query's result depends on its own position and keys alone. Steps begin at multiples of 32
// whatever is cached, chunked or batched, and a step in which a query sees nothing leaves its sums as they were.

#include "attention.h"

#include <cmath>
#include <limits>

#include "vectors.h"
#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif

namespace loramux {
namespace {

constexpr int64_t kAhead = 2 * kKeys;  // positions between what is computed and what is asked for
constexpr int64_t kWidest = 64;  // by how much a row may be padded
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Rotates one head as transformers' apply_rotary_pos_emb does (halves, not pairs), in float32, rounded once.
inline void rotate(const bf16* from, const bf16* __restrict cosines, const bf16* __restrict sines, int64_t dim,
                   bf16* __restrict to) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(from[i]), b = to_float(from[half + i]);
    to[i] = to_bf16(a * to_float(cosines[i]) - b * to_float(sines[i]));
    to[half + i] = to_bf16(b * to_float(cosines[half + i]) + a * to_float(sines[half + i]));
  }
}

struct Job {
  const AttentionCall& c;
  Pool& pool;
  int64_t group;        // query heads of a key-value head
  int64_t item_rows;    // query rows of an item
  int64_t item_heads;   // query heads of an item
};

struct Buffers {
  bf16* rotated;   // one head
  bf16* columns;   // [16][query_width] queries as rows
  float* lines;    // [16 columns][32 keys]: scores, then weights
  float* sums;     // [16 columns][sum_width]
};

void write_cache(const AttentionCall& c, int64_t t, bf16* rotated) {
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    const bf16* key = c.k + t * c.k_stride + h * c.dim;
    if (c.cosines != nullptr) {
      rotate(key, c.cosines + t * c.dim, c.sines + t * c.dim, c.dim, rotated);
      key = rotated;
    }
    const int64_t row = row_of_slot(c, c.slots[t], h);
    std::memcpy(c.keys + row * c.dim, key, c.dim * sizeof(bf16));
    std::memcpy(c.values + row * c.value_dim, c.v + t * c.v_stride + h * c.value_dim,
                c.value_dim * sizeof(bf16));
  }
}

// Scales 32 scores and hides those that are not from ≤ j < to; returns the greatest.
float scale_scores(const AttentionCall& c, float* line, int from, int to) {
  if (c.softcap > 0)
    for (int j = 0; j < kKeys; ++j) line[j] = c.softcap * std::tanh(line[j] * c.scaling / c.softcap);
  const __m256 scaling = _mm256_set1_ps(c.softcap > 0 ? 1.0f : c.scaling);
  __m256 most = _mm256_set1_ps(kHidden);
  for (int j = 0; j < kKeys; j += 8) {
    const __m256i at = _mm256_add_epi32(_mm256_set1_epi32(j), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i seen = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), at),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(to), at));
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(line + j), scaling);
    const __m256 score = _mm256_blendv_ps(_mm256_set1_ps(kHidden), scaled, _mm256_castsi256_ps(seen));
    most = _mm256_max_ps(most, score);
    _mm256_storeu_ps(line + j, score);
  }
  return greatest(most);
}

// Scores to weights: e^(score - highest), 0 where hidden; returns their sum.
float soften(float* line, float highest) {
  __m256 weights[kKeys / 8];
  for (int i = 0; i < kKeys / 8; ++i) {
    const __m256 score = _mm256_loadu_ps(line + i * 8);
    const __m256 hidden = _mm256_cmp_ps(score, _mm256_set1_ps(kHidden), _CMP_EQ_OQ);
    weights[i] = _mm256_andnot_ps(hidden, exponential(_mm256_sub_ps(score, _mm256_set1_ps(highest))));
    _mm256_storeu_ps(line + i * 8, weights[i]);
  }
  return sum(_mm256_add_ps(_mm256_add_ps(weights[0], weights[2]), _mm256_add_ps(weights[1], weights[3])));
}

// One key-value head of sequence s, for query rows from row0 and query heads from head0.
struct Item {
  int64_t s, head, row0, head0;
};

// Where its keys begin, and the position of its last query.
Range reach(const Job& job, const Item& item) {
  const AttentionCall& c = job.c;
  const int64_t num_rows = c.query_starts[item.s + 1] - c.query_starts[item.s];
  const int64_t oldest = c.contexts[item.s] - num_rows + item.row0;
  return {c.window > 0 ? std::max<int64_t>(0, oldest - c.window + 1) / kKeys * kKeys : 0,
          oldest + std::min(job.item_rows, num_rows - item.row0)};
}

void attend(const Job& job, const Item& item, Products& products, const Buffers& b) {
  const AttentionCall& c = job.c;
  const auto [s, head, row0, head0] = item;
  const int64_t first_row = c.query_starts[s], num_rows = c.query_starts[s + 1] - first_row, context = c.contexts[s];
  const int64_t rows = std::min(job.item_rows, num_rows - row0), heads = std::min(job.item_heads, job.group - head0);
  const int64_t columns = rows * heads, dims = products.query_width(), width = products.sum_width();
  std::memset(b.columns, 0, columns * dims * sizeof(bf16));
  int64_t position[kTile];
  float most[kTile], total[kTile];
  const auto [earliest, end] = reach(job, item);
  const int64_t last = end - 1;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t t = first_row + row0 + i / heads, h = head * job.group + head0 + i % heads;
    const bf16* q = c.q + t * c.q_stride + h * c.dim;
    if (c.cosines != nullptr)
      rotate(q, c.cosines + t * c.dim, c.sines + t * c.dim, c.dim, b.columns + i * dims);
    else
      std::memcpy(b.columns + i * dims, q, c.dim * sizeof(bf16));
    position[i] = context - num_rows + row0 + i / heads;
    most[i] = c.sinks != nullptr ? c.sinks[h] : kHidden;
    total[i] = c.sinks != nullptr ? 1.0f : 0.0f;
  }
  products.take_queries(b.columns, columns);
  std::memset(b.sums, 0, columns * width * sizeof(float));
  for (int64_t first = earliest; first <= last; first += kKeys) {
    if (first + kAhead <= last) products.expect(s, head, first + kAhead, last);
    products.score(s, head, first, last, columns, b.lines);
    float shrink[kTile];
    for (int64_t i = 0; i < columns; ++i) {
      float* line = b.lines + i * kKeys;
      const int64_t from = c.window > 0 ? position[i] - c.window + 1 : 0;
      const int visible_from = static_cast<int>(std::clamp<int64_t>(from - first, 0, kKeys));
      const int visible_to = static_cast<int>(std::clamp<int64_t>(position[i] - first + 1, 0, kKeys));
      if (visible_from >= visible_to) {
        std::memset(line, 0, kKeys * sizeof(float));
        shrink[i] = 1.0f;
        continue;
      }
      const float highest = std::max(most[i], scale_scores(c, line, visible_from, visible_to));
      shrink[i] = most[i] == kHidden ? 0.0f : exponential(most[i] - highest);
      most[i] = highest;
      total[i] = total[i] * shrink[i] + soften(line, highest);
    }
    products.add_values(s, head, first, last, columns, b.lines, shrink, b.sums);
  }
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t t = first_row + row0 + i / heads, h = head * job.group + head0 + i % heads;
    bf16* out = c.out + (t * c.heads + h) * c.value_dim;
    const float scale = 1.0f / total[i];
    products.write(b.sums + i * width, scale, out);
  }
}

void run(void* argument, int thread, int threads) {
  const Job& job = *static_cast<Job*>(argument);
  const AttentionCall& c = job.c;
  static thread_local Scratch scratch;
  const int64_t widest = std::max(c.dim, c.value_dim) + kWidest;
  char* memory = scratch.get<char>(Products::bytes(c.dim, c.value_dim) + 64 * widest + kTile * widest * 6 +
                                   kTile * kKeys * static_cast<int64_t>(sizeof(float)));
  const auto take = [&memory](int64_t bytes) {
    char* at = memory;
    memory += (bytes + 63) / 64 * 64;
    return at;
  };
  Products products(c, take(Products::bytes(c.dim, c.value_dim)));
  Buffers b;
  b.rotated = reinterpret_cast<bf16*>(take(products.query_width() * sizeof(bf16)));
  b.columns = reinterpret_cast<bf16*>(take(kTile * products.query_width() * sizeof(bf16)));
  b.lines = reinterpret_cast<float*>(take(kTile * kKeys * sizeof(float)));
  b.sums = reinterpret_cast<float*>(take(kTile * products.sum_width() * sizeof(float)));
  const Engine engine;
  const Range writing = share(c.rows, thread, threads);
  for (int64_t t = writing.begin; t < writing.end; ++t) write_cache(c, t, b.rotated);
  job.pool.barrier();
  // An item is computed when the next one is known, so that its first keys can be asked for.
  int64_t count = 0;
  Item pending{-1};
  const auto next = [&](const Item& item) {
    if (item.s >= 0) {
      const auto [first, end] = reach(job, item);
      for (int64_t ahead = 0; ahead < kAhead && first + ahead < end; ahead += kKeys)
        products.expect(item.s, item.head, first + ahead, end - 1);
    }
    if (pending.s >= 0) attend(job, pending, products, b);
    pending = item;
  };
  for (int64_t s = 0; s < c.sequences; ++s) {
    const int64_t rows = c.query_starts[s + 1] - c.query_starts[s];
    for (int64_t row0 = 0; row0 < rows; row0 += job.item_rows)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        for (int64_t head0 = 0; head0 < job.group; head0 += job.item_heads)
          if (count++ % threads == thread) next({s, head, row0, head0});
  next({-1});
  }
}

}  // namespace

void LORAMUX_JOIN(attention_, LORAMUX_SET)(Pool& pool, const AttentionCall& call) {
  const int64_t group = call.heads / call.kv_heads, heads = std::min<int64_t>(group, kTile);
  Job job{call, pool, group, std::max<int64_t>(1, kTile / heads), heads};
  pool.run(run, &job);
}

}  // namespace loramux
