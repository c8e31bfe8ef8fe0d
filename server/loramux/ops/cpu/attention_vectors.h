// The two products of attention in 256-bit vectors. Rows of sixteen dimensions stand as eight evens, then eight odds.
#pragma once

#include <type_traits>

#include "attention.h"
#include "vectors.h"

namespace loramux {
namespace {

struct Engine {};

class Products {
 public:
  static int64_t bytes(int64_t dim, int64_t value_dim) {
    const int64_t dims = tiles(dim) * kTile, value_dims = tiles(value_dim) * kTile;
    return kTile * dims * static_cast<int64_t>(sizeof(float)) + kKeys * std::max(dims, value_dims) * static_cast<int64_t>(sizeof(bf16));
  }
  // `memory`: 64-byte aligned, `bytes` of it.
  Products(const AttentionCall& c, char* memory) : c_(c), dims_(tiles(c.dim) * kTile) {
    q_ = reinterpret_cast<float*>(memory);
    staging_ = reinterpret_cast<bf16*>(q_ + kTile * dims_);
  }

  // Elements of a row of `columns`, and of a row of sums.
  int64_t query_width() const { return dims_; }
  int64_t sum_width() const { return tiles(c_.value_dim) * kTile; }

  // Takes up to sixteen queries, rows of `query_width`.
  void take_queries(const bf16* columns, int64_t count) {
    for (int64_t i = 0; i < count * dims_; i += 16) {
      const __m256i pairs = load_pairs(columns + i);
      _mm256_store_ps(q_ + i, evens(pairs));
      _mm256_store_ps(q_ + i + 8, odds(pairs));
    }
  }

  // Asks for the keys and values of the step at `first`: short rows, far apart, that no hardware foresees.
  void expect(int64_t s, int64_t head, int64_t first, int64_t last) {
    const bf16* rows[kKeys];
    const int64_t count = std::min<int64_t>(kKeys, last - first + 1);
    locate(c_.keys, c_.dim, s, head, first, count, rows);
    for (int64_t key = 0; key < count; ++key)
      for (int64_t d = 0; d < c_.dim; d += 32) __builtin_prefetch(rows[key] + d, 0, 2);
    locate(c_.values, c_.value_dim, s, head, first, count, rows);
    for (int64_t key = 0; key < count; ++key)
      for (int64_t d = 0; d < c_.value_dim; d += 32) __builtin_prefetch(rows[key] + d, 0, 2);
  }

  // lines[column][32] = q·k for the positions first …; those beyond `last` count as zeros.
  void score(int64_t s, int64_t head, int64_t first, int64_t last, int64_t columns, float* lines) {
    const bf16* rows[kKeys];
    find(c_.keys, c_.dim, s, head, first, last, rows);
    const int64_t keys = std::min<int64_t>(kKeys, last - first + 1);
    for (int64_t key = 0; key < keys; key += 4)
      by_threes(columns, [&](auto g, int64_t i) LORAMUX_LAMBDA { score_four<g>(rows + key, i, lines + i * kKeys + key); });
  }

  // sums[column] = sums[column]·shrink[column] + weights[column]·v, position by position.
  void add_values(int64_t s, int64_t head, int64_t first, int64_t last, int64_t columns, const float* weights,
                  const float* shrink, float* sums) {
    const bf16* rows[kKeys];
    find(c_.values, c_.value_dim, s, head, first, last, rows);
    const int64_t keys = std::min<int64_t>(kKeys, last - first + 1), width = sum_width();
    by_threes(columns, [&](auto g, int64_t i) LORAMUX_LAMBDA {
      add_columns<g>(rows, keys, weights + i * kKeys, shrink + i, sums + i * width, width);
    });
  }

