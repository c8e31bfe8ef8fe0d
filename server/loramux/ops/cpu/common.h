// What every file needs that is compiled for each instruction set. Everything is local to the file.
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

constexpr int kTile = 16;   // outputs of a tile
constexpr int kBlock = 64;  // weights of an NF4 block

alignas(64) constexpr float kNF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

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

}  // namespace
}  // namespace loramux
