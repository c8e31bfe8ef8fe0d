// The linear operation without AMX, compiled once for each instruction set (LORAMUX_SET names it).
//
// NF4: a vector is eight outputs. Weights and inputs become whole numbers of 16 bits, whose products the processor adds in
// pairs, exactly: 1/8192 of a block's absmax is the unit of a weight, and each block of a row of inputs has its own unit,
// as small as the 32 bits of a sum allow. That is eight times finer than bf16, in which inputs come and results go. Sixteen
// outputs × 64 inputs of weights are expanded into a panel, [pairs of inputs][16], that stays in the first-level cache, and
// every row multiplies it with its own inputs, one broadcast each. The factors A and B and the dense head are read along
// their rows, as dot products, where they lie. Either way the result does not depend on the number of rows.
//
// Order of summation: a block of 64 inputs exactly, blocks in ascending order, then the adapters' branches in segment
// order, then a scale, then the base's bias. Dot products: in eight lanes, sixteen elements at a time, then `sums`.

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "linear.h"
#include "vectors.h"

namespace loramux {
namespace {

constexpr int kMostRows = 6;  // rows of a group: 12 sums, 2 weights, an input and a product are 16 registers
constexpr int64_t kRowBytes = 256 << 10;  // inputs of a chunk of rows, to stay in the second-level cache
constexpr int kPairs = kBlock / 2;

constexpr int kWeightUnits = 8192;  // of an absmax
// What the absolute values of a block of inputs may add up to, in units: times kWeightUnits it fits a sum's 31 bits. The
// rounding of 64 values may add 32.
constexpr float kMostUnits = static_cast<float>((1 << 18) - 64), kMostUnitsOfOne = 32767.0f;
// A block of inputs whose unit is less counts as zero: its inverse would overflow.
constexpr float kLeastUnit = 1e-37f;

// Asks for the weights that come next, a piece at a time: they are read once, from memory, and waiting for them would
// take as long as the arithmetic. Past the end this is harmless.
class Ahead {
 public:
  Ahead(const void* from, int64_t bytes, int64_t pieces)
      : at_(static_cast<const char*>(from)), end_(at_ + bytes), piece_((bytes / pieces + 63) / 64 * 64) {}
  LORAMUX_INLINE void fetch() {
    const char* stop = std::min(at_ + piece_, end_);
    for (; at_ < stop; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t piece_;
};

// Asks for what is read after the arithmetic that runs, spread over it: expanding NF4 for many rows leaves the way to
// memory idle, and sixteen adapters read at once would take a fifth of a step.
class Upcoming {
 public:
  void clear() {
    spans_.clear();
    lines_ = at_ = line_ = each_ = 0;
  }
  void add(const void* from, int64_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(from) / 64, end = (reinterpret_cast<uintptr_t>(from) + bytes + 63) / 64;
    spans_.push_back({begin, static_cast<int64_t>(end - begin)});
    lines_ += spans_.back().lines;
  }
  // `fetch` will be called so many times.
  void spread(int64_t times) { each_ = times == 0 ? 0 : (lines_ + times - 1) / times; }
  void fetch() {
    int64_t left = std::min(each_, lines_);
    lines_ -= left;
    while (left > 0) {
      const Span& span = spans_[at_];
      const int64_t stop = std::min(line_ + left, span.lines);
      left -= stop - line_;
      for (; line_ < stop; ++line_) __builtin_prefetch(reinterpret_cast<const void*>((span.begin + line_) * 64), 0, 2);
      if (line_ == span.lines) ++at_, line_ = 0;
    }
  }

 private:
  struct Span {
    uintptr_t begin;  // in lines
    int64_t lines;
  };
  std::vector<Span> spans_;
  int64_t lines_ = 0, at_ = 0, line_ = 0, each_ = 0;
};

// The table by bytes: byte b of entry c is bytes[b][c], in both lanes.
struct Table {
  alignas(32) uint8_t bytes[2][32];
  Table() {
    for (int entry = 0; entry < 32; ++entry) {
      const auto value = static_cast<int16_t>(std::lrint(kNF4[entry % 16] * kWeightUnits));
      for (int b = 0; b < 2; ++b) bytes[b][entry] = static_cast<uint8_t>(value >> (8 * b));
    }
  }
  LORAMUX_INLINE __m256i load(int b) const { return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes[b])); }
};
const Table kTable;

// ---- Panels --------------------------------------------------------------------------------------------------------

// Calls use(pair, half, weights) for the 32 bytes of two pairs of inputs × 16 outputs; `weights` are a pair of 8 outputs.
template <typename Use>
LORAMUX_INLINE void look_up(__m256i packed, __m256i low, __m256i high, const Use& use) {
  const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; ++pair) {
    const __m256i codes = _mm256_and_si256(pair == 0 ? packed : _mm256_srli_epi16(packed, 4), mask);
    const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
    use(pair, 0, _mm256_unpacklo_epi8(lows, highs));
    use(pair, 1, _mm256_unpackhi_epi8(lows, highs));
  }
}

LORAMUX_INLINE __m256i load_codes(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

void expand(const uint8_t* codes, int32_t* panel) {
  const __m256i low = kTable.load(0), high = kTable.load(1);
  for (int quad = 0; quad < kBlock / 4; ++quad, panel += 2 * kTile)
    look_up(load_codes(codes + quad * 32), low, high, [&](int pair, int half, __m256i weights) LORAMUX_LAMBDA {
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + pair * kTile + half * 8), weights);
    });
}

