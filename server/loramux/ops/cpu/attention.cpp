// Causal attention over paged keys and values, compiled once for each instruction set (LORAMUX_SET names it).
//
// A work item is one key-value head and as many (query row, query head) pairs of one sequence as fit into sixteen
// columns. Keys come in steps of 32 positions, counted from the sequence's start: scores = K·qᵀ with keys where they
// lie in the cache, an online softmax (Milakov & Gimelshein 2018), then Pᵀ·V.
//
// Order of summation: a query's result depends on its own position and keys alone. Steps begin at multiples of 32
// whatever is cached, chunked or batched, and a step in which a query sees nothing leaves its sums as they were.

#include "attention.h"

#include <cmath>
#include <limits>

#include "tiles.h"

namespace loramux {
namespace {

constexpr int kKeys = 32;  // positions of a step
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Rotates one head as transformers' apply_rotary_pos_emb does (halves, not pairs), in float32, rounded once.
inline void rotate(const bf16* from, const bf16* cosines, const bf16* sines, int64_t dim, bf16* to) {
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
  bf16* q;         // [dim/32] tiles
  bf16* columns;   // [16][dim] queries as rows
  bf16* staging;   // a tile of keys
  float* scores;   // [2][16 keys][16 columns]
  float* lines;    // [16 columns][32 keys]
  bf16* weights;   // [16 columns][32 keys]
  bf16* v;         // [value_dim/16] tiles of [16 pairs][16 dims]
  float* sums;     // [16 columns][value_dim]
};

void write_cache(const AttentionCall& c, int64_t t, bf16* rotated) {
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    const bf16* key = c.k + t * c.k_stride + h * c.dim;
    if (c.cosines != nullptr) {
      rotate(key, c.cosines + t * c.dim, c.sines + t * c.dim, c.dim, rotated);
      key = rotated;
    }
    std::memcpy(c.keys + (c.slots[t] * c.kv_heads + h) * c.dim, key, c.dim * sizeof(bf16));
    std::memcpy(c.values + (c.slots[t] * c.kv_heads + h) * c.value_dim, c.v + t * c.v_stride + h * c.value_dim,
                c.value_dim * sizeof(bf16));
  }
}

// Position p of sequence s in the cache, in units of [kv_heads, dim].
inline int64_t slot(const AttentionCall& c, int64_t s, int64_t position) {
  return static_cast<int64_t>(c.tables[s * c.table_stride + position / c.block_size]) * c.block_size +
         position % c.block_size;
}

// scores[key][column] for 16 positions from `first`; positions ≥ context are whatever they are.
void score(const Job& job, int64_t s, int64_t head, int64_t first, int64_t context, const Buffers& b, float* to) {
  const AttentionCall& c = job.c;
  const int64_t stride = c.kv_heads * c.dim, count = std::min<int64_t>(kTile, context - first);
  const bool contiguous = c.block_size % kTile == 0 && c.dim % kDepth == 0;
  const bf16* keys = contiguous ? c.keys + (slot(c, s, first) * c.kv_heads + head) * c.dim : nullptr;
  clear();
  for (int64_t d = 0; d * kDepth < c.dim; ++d) {
    if (contiguous) {
      multiply<1, 1>(keys + d * kDepth, nullptr, stride * sizeof(bf16), b.q + d * kElements, nullptr);
      continue;
    }
    bf16* tile = b.staging + (d & 1) * kElements;
    std::memset(tile, 0, kElements * sizeof(bf16));
    const int64_t width = std::min<int64_t>(kDepth, c.dim - d * kDepth);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(tile + i * kDepth, c.keys + (slot(c, s, first + i) * c.kv_heads + head) * c.dim + d * kDepth,
                  width * sizeof(bf16));
    multiply<1, 1>(tile, nullptr, kDepth * sizeof(bf16), b.q + d * kElements, nullptr);
  }
  store(0, 0, to);
}

// Packs the values of 32 positions as [dims/16][16 pairs of positions][16 dims]; positions ≥ context are zero, for
// what an earlier owner left there may be no number.
void pack_values(const AttentionCall& c, int64_t s, int64_t head, int64_t first, int64_t context, bf16* to) {
  const int64_t tiles_of_dims = tiles(c.value_dim);
  alignas(64) static const bf16 nothing[512] = {};
  for (int pair = 0; pair < kKeys / 2; ++pair) {
    const int64_t p = first + 2 * pair;
    const bf16* even = p < context ? c.values + (slot(c, s, p) * c.kv_heads + head) * c.value_dim : nothing;
    const bf16* odd = p + 1 < context ? c.values + (slot(c, s, p + 1) * c.kv_heads + head) * c.value_dim : nothing;
    for (int64_t tile = 0; tile < tiles_of_dims; ++tile) {
      uint32_t* out = reinterpret_cast<uint32_t*>(to + tile * kElements) + pair * kTile;
      const int64_t width = std::min<int64_t>(kTile, c.value_dim - tile * kTile);
#if defined(__AVX512F__)
      if (width == kTile) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + tile * kTile)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + tile * kTile)));
        _mm512_store_si512(out, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        continue;
      }
