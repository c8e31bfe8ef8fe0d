// 256-bit vectors: bf16 pairs as two vectors of floats, sums, the exponential.
#pragma once

#include "common.h"

namespace loramux {
namespace {

#define LORAMUX_INLINE inline __attribute__((always_inline))
#define LORAMUX_LAMBDA __attribute__((always_inline))

// Of eight pairs of bf16, the first ones and the second ones.
LORAMUX_INLINE __m256 evens(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
LORAMUX_INLINE __m256 odds(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
LORAMUX_INLINE __m256i load_pairs(const bf16* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
LORAMUX_INLINE __m256 scalar(const float* from) { return _mm256_broadcast_ss(from); }

// The sum of eight lanes, always in this order.
LORAMUX_INLINE float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The sums of four vectors' lanes, each in one order that does not depend on the other three.
LORAMUX_INLINE __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

LORAMUX_INLINE float greatest(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// e^x for x ≤ 0 to float accuracy (Cephes' polynomial); NaN stays NaN.
LORAMUX_INLINE __m256 exponential(__m256 x) {
  const auto constant = [](float value) { return _mm256_set1_ps(value); };
  x = _mm256_max_ps(constant(-87.0f), x);
  const __m256 whole = _mm256_round_ps(_mm256_mul_ps(x, constant(1.44269504088896341f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 rest = _mm256_fnmadd_ps(whole, constant(-2.12194440e-4f), _mm256_fnmadd_ps(whole, constant(0.693359375f), x));
  __m256 y = constant(1.9875691500e-4f);
  y = _mm256_fmadd_ps(y, rest, constant(1.3981999507e-3f));
  y = _mm256_fmadd_ps(y, rest, constant(8.3334519073e-3f));
  y = _mm256_fmadd_ps(y, rest, constant(4.1665795894e-2f));
  y = _mm256_fmadd_ps(y, rest, constant(1.6666665459e-1f));
  y = _mm256_fmadd_ps(y, rest, constant(5.0000001201e-1f));
  y = _mm256_fmadd_ps(y, _mm256_mul_ps(rest, rest), _mm256_add_ps(rest, constant(1.0f)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

// bf16 in the low halves of eight lanes: rounded to nearest even; NaN stays NaN.
LORAMUX_INLINE __m256i rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(nearest),
                                                                _mm256_castsi256_ps(quiet), is_nan)), 16);
}

// Sixteen floats, rounded as above.
LORAMUX_INLINE void store_rounded(__m256 low, __m256 high, bf16* to) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}

}  // namespace
}  // namespace loramux