// sum + w·x over the pairs of each lane.
LORAMUX_INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i inputs) {
#ifdef __AVX512VNNI__
  return _mm256_dpwssd_epi32(sum, weights, inputs);
#else
  // In one piece: the compiler would compute all products first and spill the sums.
  __m256i products;
  asm("vpmaddwd %[inputs], %[weights], %[products]\n\tvpaddd %[products], %[sum], %[sum]"
      : [sum] "+x"(sum), [products] "=&x"(products)
      : [weights] "x"(weights), [inputs] "x"(inputs));
  return sum;
#endif
}

// total + scale·unit·sum.
LORAMUX_INLINE __m256 add_scaled(__m256 total, __m256 scale, const float* unit, __m256i sum) {
  return _mm256_fmadd_ps(scale, _mm256_mul_ps(scalar(unit), _mm256_cvtepi32_ps(sum)), total);
}

// The absmax of a tile's 16 rows, for all blocks: scale[block][16].
void tile_scales(const Part& part, int64_t tile, int64_t blocks, float* scale) {
  const int64_t first = tile * blocks * kTile;
  if (part.absmax_float != nullptr) {
    std::memcpy(scale, part.absmax_float + first, blocks * kTile * sizeof(float));
    return;
  }
  const uint8_t* absmax = part.absmax + first;
  Ahead(absmax + 2 * blocks * kTile, blocks * kTile, 1).fetch();  // two tiles ahead: one row takes them in pairs
  alignas(32) float group[kTile];  // of the rows, at this block
  const __m256 offset = _mm256_set1_ps(part.offset);
  for (int64_t block = 0, until = 0; block < blocks; ++block, absmax += kTile, scale += kTile) {
    if (block == until) {  // blocks that follow each other share a group's scale, up to 256 of them
      until = blocks;
      for (int64_t r = 0; r < kTile; ++r) {
        const int64_t canonical = (tile * kTile + r) * blocks + block;
        group[r] = part.group_scale[canonical >> 8];
        until = std::min(until, block + 256 - (canonical & 255));
      }
    }
    const float* table = part.table256;
    for (int half = 0; half < kTile; half += 8) {
      const uint8_t* at = absmax + half;
      const __m256 values = _mm256_setr_ps(table[at[0]], table[at[1]], table[at[2]], table[at[3]], table[at[4]], table[at[5]],
                                           table[at[6]], table[at[7]]);
      _mm256_store_ps(scale + half, _mm256_fmadd_ps(values, _mm256_load_ps(group + half), offset));
    }
  }
}

