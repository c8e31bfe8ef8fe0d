// The two products of attention on AMX tiles.
#pragma once

#include "attention.h"
#include "tiles.h"

namespace loramux {
namespace {

class Products {
 public:
  static int64_t bytes(int64_t dim, int64_t value_dim) {
    const int64_t dims = (dim + kDepth - 1) / kDepth * kDepth, value_dims = tiles(value_dim) * kTile;
    return (dims * kTile + 2 * kElements + kElements + value_dims * kKeys) * static_cast<int64_t>(sizeof(bf16)) +
           2 * kTile * kTile * static_cast<int64_t>(sizeof(float));
  }
  // `memory`: 64-byte aligned, `bytes` of it.
  Products(const AttentionCall& c, char* memory) : c_(c), dims_((c.dim + kDepth - 1) / kDepth * kDepth) {
    scores_ = reinterpret_cast<float*>(memory);
    q_ = reinterpret_cast<bf16*>(scores_ + 2 * kTile * kTile);
    staging_ = q_ + dims_ * kTile;
    weights_ = staging_ + 2 * kElements;
    values_ = weights_ + kElements;
    std::memset(scores_, 0, 2 * kTile * kTile * sizeof(float));
  }

  // Elements of a row of `columns`, and of a row of sums.
  int64_t query_width() const { return dims_; }
  int64_t sum_width() const { return tiles(c_.value_dim) * kTile; }

  // Takes up to sixteen queries, rows of `query_width`.
  void take_queries(const bf16* columns, int64_t count) {
    for (int64_t d = 0; d < dims_ / kDepth; ++d) pack_rows(columns + d * kDepth, dims_, count, q_ + d * kElements);
  }

  void expect(int64_t, int64_t, int64_t, int64_t) {}

  // lines[column][32] = q·k for the positions first …, of which those beyond `last` may be whatever they are.
  void score(int64_t s, int64_t head, int64_t first, int64_t last, int64_t columns, float* lines) {
    score_half(s, head, first, scores_);
    if (first + kTile <= last) score_half(s, head, first + kTile, scores_ + kTile * kTile);
    alignas(64) float halves[2][kTile * kTile];
    transpose_sums(scores_, halves[0]);
    transpose_sums(scores_ + kTile * kTile, halves[1]);
    for (int64_t i = 0; i < columns; ++i)
      for (int half = 0; half < 2; ++half)
        std::memcpy(lines + i * kKeys + half * kTile, halves[half] + i * kTile, kTile * sizeof(float));
  }

  // sums[column] = sums[column]·shrink[column] + weights[column]·v
  void add_values(int64_t s, int64_t head, int64_t first, int64_t last, int64_t columns, const float* weights,
                  const float* shrink, float* sums) {
    std::memset(weights_, 0, kElements * sizeof(bf16));
    for (int64_t i = 0; i < columns * kKeys; ++i) weights_[i] = to_bf16(weights[i]);
    pack_values(s, head, first, last, values_);
    const int64_t width = sum_width();
    for (int64_t tile = 0; tile * kTile < width; ++tile) {
      clear();
      multiply<1, 1>(weights_, nullptr, kKeys * sizeof(bf16), values_ + tile * kElements, nullptr);
      store(0, 0, scores_);
      for (int64_t i = 0; i < columns; ++i) {
        float* to = sums + i * width + tile * kTile;
        for (int j = 0; j < kTile; ++j) to[j] = to[j] * shrink[i] + scores_[i * kTile + j];
      }
    }
  }

  // out[value_dim] = a row of sums, times `scale`.
  void write(const float* sums, float scale, bf16* out) const {
    for (int64_t i = 0; i < c_.value_dim; ++i) out[i] = to_bf16(sums[i] * scale);
  }

 private:
  // to[key][column] for 16 positions.
  void score_half(int64_t s, int64_t head, int64_t first, float* to) {
    const int64_t count = std::min<int64_t>(kTile, c_.contexts[s] - first);
    const bool contiguous = c_.block_size % kTile == 0 && c_.dim % kDepth == 0;
    const bf16* keys = contiguous ? c_.keys + row_of(c_, s, head, first) * c_.dim : nullptr;
    clear();
    for (int64_t d = 0; d * kDepth < c_.dim; ++d) {
      if (contiguous) {
        multiply<1, 1>(keys + d * kDepth, nullptr, c_.dim * sizeof(bf16), q_ + d * kElements, nullptr);
        continue;
      }
      bf16* tile = staging_ + (d & 1) * kElements;
      std::memset(tile, 0, kElements * sizeof(bf16));
      const int64_t width = std::min<int64_t>(kDepth, c_.dim - d * kDepth);
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(tile + i * kDepth, c_.keys + row_of(c_, s, head, first + i) * c_.dim + d * kDepth,
                    width * sizeof(bf16));
      multiply<1, 1>(tile, nullptr, kDepth * sizeof(bf16), q_ + d * kElements, nullptr);
    }
    store(0, 0, to);
  }

  // Packs the values of 32 positions as [dims/16][16 pairs of positions][16 dims]; positions beyond `last` are zero,
  // for what an earlier owner left there may be no number.
  void pack_values(int64_t s, int64_t head, int64_t first, int64_t last, bf16* to) {
    const int64_t tiles_of_dims = tiles(c_.value_dim);
    alignas(64) static const bf16 nothing[kWidestHead] = {};
    for (int pair = 0; pair < kKeys / 2; ++pair) {
      const int64_t p = first + 2 * pair;
      const bf16* even = p <= last ? c_.values + row_of(c_, s, head, p) * c_.value_dim : nothing;
      const bf16* odd = p + 1 <= last ? c_.values + row_of(c_, s, head, p + 1) * c_.value_dim : nothing;
      for (int64_t tile = 0; tile < tiles_of_dims; ++tile) {
        uint32_t* out = reinterpret_cast<uint32_t*>(to + tile * kElements) + pair * kTile;
        const int64_t width = std::min<int64_t>(kTile, c_.value_dim - tile * kTile);
        if (width == kTile) {
          const __m512i a =
              _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + tile * kTile)));
          const __m512i b =
              _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + tile * kTile)));
          _mm512_store_si512(out, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
          continue;
        }
        for (int64_t i = 0; i < kTile; ++i)
          out[i] = i < width ? even[tile * kTile + i] | static_cast<uint32_t>(odd[tile * kTile + i]) << 16 : 0;
      }
    }
  }

  const AttentionCall& c_;
  int64_t dims_;
  float* scores_;   // [2][16 keys][16 columns]
  bf16* q_;         // [dim/32] tiles
  bf16* staging_;   // two tiles of keys
  bf16* weights_;   // [16 columns][32 keys]
  bf16* values_;    // [value_dim/16] tiles of [16 pairs][16 dims]
};

}  // namespace
}  // namespace loramux