#endif
      for (int64_t i = 0; i < kTile; ++i)
        out[i] = i < width ? even[tile * kTile + i] | static_cast<uint32_t>(odd[tile * kTile + i]) << 16 : 0;
    }
  }
}

void item(const Job& job, int64_t s, int64_t head, int64_t row0, int64_t head0, const Buffers& b) {
  const AttentionCall& c = job.c;
  const int64_t first_row = c.query_starts[s], num_rows = c.query_starts[s + 1] - first_row, context = c.contexts[s];
  const int64_t rows = std::min(job.item_rows, num_rows - row0), heads = std::min(job.item_heads, job.group - head0);
  const int64_t columns = rows * heads, dims = tiles(c.dim * kTile / kDepth) * kDepth;
  std::memset(b.columns, 0, kTile * dims * sizeof(bf16));
  int64_t position[kTile];
  float most[kTile], total[kTile];
  int64_t earliest = context;
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t t = first_row + row0 + i / heads, h = head * job.group + head0 + i % heads;
    const bf16* q = c.q + t * c.q_stride + h * c.dim;
    if (c.cosines != nullptr)
      rotate(q, c.cosines + t * c.dim, c.sines + t * c.dim, c.dim, b.columns + i * dims);
    else
      std::memcpy(b.columns + i * dims, q, c.dim * sizeof(bf16));
    position[i] = context - num_rows + row0 + i / heads;
    earliest = std::min(earliest, c.window > 0 ? std::max<int64_t>(0, position[i] - c.window + 1) : 0);
    most[i] = c.sinks != nullptr ? c.sinks[h] : kHidden;
    total[i] = c.sinks != nullptr ? 1.0f : 0.0f;
  }
  for (int64_t d = 0; d < dims / kDepth; ++d)
    pack_rows(b.columns + d * kDepth, dims, columns, b.q + d * kElements);
  const int64_t value_dims = tiles(c.value_dim) * kTile, last = position[columns - 1];
  std::memset(b.sums, 0, kTile * value_dims * sizeof(float));
  std::memset(b.weights, 0, kElements * sizeof(bf16));
  for (int64_t first = earliest / kKeys * kKeys; first <= last; first += kKeys) {
    score(job, s, head, first, context, b, b.scores);
    if (first + kTile <= last) score(job, s, head, first + kTile, context, b, b.scores + kTile * kTile);
    transpose_sums(b.scores, b.lines);
    transpose_sums(b.scores + kTile * kTile, b.lines + kTile * kTile);
    float shrink[kTile];
    for (int64_t i = 0; i < columns; ++i) {
      alignas(64) float line[kKeys];
      const int64_t from = c.window > 0 ? position[i] - c.window + 1 : 0;
      std::memcpy(line, b.lines + i * kTile, kTile * sizeof(float));
      std::memcpy(line + kTile, b.lines + (kTile + i) * kTile, kTile * sizeof(float));
      for (int j = 0; j < kKeys; ++j) line[j] *= c.scaling;
      if (c.softcap > 0)
        for (int j = 0; j < kKeys; ++j) line[j] = c.softcap * std::tanh(line[j] / c.softcap);
      float highest = most[i];
      const int visible_from = static_cast<int>(std::clamp<int64_t>(from - first, 0, kKeys));
      const int visible_to = static_cast<int>(std::clamp<int64_t>(position[i] - first + 1, 0, kKeys));
      for (int j = 0; j < kKeys; ++j) line[j] = j >= visible_from && j < visible_to ? line[j] : kHidden;
      for (int j = 0; j < kKeys; ++j) highest = line[j] > highest ? line[j] : highest;
      bf16* weights = b.weights + i * kKeys;
      if (visible_from >= visible_to) {
        std::memset(weights, 0, kKeys * sizeof(bf16));
        shrink[i] = 1.0f;
        continue;
      }
      shrink[i] = most[i] == kHidden ? 0.0f : exponential(most[i] - highest);
      most[i] = highest;
      for (int j = 0; j < kKeys; ++j) line[j] = line[j] == kHidden ? 0.0f : exponential(line[j] - highest);
      float partial[16];
      for (int j = 0; j < 16; ++j) partial[j] = line[j] + line[16 + j];
      for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
      total[i] = total[i] * shrink[i] + partial[0];
      for (int j = 0; j < kKeys; ++j) weights[j] = to_bf16(line[j]);
    }
    pack_values(c, s, head, first, context, b.v);
    for (int64_t tile = 0; tile * kTile < value_dims; ++tile) {
      clear();
      multiply<1, 1>(b.weights, nullptr, kKeys * sizeof(bf16), b.v + tile * kElements, nullptr);
      store(0, 0, b.scores);
      for (int64_t i = 0; i < columns; ++i) {
        float* sums = b.sums + i * value_dims + tile * kTile;
        for (int j = 0; j < kTile; ++j) sums[j] = sums[j] * shrink[i] + b.scores[i * kTile + j];
      }
    }
  }
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t t = first_row + row0 + i / heads, h = head * job.group + head0 + i % heads;
    bf16* out = c.out + (t * c.heads + h) * c.value_dim;
    const float scale = 1.0f / total[i];
    for (int64_t j = 0; j < c.value_dim; ++j) out[j] = to_bf16(b.sums[i * value_dims + j] * scale);
  }
}