// One row's sums over one block of T tiles, without a panel between: what `expand` and `add<1>` give.
template <int T>
LORAMUX_INLINE void add_row(const uint8_t* codes, int64_t distance, const int32_t* x, const float* unit,
                            const float* scale, int64_t scale_distance, __m256 (&total)[T][2]) {
  const __m256i low = kTable.load(0), high = kTable.load(1);
  __m256i sum[T][2];
  for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  for (int quad = 0; quad < kBlock / 4; ++quad) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const uint8_t* from = codes + t * distance + quad * 32;
      __builtin_prefetch(from + T * distance, 0, 2);
      look_up(load_codes(from), low, high, [&](int pair, int half, __m256i weights) LORAMUX_LAMBDA {
        sum[t][half] = add_products(sum[t][half], weights, _mm256_set1_epi32(x[quad * 2 + pair]));
      });
    }
  }
  for (int t = 0; t < T; ++t)
    for (int half = 0; half < 2; ++half)
      total[t][half] =
          add_scaled(total[t][half], _mm256_load_ps(scale + t * scale_distance + half * 8), unit, sum[t][half]);
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// totals[g][16] += scale·unit[g]·Σ panel[i][16]·x[i][g] for a group of G rows.
template <int G>
LORAMUX_INLINE void add(const int32_t* panel, const int32_t* x, const float* unit, const float* scale, float* totals) {
  __m256i sum[G][2];
  for (int g = 0; g < G; ++g) sum[g][0] = sum[g][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    const auto* from = reinterpret_cast<const __m256i*>(panel + i * kTile);
    const __m256i w0 = _mm256_load_si256(from), w1 = _mm256_load_si256(from + 1);
#pragma GCC unroll 6
    for (int g = 0; g < G; ++g) {
      const __m256i inputs = _mm256_set1_epi32(x[i * G + g]);
      sum[g][0] = add_products(sum[g][0], w0, inputs);
      sum[g][1] = add_products(sum[g][1], w1, inputs);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int half = 0; half < 2; ++half) {
      float* total = totals + g * kTile + half * 8;
      _mm256_store_ps(total, add_scaled(_mm256_load_ps(total), _mm256_load_ps(scale + half * 8), unit + g, sum[g][half]));
    }
}

LORAMUX_INLINE void add_group(int64_t rows, const int32_t* panel, const int32_t* x, const float* unit,
                              const float* scale, float* totals) {
  switch (rows) {
    case 1: return add<1>(panel, x, unit, scale, totals);
    case 2: return add<2>(panel, x, unit, scale, totals);
    case 3: return add<3>(panel, x, unit, scale, totals);
    case 4: return add<4>(panel, x, unit, scale, totals);
    case 5: return add<5>(panel, x, unit, scale, totals);
    default: return add<6>(panel, x, unit, scale, totals);
  }
}

// Rows of bf16 weights, and rows of inputs in lanes: sixteen elements as eight evens, then eight odds.
struct Dots {
  const bf16* weights;
  int64_t weights_stride;
  const float* lanes;
  int64_t lanes_stride;
  int64_t elements;  // a multiple of 16
  float* out;        // [row of lanes][row of weights]
  int64_t out_stride;
};

// out[g][r] = weights[r]·lanes[g], or is increased by that. kStream: asks for the R rows that come next.
template <int R, int G, bool kAdd, bool kStream>
LORAMUX_INLINE void dots(const Dots& d, int64_t r0, int64_t g0) {
  static_assert(R % 4 == 0 || R == 1);
  const bf16* w = d.weights + r0 * d.weights_stride;
  const float* x = d.lanes + g0 * d.lanes_stride;
  float* out = d.out + g0 * d.out_stride + r0;
  __m256 sum[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sum[r][g] = _mm256_setzero_ps();
  for (int64_t i = 0; i < d.elements; i += 16) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i pairs = load_pairs(w + r * d.weights_stride + i);
      if constexpr (kStream) __builtin_prefetch(w + (R + r) * d.weights_stride + i, 0, 2);
      const __m256 even = evens(pairs), odd = odds(pairs);
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) {
        sum[r][g] = _mm256_fmadd_ps(even, _mm256_load_ps(x + g * d.lanes_stride + i), sum[r][g]);
        sum[r][g] = _mm256_fmadd_ps(odd, _mm256_load_ps(x + g * d.lanes_stride + i + 8), sum[r][g]);
      }
    }
  }
