// AMX: tiles of 16 × 32 bf16, and the products of two of them.
#pragma once

#include "common.h"

namespace loramux {
namespace {

constexpr int kDepth = 32;                 // inputs of a tile
constexpr int kElements = kTile * kDepth;  // bf16 elements of a tile, 1 KiB

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct Engine {
  Engine() {
    static const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Engine() { _tile_release(); }
};

// Accumulators 0 … 3 are (outputs tile, rows tile): (0,0), (0,1), (1,0), (1,1).
inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int N, int M>
inline __attribute__((always_inline)) void multiply(const bf16* w0, const bf16* w1, int64_t stride, const bf16* x0,
                                                    const bf16* x1) {
  _tile_loadd(6, x0, 64);
  _tile_loadd(4, w0, stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (M == 2) {
    _tile_loadd(7, x1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (N == 2) {
    _tile_loadd(5, w1, stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (M == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// Writes accumulator (n, m), [16 outputs][16 rows] float.
inline void store(int n, int m, float* to) {
  switch (n * 2 + m) {
    case 0: _tile_stored(0, to, 64); break;
    case 1: _tile_stored(1, to, 64); break;
    case 2: _tile_stored(2, to, 64); break;
    default: _tile_stored(3, to, 64);
  }
}

// Sixteen rows of 16 dwords, transposed: to[i][j] = rows[j][i].
inline void transpose(__m512i (&r)[16], uint32_t* to) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(to + i * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(to + (i + 8) * 16, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_store_si512(to + (i + 4) * 16, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_store_si512(to + (i + 12) * 16, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// `rows` rows of 32 bf16, `stride` elements apart, packed as [16 pairs][16 rows] of pairs; missing rows are zero.
inline void pack_rows(const bf16* from, int64_t stride, int64_t rows, bf16* to) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  transpose(r, reinterpret_cast<uint32_t*>(to));
}

// A 16 × 16 tile of floats, transposed.
inline void transpose_sums(const float* from, float* to) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(from + i * 16);
  transpose(r, reinterpret_cast<uint32_t*>(to));
}

}  // namespace
}  // namespace loramux