void run(void* argument, int thread, int threads) {
  const Job& job = *static_cast<Job*>(argument);
  const AttentionCall& c = job.c;
  static thread_local Scratch scratch;
  const int64_t dims = (c.dim + kDepth - 1) / kDepth * kDepth, value_dims = tiles(c.value_dim) * kTile;
  char* memory = scratch.get<char>(64 * 1024 + 128 * (dims + value_dims) * kTile);
  const auto take = [&memory](int64_t bytes) {
    char* at = memory;
    memory += (bytes + 63) / 64 * 64;
    return at;
  };
  Buffers b;
  b.rotated = reinterpret_cast<bf16*>(take(dims * 2));
  b.q = reinterpret_cast<bf16*>(take(dims * kTile * 2));
  b.columns = reinterpret_cast<bf16*>(take(dims * kTile * 2));
  b.staging = reinterpret_cast<bf16*>(take(2 * kElements * 2));
  b.scores = reinterpret_cast<float*>(take(2 * kTile * kTile * 4));
  b.lines = reinterpret_cast<float*>(take(2 * kTile * kTile * 4));
  b.weights = reinterpret_cast<bf16*>(take(kElements * 2));
  b.v = reinterpret_cast<bf16*>(take(value_dims * kKeys * 2));
  b.sums = reinterpret_cast<float*>(take(value_dims * kTile * 4));
  std::memset(b.scores, 0, 2 * kTile * kTile * 4);
  const Engine engine;
  const Range writing = share(c.rows, thread, threads);
  for (int64_t t = writing.begin; t < writing.end; ++t) write_cache(c, t, b.rotated);
  job.pool.barrier();
  int64_t count = 0;
  for (int64_t s = 0; s < c.sequences; ++s) {
    const int64_t rows = c.query_starts[s + 1] - c.query_starts[s];
    for (int64_t row0 = 0; row0 < rows; row0 += job.item_rows)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        for (int64_t head0 = 0; head0 < job.group; head0 += job.item_heads)
          if (count++ % threads == thread) item(job, s, head, row0, head0, b);
  }
}

}  // namespace

void LORAMUX_JOIN(attention_, LORAMUX_SET)(Pool& pool, const AttentionCall& call) {
  const int64_t group = call.heads / call.kv_heads, heads = std::min<int64_t>(group, kTile);
  Job job{call, pool, group, std::max<int64_t>(1, kTile / heads), heads};
  pool.run(run, &job);
}

}  // namespace loramux