#pragma GCC unroll 3
  for (int g = 0; g < G; ++g) {
    float* to = out + g * d.out_stride;
    if constexpr (R == 1) {
      const float result = _mm_cvtss_f32(sums(sum[0][g], sum[0][g], sum[0][g], sum[0][g]));
      *to = kAdd ? *to + result : result;
    } else {
      for (int r = 0; r < R; r += 4) {
        const __m128 result = sums(sum[r][g], sum[r + 1][g], sum[r + 2][g], sum[r + 3][g]);
        _mm_storeu_ps(to + r, kAdd ? _mm_add_ps(_mm_loadu_ps(to + r), result) : result);
      }
    }
  }
}

template <int G, bool kAdd, bool kStream>
LORAMUX_INLINE void dots_of(const Dots& d, int64_t weights_rows, int64_t g, Ahead* ahead) {
  int64_t r = 0;
  if constexpr (G == 1)
    for (; r + 8 <= weights_rows; r += 8) dots<8, 1, kAdd, kStream>(d, r, g);
  for (; r + 4 <= weights_rows; r += 4) {
    if constexpr (!kStream) ahead->fetch();
    dots<4, G, kAdd, kStream>(d, r, g);
  }
  for (; r < weights_rows; ++r) dots<1, G, kAdd, false>(d, r, g);
}

template <bool kAdd>
void all_dots(const Dots& d, int64_t weights_rows, int64_t lanes_rows) {
  switch (lanes_rows) {  // one pass over the weights
    case 1: return dots_of<1, kAdd, true>(d, weights_rows, 0, nullptr);
    case 2: return dots_of<2, kAdd, true>(d, weights_rows, 0, nullptr);
    case 3: return dots_of<3, kAdd, true>(d, weights_rows, 0, nullptr);
  }
  const int64_t pieces = std::max<int64_t>(1, lanes_rows / 3 * (weights_rows / 4));
  Ahead ahead(d.weights + weights_rows * d.weights_stride, weights_rows * d.weights_stride * sizeof(bf16), pieces);
  int64_t g = 0;
  for (; g + 3 <= lanes_rows; g += 3) dots_of<3, kAdd, false>(d, weights_rows, g, &ahead);
  if (g + 2 == lanes_rows) dots_of<2, kAdd, false>(d, weights_rows, g, &ahead);
  if (g + 1 == lanes_rows) dots_of<1, kAdd, false>(d, weights_rows, g, &ahead);
}

// ---- The operation -------------------------------------------------------------------------------------------------

// One adapter's branch at one part, found once a call.
struct Branch {
  const bf16* a;
  const bf16* b;
  const bf16* bias;
  const float* scale;
  int64_t rank, start, stop;  // rows start ≤ m < stop
  float weight;
  float* h;  // weight·(A·x), [stop - start][width] in lanes, zero past the rank
  int64_t width() const { return (rank + 15) / 16 * 16; }
};

struct Job {
  const LinearCall& c;
  Pool& pool;
  int32_t* x;    // groups of rows one after another, each [pairs of inputs][rows of the group]
  float* units;  // of x, for groups as above, each [k/64][rows of the group]
  float* lanes;  // [m][k], each 16 inputs as eight evens and eight odds; only if there are dot products
  Branch* branches;
  int64_t* part_branches;  // branches of part p: [p] … [p + 1]
  int64_t groups;
  int64_t first_row(int64_t group) const { return c.m * group / groups; }
};

// A block of inputs in units; returns the unit, over kWeightUnits. What is not finite makes it NaN.
LORAMUX_INLINE float quantize(const bf16* from, int32_t* pairs, int64_t stride) {
  __m256 values[8], absolute = _mm256_setzero_ps(), most = _mm256_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * 8));
    values[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values[i]);
    absolute = _mm256_add_ps(absolute, magnitude);
    most = _mm256_max_ps(most, magnitude);
  }
  const float total = sum(absolute);
  float unit = std::max(greatest(most) / kMostUnitsOfOne, total / kMostUnits), inverse = 1.0f / unit;
  if (!(total <= std::numeric_limits<float>::max())) {
    unit = std::numeric_limits<float>::quiet_NaN();
    inverse = 0.0f;
  } else if (unit < kLeastUnit) {
    unit = inverse = 0.0f;
  }
  alignas(32) int32_t whole[kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i], _mm256_set1_ps(inverse)));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i + 1], _mm256_set1_ps(inverse)));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole + i * 8), packed);
  }
  for (int i = 0; i < kPairs; ++i) pairs[i * stride] = whole[i];
  return unit / kWeightUnits;
}

