// Tiles of 16 × 32 bf16 and the products of two of them: AMX, or the same in vectors. Included once by each file that
// is compiled for each instruction set; everything is local to it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "linear.h"

// The functions of a file get the name of the instruction set that it is compiled for.
#define LORAMUX_JOIN2(a, b) a##b
#define LORAMUX_JOIN(a, b) LORAMUX_JOIN2(a, b)


namespace loramux {
namespace {

constexpr int kTile = 16;                 // outputs or rows of a tile
constexpr int kDepth = 32;                // inputs of a tile
constexpr int kElements = kTile * kDepth; // bf16 elements of a tile, 1 KiB

inline int64_t tiles(int64_t count) { return (count + kTile - 1) / kTile; }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline bf16 to_bf16(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // Both are computed and one is chosen, so that loops over this vectorize.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return static_cast<bf16>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Grow-only, 64-byte aligned memory of one thread.
class Scratch {
 public:
  template <typename T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) & ~size_t{63};
    if (bytes > size_) {
      std::free(memory_);
      size_ = bytes + bytes / 2 + 64;
      size_ &= ~size_t{63};
      memory_ = std::aligned_alloc(64, size_);
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// ---- Micro-kernels -------------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)

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

#else

// The same tiles without AMX: accumulators in memory, sixteen rows side by side in a vector.
typedef float Rows __attribute__((vector_size(64), aligned(64)));
thread_local Rows g_sums[4][kTile];

struct Engine {};

inline void clear() { std::memset(g_sums, 0, sizeof g_sums); }

inline void multiply_one(Rows* sums, const bf16* w, int64_t stride, const bf16* x) {
  for (int pair = 0; pair < kDepth / 2; ++pair) {
    const uint32_t* packed = reinterpret_cast<const uint32_t*>(x) + pair * kTile;
    Rows even, odd;
    for (int c = 0; c < kTile; ++c) {
      const uint32_t low = packed[c] << 16, high = packed[c] & 0xffff0000u;
      std::memcpy(reinterpret_cast<char*>(&even) + 4 * c, &low, 4);
      std::memcpy(reinterpret_cast<char*>(&odd) + 4 * c, &high, 4);
    }
    for (int r = 0; r < kTile; ++r) {
      const bf16* row = reinterpret_cast<const bf16*>(reinterpret_cast<const char*>(w) + r * stride) + 2 * pair;
      sums[r] += even * to_float(row[0]) + odd * to_float(row[1]);
    }
  }
}

template <int N, int M>
inline void multiply(const bf16* w0, const bf16* w1, int64_t stride, const bf16* x0, const bf16* x1) {
  multiply_one(g_sums[0], w0, stride, x0);
  if constexpr (M == 2) multiply_one(g_sums[1], w0, stride, x1);
  if constexpr (N == 2) {
    multiply_one(g_sums[2], w1, stride, x0);
    if constexpr (M == 2) multiply_one(g_sums[3], w1, stride, x1);
  }
}

inline void store(int n, int m, float* to) { std::memcpy(to, g_sums[n * 2 + m], sizeof g_sums[0]); }

#endif

// e^x for x ≤ 0 to float accuracy (Cephes' polynomial); vectorizes. e^-∞ is 0.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * 1.44269504088896341f;
  const float whole = __builtin_floorf(scaled + 0.5f);
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
}

// Sixteen rows of 16 dwords, transposed: to[i][j] = rows[j][i].
#if defined(__AVX512F__)
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
#endif

// `rows` rows of 32 bf16, `stride` elements apart, packed as [16 pairs][16 rows] of pairs; missing rows are zero.
inline void pack_rows(const bf16* from, int64_t stride, int64_t rows, bf16* to) {
#if defined(__AVX512F__)
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  transpose(r, reinterpret_cast<uint32_t*>(to));
#else
  std::memset(to, 0, kElements * sizeof(bf16));
  for (int64_t i = 0; i < rows; ++i) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(from + i * stride);
    for (int pair = 0; pair < kDepth / 2; ++pair) reinterpret_cast<uint32_t*>(to)[pair * kTile + i] = row[pair];
  }
#endif
}

// A 16 × 16 tile of floats, transposed.
inline void transpose_sums(const float* from, float* to) {
#if defined(__AVX512F__)
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(from + i * 16);
  transpose(r, reinterpret_cast<uint32_t*>(to));
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * 16 + j] = from[j * 16 + i];
#endif
}

}  // namespace
}  // namespace loramux