  // out[value_dim] = a row of sums, times `scale`.
  void write(const float* sums, float scale, bf16* out) const {
    int64_t i = 0;
    for (; i + 16 <= c_.value_dim; i += 16) {
      const __m256i even = rounded(_mm256_mul_ps(_mm256_load_ps(sums + i), _mm256_set1_ps(scale)));
      const __m256i odd = rounded(_mm256_mul_ps(_mm256_load_ps(sums + i + 8), _mm256_set1_ps(scale)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_or_si256(even, _mm256_slli_epi32(odd, 16)));
    }
    const float* rest = sums + i;
    for (int64_t j = 0; i + j < c_.value_dim; ++j) out[i + j] = to_bf16(rest[j % 2 * 8 + j / 2] * scale);
  }

 private:
  // Three columns at a time are what the registers hold; four go as two and two.
  template <typename Function>
  LORAMUX_INLINE static void by_threes(int64_t columns, const Function& function) {
    int64_t i = 0;
    while (columns - i > 4 || columns - i == 3) function(std::integral_constant<int, 3>(), i), i += 3;
    while (columns - i >= 2) function(std::integral_constant<int, 2>(), i), i += 2;
    if (i < columns) function(std::integral_constant<int, 1>(), i);
  }

  // The rows of 32 positions; past the last one, and where a row is no multiple of 16, in staging.
  void find(const bf16* cache, int64_t dim, int64_t s, int64_t head, int64_t first, int64_t last, const bf16** rows) {
    alignas(64) static const bf16 nothing[kWidestHead] = {};
    const int64_t padded = tiles(dim) * kTile;
    const int64_t count = std::min<int64_t>(kKeys, last - first + 1);
    for (int64_t key = count; key < kKeys; ++key) rows[key] = nothing;
    locate(cache, dim, s, head, first, count, rows);
    if (padded == dim) return;
    for (int64_t key = 0; key < count; ++key) {
      bf16* copy = staging_ + key * padded;
      std::memset(copy, 0, padded * sizeof(bf16));
      std::memcpy(copy, rows[key], dim * sizeof(bf16));
      rows[key] = copy;
    }
  }

  // Where `count` positions stand in the cache. Within a block they follow each other.
  void locate(const bf16* cache, int64_t dim, int64_t s, int64_t head, int64_t first, int64_t count, const bf16** rows) {
    for (int64_t key = 0; key < count;) {
      const bf16* row = cache + row_of(c_, s, head, first + key) * dim;
      const int64_t here = std::min<int64_t>(count - key, c_.block_size - (first + key) % c_.block_size);
      for (int64_t i = 0; i < here; ++i, ++key, row += dim) rows[key] = row;
    }
  }

  template <int G>
  LORAMUX_INLINE void score_four(const bf16* const* rows, int64_t column, float* lines) {
    __m256 sum[G][4];
    for (int g = 0; g < G; ++g)
      for (int key = 0; key < 4; ++key) sum[g][key] = _mm256_setzero_ps();
    const float* q = q_ + column * dims_;
    for (int64_t d = 0; d < dims_; d += 16) {
#pragma GCC unroll 4
      for (int key = 0; key < 4; ++key) {
        const __m256i pairs = load_pairs(rows[key] + d);
        const __m256 even = evens(pairs), odd = odds(pairs);
        for (int g = 0; g < G; ++g) {
          sum[g][key] = _mm256_fmadd_ps(even, _mm256_load_ps(q + g * dims_ + d), sum[g][key]);
          sum[g][key] = _mm256_fmadd_ps(odd, _mm256_load_ps(q + g * dims_ + d + 8), sum[g][key]);
        }
      }
    }
    for (int g = 0; g < G; ++g) _mm_storeu_ps(lines + g * kKeys, loramux::sums(sum[g][0], sum[g][1], sum[g][2], sum[g][3]));
  }

  template <int G>
  LORAMUX_INLINE void add_columns(const bf16* const* rows, int64_t keys, const float* weights, const float* shrink,
                                  float* sums, int64_t width) {
    int64_t d = 0;
    for (; d + 32 <= width; d += 32) add_dims<G, 2>(rows, keys, weights, shrink, sums + d, width, d);
    if (d < width) add_dims<G, 1>(rows, keys, weights, shrink, sums + d, width, d);
  }

  template <int G, int D>
  LORAMUX_INLINE void add_dims(const bf16* const* rows, int64_t keys, const float* weights, const float* shrink,
                               float* sums, int64_t width, int64_t d) {
    __m256 sum[G][2 * D];
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 2 * D; ++i) sum[g][i] = _mm256_mul_ps(_mm256_load_ps(sums + g * width + i * 8), scalar(shrink + g));
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 2
      for (int i = 0; i < D; ++i) {
        const __m256i pairs = load_pairs(rows[key] + d + i * 16);
        const __m256 even = evens(pairs), odd = odds(pairs);
        for (int g = 0; g < G; ++g) {
          const __m256 weight = scalar(weights + g * kKeys + key);
          sum[g][2 * i] = _mm256_fmadd_ps(even, weight, sum[g][2 * i]);
          sum[g][2 * i + 1] = _mm256_fmadd_ps(odd, weight, sum[g][2 * i + 1]);
        }
      }
    }
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < 2 * D; ++i) _mm256_store_ps(sums + g * width + i * 8, sum[g][i]);
  }

  const AttentionCall& c_;
  int64_t dims_;
  float* q_;       // [16 columns][dims]
  bf16* staging_;  // [32 keys][dims]
};

}  // namespace
}  // namespace loramux