void pack(const Job& job, int64_t group) {
  const LinearCall& c = job.c;
  const int64_t begin = job.first_row(group), rows = job.first_row(group + 1) - begin, blocks = c.k / kBlock;
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* from = c.x + (begin + r) * c.x_stride;
    if (job.x != nullptr)
      for (int64_t block = 0; block < blocks; ++block)
        job.units[(begin * blocks + block * rows) + r] =
            quantize(from + block * kBlock, job.x + begin * c.k / 2 + block * kPairs * rows + r, rows);
    if (job.lanes == nullptr) continue;
    float* lanes = job.lanes + (begin + r) * c.k;
    for (int64_t i = 0; i < c.k; i += 16) {
      const __m256i pairs = load_pairs(from + i);
      _mm256_store_ps(lanes + i, evens(pairs));
      _mm256_store_ps(lanes + i + 8, odds(pairs));
    }
  }
}

constexpr int64_t kRanks = 8, kRows = 24;  // of a piece of A·x

// A·x in pieces of kRanks × kRows. `piece` counts them; use(first rank, ranks, rows begin, end) is called for `mine`.
int64_t num_pieces(int64_t rank, int64_t rows) {
  return ((rank + kRanks - 1) / kRanks) * ((rows + kRows - 1) / kRows);
}
template <typename Use>
LORAMUX_INLINE void pieces(int64_t rank, int64_t start, int64_t stop, Range mine, int64_t& piece, const Use& use) {
  for (int64_t m = start; m < stop; m += kRows)
    for (int64_t rank0 = 0; rank0 < rank; rank0 += kRanks, ++piece)
      if (piece >= mine.begin && piece < mine.end) use(rank0, std::min(kRanks, rank - rank0), m, std::min(m + kRows, stop));
}

// h for `ranks` ranks of a branch from `rank0`, and its rows begin ≤ m < end.
void down(const Job& job, const Branch& branch, int64_t rank0, int64_t ranks, int64_t begin, int64_t end) {
  const int64_t k = job.c.k;
  float out[kRows * kRanks];
  all_dots<false>({branch.a + rank0 * k, k, job.lanes + begin * k, k, k, out, kRanks}, ranks, end - begin);
  const int64_t width = branch.width(), last = rank0 + ranks == branch.rank ? width : rank0 + ranks;
  for (int64_t m = begin; m < end; ++m)
    for (int64_t rank = rank0; rank < last; ++rank)
      branch.h[(m - branch.start) * width + rank / 16 * 16 + rank % 2 * 8 + rank % 16 / 2] =
          rank < branch.rank ? branch.weight * out[(m - begin) * kRanks + rank - rank0] : 0.0f;
}

// totals += B·h for one tile of outputs and rows begin ≤ m < end.
void up_tail(const Branch& branch, const bf16* b, int64_t outputs, int64_t begin, int64_t end, float* totals) {
  // A row is read in sixteens: what lies past its rank is the next row and meets zeros in h, but after the last row
  // there may be nothing.
  static thread_local Scratch scratch;
  const int64_t width = branch.width();
  bf16* copy = scratch.get<bf16>(kTile * width);
  std::memset(copy, 0, kTile * width * sizeof(bf16));
  for (int64_t i = 0; i < outputs; ++i)
    std::memcpy(copy + i * width, b + i * branch.rank, branch.rank * sizeof(bf16));
  all_dots<true>({copy, width, branch.h + (begin - branch.start) * width, width, width, totals, kTile}, outputs, end - begin);
}

LORAMUX_INLINE void up(const Branch& branch, int64_t tile, int64_t n, int64_t begin, int64_t end, float* totals) {
  const int64_t outputs = std::min<int64_t>(kTile, n - tile * kTile), width = branch.width();
  const bf16* b = branch.b + tile * kTile * branch.rank;
  if (tile * kTile + outputs == n && width != branch.rank) return up_tail(branch, b, outputs, begin, end, totals);
  const Dots d{b, branch.rank, branch.h + (begin - branch.start) * width, width, width, totals, kTile};
  if (end - begin == 1 && outputs == kTile) {
    dots<8, 1, true, false>(d, 0, 0);
    dots<8, 1, true, false>(d, 8, 0);
    return;
  }
  all_dots<true>(d, outputs, end - begin);
}

struct Buffers {
  int32_t* panel;  // [32 pairs of inputs][16]
  float* scales;  // [2 tiles][k/64][16]
  float* totals;  // [rows of a chunk, at least 2][16]
  Upcoming *factors, *next;  // B of the tile; A of the next operation
  void fetch() const {
    factors->fetch();
    next->fetch();
  }
};

// The rows of B that T tiles' branches read.
void ask_for_factors(const Job& job, int64_t p, int64_t tile, int64_t count, Upcoming& factors) {
  const LinearCall& c = job.c;
  const int64_t first = tile * kTile, outputs = std::min(count * kTile, c.parts[p].n - first);
  factors.clear();
  for (int64_t i = job.part_branches[p]; i < job.part_branches[p + 1]; ++i) {
    const Branch& branch = job.branches[i];
    factors.add(branch.b + first * branch.rank, outputs * branch.rank * static_cast<int64_t>(sizeof(bf16)));
  }
  factors.spread(c.k / kBlock);
}

// What `down` of this thread will read in the next operation.
void ask_for_next(const LinearCall& c, int thread, int threads, int64_t times, Upcoming& next) {
  next.clear();
  const auto each = [&](const auto& use) LORAMUX_LAMBDA {
    for (int64_t p = 0; p < c.num_next; ++p)
      for (int64_t s = 0; s < c.num_segments; ++s)
        if (c.segments[s].changes(c.next[p].site)) use(c.segments[s], c.next[p].site);
  };
  int64_t count = 0, piece = 0;
  each([&](const Segment& s, int64_t site) LORAMUX_LAMBDA { count += num_pieces(s.ranks[site], s.stop - s.start); });
  const Range mine = share(count, thread, threads);
  each([&](const Segment& s, int64_t site) LORAMUX_LAMBDA {
    const bf16* a = s.a(site);
    pieces(s.ranks[site], s.start, s.stop, mine, piece, [&](int64_t rank0, int64_t ranks, int64_t m, int64_t) LORAMUX_LAMBDA {
      if (m == s.start) next.add(a + rank0 * c.next_k, ranks * c.next_k * static_cast<int64_t>(sizeof(bf16)));
    });
  });
  next.spread(times);
}

// W·x for one tile of outputs and whole groups of rows; totals [rows][16].
void multiply(const Job& job, const Part& part, int64_t tile, int64_t group0, int64_t group1, const Buffers& b) {
  const LinearCall& c = job.c;
  const int64_t begin = job.first_row(group0), end = job.first_row(group1), blocks = c.k / kBlock;
  if (part.dense != nullptr) {
    const int64_t outputs = std::min<int64_t>(kTile, part.n - tile * kTile);
    all_dots<false>({part.dense + tile * kTile * c.k, c.k, job.lanes + begin * c.k, c.k, c.k, b.totals, kTile}, outputs,
                    end - begin);
    return;
  }
  std::memset(b.totals, 0, (end - begin) * kTile * sizeof(float));
  tile_scales(part, tile, blocks, b.scales);
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* codes = part.codes + (tile * blocks + block) * kTile * 32;
    Ahead(codes + 2 * kTile * 32, kTile * 32, 1).fetch();
    b.fetch();
    expand(codes, b.panel);
    for (int64_t group = group0; group < group1; ++group) {
      const int64_t first = job.first_row(group), rows = job.first_row(group + 1) - first;
      add_group(rows, b.panel, job.x + first * c.k / 2 + block * kPairs * rows, job.units + first * blocks + block * rows,
                b.scales + block * kTile, b.totals + (first - begin) * kTile);
    }
  }
}

// The same for the only row and T tiles; totals [T][16].
template <int T>
void multiply_row(const Job& job, const Part& part, int64_t tile, const Buffers& b) {
  const int64_t blocks = job.c.k / kBlock, distance = blocks * kTile * 32;
  const uint8_t* codes = part.codes + tile * distance;
  for (int t = 0; t < T; ++t) tile_scales(part, tile + t, blocks, b.scales + t * blocks * kTile);
  __m256 total[T][2];
  for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block) {
    b.fetch();
    add_row<T>(codes + block * kTile * 32, distance, job.x + block * kPairs, job.units + block,
               b.scales + block * kTile, blocks * kTile, total);
  }
  for (int t = 0; t < T; ++t)
    for (int half = 0; half < 2; ++half) _mm256_store_ps(b.totals + t * kTile + half * 8, total[t][half]);
}

// Adds the branches, scales and biases of rows begin ≤ m < end to a tile's totals, and writes them to y.
void finish(const Job& job, int64_t p, int64_t tile, int64_t begin, int64_t end, float* totals) {
  const LinearCall& c = job.c;
  const Part& part = c.parts[p];
  const int64_t outputs = std::min<int64_t>(kTile, part.n - tile * kTile);
  for (int64_t i = job.part_branches[p]; i < job.part_branches[p + 1]; ++i) {
    const Branch& branch = job.branches[i];
    const int64_t from = std::max(begin, branch.start), to = std::min(end, branch.stop);
    if (from >= to) continue;
    up(branch, tile, part.n, from, to, totals + (from - begin) * kTile);
    if (branch.bias != nullptr)
      for (int64_t m = from; m < to; ++m)
        for (int64_t n = 0; n < outputs; ++n)
          totals[(m - begin) * kTile + n] += branch.weight * to_float(branch.bias[tile * kTile + n]);
    if (branch.scale != nullptr)
      for (int64_t m = from; m < to; ++m)
        for (int64_t n = 0; n < outputs; ++n) totals[(m - begin) * kTile + n] *= branch.scale[tile * kTile + n];
  }
  for (int64_t m = begin; m < end; ++m) {
    float* total = totals + (m - begin) * kTile;
    if (part.bias != nullptr)
      for (int64_t n = 0; n < outputs; ++n) total[n] += part.bias[tile * kTile + n];
    bf16* y = c.y + m * c.y_stride + part.column + tile * kTile;
    if (outputs == kTile)
      store_rounded(_mm256_load_ps(total), _mm256_load_ps(total + 8), y);
    else
      for (int64_t n = 0; n < outputs; ++n) y[n] = to_bf16(total[n]);
  }
}

void run(void* argument, int thread, int threads) {
  const Job& job = *static_cast<Job*>(argument);
  const LinearCall& c = job.c;
  const Range packing = share(job.groups, thread, threads);
  for (int64_t group = packing.begin; group < packing.end; ++group) pack(job, group);
  job.pool.barrier();
  const int64_t num_branches = job.part_branches[c.num_parts];
  if (num_branches != 0) {
    int64_t count = 0, piece = 0;
    for (const Branch* branch = job.branches; branch < job.branches + num_branches; ++branch)
      count += num_pieces(branch->rank, branch->stop - branch->start);
    // In one run for each thread, so that a piece that asks for what lies behind it asks for this thread's next.
    const Range mine = share(count, thread, threads);
    for (const Branch* branch = job.branches; branch < job.branches + num_branches; ++branch)
      pieces(branch->rank, branch->start, branch->stop, mine, piece,
             [&](int64_t rank0, int64_t ranks, int64_t begin, int64_t end) LORAMUX_LAMBDA {
               down(job, *branch, rank0, ranks, begin, end);
             });
    job.pool.barrier();
  }
  int64_t total = 0;
  for (int64_t p = 0; p < c.num_parts; ++p) total += tiles(c.parts[p].n);
  const Range mine = share(total, thread, threads);
  const int64_t chunks = (c.m * c.k * static_cast<int64_t>(sizeof(int16_t)) + kRowBytes - 1) / kRowBytes;
  const int64_t groups_of_chunk = (job.groups + chunks - 1) / chunks;
  static thread_local Scratch scratch;
  static thread_local Upcoming factors, next;
  ask_for_next(c, thread, threads, (mine.end - mine.begin) * chunks * (c.k / kBlock), next);
  const int64_t scales = 2 * c.k / kBlock * kTile;
  Buffers b;
  b.scales = scratch.get<float>(scales + (groups_of_chunk * kMostRows + 2) * kTile + kPairs * kTile);
  b.totals = b.scales + scales;
  b.panel = reinterpret_cast<int32_t*>(b.totals + (groups_of_chunk * kMostRows + 2) * kTile);
  b.factors = &factors;
  b.next = &next;
  for (int64_t group = 0; group < job.groups; group += groups_of_chunk) {
    const int64_t group1 = std::min(group + groups_of_chunk, job.groups);
    const int64_t begin = job.first_row(group), end = job.first_row(group1);
    int64_t before = 0;
    for (int64_t p = 0; p < c.num_parts; ++p) {
      const Part& part = c.parts[p];
      const int64_t count = tiles(part.n), last = std::min(mine.end - before, count);
      for (int64_t tile = std::max<int64_t>(mine.begin - before, 0); tile < last; ++tile) {
        const bool two = c.m == 1 && part.dense == nullptr && tile + 1 < last;
        ask_for_factors(job, p, tile, two ? 2 : 1, factors);
        if (two) {
          multiply_row<2>(job, part, tile, b);
          finish(job, p, tile, 0, 1, b.totals);
          finish(job, p, ++tile, 0, 1, b.totals + kTile);
        } else {
          multiply(job, part, tile, group, group1, b);
          finish(job, p, tile, begin, end, b.totals);
        }
      }
      before += count;
    }
  }
}

}  // namespace

void LORAMUX_JOIN(linear_, LORAMUX_SET)(Pool& pool, const LinearCall& call) {
  static thread_local Scratch packed, units, lanes, low_rank;
  static thread_local std::unique_ptr<Branch[]> branches;
  static thread_local std::unique_ptr<int64_t[]> part_branches;
  static thread_local int64_t room = 0, part_room = 0;
  if (room < call.num_segments * call.num_parts) {
    room = call.num_segments * call.num_parts;
    branches.reset(new Branch[room]);
  }
  if (part_room < call.num_parts + 1) {
    part_room = call.num_parts + 1;
    part_branches.reset(new int64_t[part_room]);
  }
  int64_t count = 0, elements = 0;
  bool dense = false, nf4 = false;
  for (int64_t p = 0; p < call.num_parts; ++p) {
    (call.parts[p].dense != nullptr ? dense : nf4) = true;
    part_branches[p] = count;
    const int64_t site = call.parts[p].site;
    for (int64_t s = 0; s < call.num_segments; ++s) {
      const Segment& segment = call.segments[s];
      if (!segment.changes(site)) continue;
      branches[count++] = {segment.a(site), segment.b(site), segment.bias(site), segment.scale(site),
                           segment.ranks[site], segment.start, segment.stop, segment.weight, nullptr};
      elements += (segment.stop - segment.start) * branches[count - 1].width();
    }
  }
  part_branches[call.num_parts] = count;
  Job job{call, pool, nullptr, nullptr, nullptr, branches.get(), part_branches.get(),
          (call.m + kMostRows - 1) / kMostRows};
  if (nf4) {
    job.x = packed.get<int32_t>(call.m * call.k / 2);
    job.units = units.get<float>(call.m * call.k / kBlock);
  }
  if (dense || count != 0) job.lanes = lanes.get<float>(call.m * call.k);
  if (count != 0) {
    float* h = low_rank.get<float>(elements);
    for (int64_t i = 0; i < count; ++i) {
      branches[i].h = h;
      h += (branches[i].stop - branches[i].start) * branches[i].width();
    }
  }
  pool.run(run, &job);
}

}  // namespace loramux
