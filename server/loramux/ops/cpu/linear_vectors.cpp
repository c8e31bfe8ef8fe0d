// The linear operation without AMX, compiled once for each instruction set (LORAMUX_SET names it).
//
// A vector is eight outputs. Sixteen outputs × 64 inputs of weights are expanded into a panel of floats, [inputs][16],
// that stays in the first-level cache, and every row multiplies it with its own inputs, one broadcast each. So the
// order of summation is that of the inputs, whatever the number of rows, and NF4, the dense head and B are one loop.
// A is read along its rows instead (a dot product), since its inputs are many and its outputs few.
//
// NF4 is never rounded: a panel holds the table's float32 values, and the block's sum is multiplied by its absmax.
//
// Order of summation: inputs in ascending order within a block of 64, blocks in ascending order, then the adapters'
// branches in segment order, ranks in ascending order. A·x: eight lanes in ascending order, then `sums`.

#include <memory>

#include "linear.h"
#include "vectors.h"

namespace loramux {
namespace {

constexpr int kBlock = 64;       // NF4 block
constexpr int kMostRows = 6;     // rows of a group: 12 sums, 2 weights and an input are 15 registers
constexpr int kRankRows = 3;     // rows that share a load of A
constexpr int64_t kRowBytes = 256 << 10;  // inputs of a chunk of rows, to stay in the second-level cache

alignas(64) constexpr float kNF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The table by bytes: byte b of entry c is bytes[b][c], in both lanes.
struct Table {
  alignas(32) uint8_t bytes[4][32];
  Table() {
    for (int entry = 0; entry < 32; ++entry)
      for (int b = 0; b < 4; ++b) bytes[b][entry] = reinterpret_cast<const uint8_t*>(&kNF4[entry % 16])[b];
  }
  LORAMUX_INLINE __m256i load(int b) const { return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes[b])); }
};
const Table kTable;

// ---- Panels --------------------------------------------------------------------------------------------------------

// The values of 32 codes, two inputs × 16 outputs: to[0 … 3] are (input, outputs) (0, low), (0, high), (1, low), (1, high).
LORAMUX_INLINE void look_up(__m256i codes, const __m256i (&table)[4], __m256 (&to)[4]) {
  const __m256i b0 = _mm256_shuffle_epi8(table[0], codes), b1 = _mm256_shuffle_epi8(table[1], codes);
  const __m256i b2 = _mm256_shuffle_epi8(table[2], codes), b3 = _mm256_shuffle_epi8(table[3], codes);
  const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), high0 = _mm256_unpacklo_epi8(b2, b3);
  const __m256i low1 = _mm256_unpackhi_epi8(b0, b1), high1 = _mm256_unpackhi_epi8(b2, b3);
  to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  to[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  to[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

// Four inputs × 16 outputs from 32 bytes, input by input.
LORAMUX_INLINE void look_up_quad(const uint8_t* codes, const __m256i (&table)[4], __m256 (&to)[8]) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), mask = _mm256_set1_epi8(15);
  look_up(_mm256_and_si256(packed, mask), table, reinterpret_cast<__m256(&)[4]>(to[0]));
  look_up(_mm256_and_si256(_mm256_srli_epi16(packed, 4), mask), table, reinterpret_cast<__m256(&)[4]>(to[4]));
}

void expand(const uint8_t* codes, float* panel) {
  const __m256i table[4] = {kTable.load(0), kTable.load(1), kTable.load(2), kTable.load(3)};
  for (int quad = 0; quad < kBlock / 4; ++quad) {
    __m256 values[8];
    look_up_quad(codes + quad * 32, table, values);
    for (int i = 0; i < 8; ++i) _mm256_store_ps(panel + quad * 64 + i * 8, values[i]);
  }
}

// The absmax of a tile's 16 rows, for all blocks: scale[block][16].
void tile_scales(const Part& part, int64_t tile, int64_t blocks, float* scale) {
  const int64_t first = tile * blocks * kTile;
  if (part.absmax_float != nullptr) {
    std::memcpy(scale, part.absmax_float + first, blocks * kTile * sizeof(float));
    return;
  }
  const uint8_t* absmax = part.absmax + first;
  for (int64_t r = 0; r < kTile; ++r) {
    const int64_t canonical = (tile * kTile + r) * blocks;
    for (int64_t block = 0; block < blocks; ++block)
      scale[block * kTile + r] = __builtin_fmaf(part.table256[absmax[block * kTile + r]],
                                                part.group_scale[(canonical + block) >> 8], part.offset);
  }
}

// Sixteen inputs of 16 rows of bf16, `stride` elements apart, as panel[16][16].
LORAMUX_INLINE void turn(const bf16* rows, int64_t stride, float* panel) {
  for (int half = 0; half < 2; ++half) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) r[i] = load_pairs(rows + (half * 8 + i) * stride);
    transpose(r);
    for (int pair = 0; pair < 8; ++pair) {
      _mm256_store_ps(panel + pair * 32 + half * 8, evens(r[pair]));
      _mm256_store_ps(panel + pair * 32 + half * 8 + 16, odds(r[pair]));
    }
  }
}

// `count` ≤ 64 inputs of up to 16 rows of bf16 as panel[count][16]; what is missing is zero. Reads no byte past them.
void turn_panel(const bf16* rows, int64_t stride, int64_t present, int64_t count, float* panel) {
  for (int64_t i = 0; i < count; i += 16) {
    if (present == kTile && count - i >= 16) {
      turn(rows + i, stride, panel + i * kTile);
      continue;
    }
    alignas(64) bf16 staging[16 * 16] = {};
    for (int64_t r = 0; r < present; ++r)
      std::memcpy(staging + r * 16, rows + r * stride + i, std::min<int64_t>(16, count - i) * sizeof(bf16));
    turn(staging, 16, panel + i * kTile);
  }
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

// totals[g][16] += scale · Σ panel[i][16]·x[i·step + g·row] (with a scale, the sum begins at zero; without, at the total).
template <int G, bool kScaled>
LORAMUX_INLINE void add(const float* panel, int64_t count, const float* x, int64_t step, int64_t row,
                        const float* scale, float* totals) {
  __m256 sum[G][2];
  for (int g = 0; g < G; ++g)
    for (int half = 0; half < 2; ++half)
      sum[g][half] = kScaled ? _mm256_setzero_ps() : _mm256_load_ps(totals + g * kTile + half * 8);
  for (int64_t i = 0; i < count; ++i) {
    const __m256 w0 = _mm256_load_ps(panel + i * kTile), w1 = _mm256_load_ps(panel + i * kTile + 8);
#pragma GCC unroll 6
    for (int g = 0; g < G; ++g) {
      const __m256 value = scalar(x + i * step + g * row);
      sum[g][0] = _mm256_fmadd_ps(w0, value, sum[g][0]);
      sum[g][1] = _mm256_fmadd_ps(w1, value, sum[g][1]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int half = 0; half < 2; ++half) {
      float* total = totals + g * kTile + half * 8;
      if constexpr (kScaled)
        sum[g][half] = _mm256_fmadd_ps(_mm256_load_ps(scale + half * 8), sum[g][half], _mm256_load_ps(total));
      _mm256_store_ps(total, sum[g][half]);
    }
}

// `add` for a number of rows that is known only now; rows of a group stand side by side in x.
template <bool kScaled>
LORAMUX_INLINE void add_group(int64_t rows, const float* panel, int64_t count, const float* x, const float* scale,
                              float* totals) {
  switch (rows) {
    case 1: return add<1, kScaled>(panel, count, x, 1, 1, scale, totals);
    case 2: return add<2, kScaled>(panel, count, x, 2, 1, scale, totals);
    case 3: return add<3, kScaled>(panel, count, x, 3, 1, scale, totals);
    case 4: return add<4, kScaled>(panel, count, x, 4, 1, scale, totals);
    case 5: return add<5, kScaled>(panel, count, x, 5, 1, scale, totals);
    default: return add<6, kScaled>(panel, count, x, 6, 1, scale, totals);
  }
}

// The same for rows of h, [rows][rank]: any number of them.
void add_ranks(int64_t rows, const float* panel, int64_t count, const float* h, int64_t rank, float* totals) {
  for (; rows >= 4; rows -= 4, h += 4 * rank, totals += 4 * kTile) add<4, false>(panel, count, h, 1, rank, nullptr, totals);
  for (; rows >= 1; --rows, h += rank, totals += kTile) add<1, false>(panel, count, h, 1, rank, nullptr, totals);
}

// out[g·stride + r] = weight · A[r]·x[g] for R rows of A and G of x, which is [G][k] with eight evens, then eight odds.
template <int R, int G>
LORAMUX_INLINE void dots(const bf16* a, const float* x, int64_t k, float weight, float* out, int64_t stride) {
  static_assert(R % 4 == 0 || R == 1);
  __m256 sum[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sum[r][g] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i += 16) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256i pairs = load_pairs(a + r * k + i);
      const __m256 even = evens(pairs), odd = odds(pairs);
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) {
        sum[r][g] = _mm256_fmadd_ps(even, _mm256_load_ps(x + g * k + i), sum[r][g]);
        sum[r][g] = _mm256_fmadd_ps(odd, _mm256_load_ps(x + g * k + i + 8), sum[r][g]);
      }
    }
  }
  const __m128 factor = _mm_set1_ps(weight);
  for (int g = 0; g < G; ++g) {
    if constexpr (R == 1)
      out[g * stride] = _mm_cvtss_f32(_mm_mul_ss(factor, sums(sum[0][g], sum[0][g], sum[0][g], sum[0][g])));
    else
      for (int r = 0; r < R; r += 4)
        _mm_storeu_ps(out + g * stride + r,
                      _mm_mul_ps(factor, sums(sum[r][g], sum[r + 1][g], sum[r + 2][g], sum[r + 3][g])));
  }
}

// ---- The operation -------------------------------------------------------------------------------------------------

// One adapter's branch at one part, found once a call.
struct Branch {
  const bf16* a;
  const bf16* b;
  const bf16* bias;
  int64_t rank, start, stop;  // rows start ≤ m < stop
  float weight;
  float* h;  // weight·(A·x), [stop - start][rank]
};

struct Job {
  const LinearCall& c;
  Pool& pool;
  float* x;      // groups of rows one after another, each [k][rows of the group]
  float* lanes;  // [m][k], each 16 inputs as eight evens and eight odds; only if there are branches
  Branch* branches;
  int64_t* part_branches;  // branches of part p: [p] … [p + 1]
  int64_t groups;
  int64_t first_row(int64_t group) const { return c.m * group / groups; }
};

void pack(const Job& job, int64_t group) {
  const LinearCall& c = job.c;
  const int64_t begin = job.first_row(group), rows = job.first_row(group + 1) - begin;
  float* to = job.x + begin * c.k;
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* from = c.x + (begin + r) * c.x_stride;
    for (int64_t i = 0; i < c.k; ++i) to[i * rows + r] = to_float(from[i]);
    if (job.lanes == nullptr) continue;
    float* lanes = job.lanes + (begin + r) * c.k;
    for (int64_t i = 0; i < c.k; i += 16) {
      const __m256i pairs = load_pairs(from + i);
      _mm256_store_ps(lanes + i, evens(pairs));
      _mm256_store_ps(lanes + i + 8, odds(pairs));
    }
  }
}

// h for `ranks` ranks of a branch from `rank0`, and its rows begin ≤ m < end.
void down(const Job& job, const Branch& branch, int64_t rank0, int64_t ranks, int64_t begin, int64_t end) {
  const int64_t k = job.c.k, stride = branch.rank;
  for (int64_t m = begin; m < end;) {
    const float* x = job.lanes + m * k;
    const int64_t rows = end - m >= kRankRows ? kRankRows : 1;
    for (int64_t r = rank0, left = ranks; left > 0;) {
      const bf16* a = branch.a + r * k;
      float* out = branch.h + (m - branch.start) * stride + r;
      int64_t done = 1;
      if (rows == kRankRows) {
        if (left >= 4) done = 4, dots<4, kRankRows>(a, x, k, branch.weight, out, stride);
        else dots<1, kRankRows>(a, x, k, branch.weight, out, stride);
      } else if (left >= 8) {
        done = 8, dots<8, 1>(a, x, k, branch.weight, out, stride);
      } else if (left >= 4) {
        done = 4, dots<4, 1>(a, x, k, branch.weight, out, stride);
      } else {
        dots<1, 1>(a, x, k, branch.weight, out, stride);
      }
      r += done, left -= done;
    }
    m += rows;
  }
}

// All of one tile of outputs for rows begin ≤ m < end, whole groups; totals [end - begin][16].
void tile_outputs(const Job& job, int64_t p, int64_t tile, int64_t group0, int64_t group1, float* panel, float* scales,
                  float* totals) {
  const LinearCall& c = job.c;
  const Part& part = c.parts[p];
  const int64_t begin = job.first_row(group0), end = job.first_row(group1);
  const int64_t outputs = std::min<int64_t>(kTile, part.n - tile * kTile), blocks = c.k / kBlock;
  std::memset(totals, 0, (end - begin) * kTile * sizeof(float));
  if (part.dense == nullptr) tile_scales(part, tile, blocks, scales);
  for (int64_t at = 0; at < c.k; at += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, c.k - at);
    if (part.dense != nullptr) {
      turn_panel(part.dense + tile * kTile * c.k + at, c.k, outputs, count, panel);
    } else {
      expand(part.codes + (tile * blocks + at / kBlock) * kTile * 32, panel);
    }
    for (int64_t group = group0; group < group1; ++group) {
      const int64_t first = job.first_row(group), rows = job.first_row(group + 1) - first;
      const float* x = job.x + first * c.k + at * rows;
      float* to = totals + (first - begin) * kTile;
      if (part.dense != nullptr)
        add_group<false>(rows, panel, count, x, nullptr, to);
      else
        add_group<true>(rows, panel, kBlock, x, scales + at / kBlock * kTile, to);
    }
  }
  for (int64_t i = job.part_branches[p]; i < job.part_branches[p + 1]; ++i) {
    const Branch& branch = job.branches[i];
    const int64_t from = std::max(begin, branch.start), to = std::min(end, branch.stop);
    if (from >= to) continue;
    for (int64_t rank = 0; rank < branch.rank; rank += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, branch.rank - rank);
      turn_panel(branch.b + tile * kTile * branch.rank + rank, branch.rank, outputs, count, panel);
      add_ranks(to - from, panel, count, branch.h + (from - branch.start) * branch.rank + rank, branch.rank,
                totals + (from - begin) * kTile);
    }
    if (branch.bias != nullptr)
      for (int64_t m = from; m < to; ++m)
        for (int64_t n = 0; n < outputs; ++n)
          totals[(m - begin) * kTile + n] += branch.weight * to_float(branch.bias[tile * kTile + n]);
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
    constexpr int64_t kRanks = 8, kRows = 24;
    int64_t count = 0;
    for (int64_t i = 0; i < num_branches; ++i) {
      const Branch& branch = job.branches[i];
      for (int64_t m = branch.start; m < branch.stop; m += kRows)
        for (int64_t rank = 0; rank < branch.rank; rank += kRanks)
          if (count++ % threads == thread)
            down(job, branch, rank, std::min(kRanks, branch.rank - rank), m, std::min(m + kRows, branch.stop));
    }
    job.pool.barrier();
  }
  int64_t total = 0;
  for (int64_t p = 0; p < c.num_parts; ++p) total += tiles(c.parts[p].n);
  const Range mine = share(total, thread, threads);
  const int64_t chunks = (c.m * c.k * static_cast<int64_t>(sizeof(float)) + kRowBytes - 1) / kRowBytes;
  const int64_t groups_of_chunk = (job.groups + chunks - 1) / chunks;
  static thread_local Scratch scratch;
  float* panel = scratch.get<float>(kBlock * kTile + c.k / kBlock * kTile + (groups_of_chunk * kMostRows + 1) * kTile);
  float* scales = panel + kBlock * kTile;
  float* totals = scales + c.k / kBlock * kTile;
  for (int64_t group = 0; group < job.groups; group += groups_of_chunk) {
    int64_t before = 0;
    for (int64_t p = 0; p < c.num_parts; ++p) {
      const int64_t count = tiles(c.parts[p].n);
      for (int64_t tile = std::max<int64_t>(mine.begin - before, 0); tile < std::min(mine.end - before, count); ++tile)
        tile_outputs(job, p, tile, group, std::min(group + groups_of_chunk, job.groups), panel, scales, totals);
      before += count;
    }
  }
}

}  // namespace

void LORAMUX_JOIN(linear_, LORAMUX_SET)(Pool& pool, const LinearCall& call) {
  static thread_local Scratch packed, lanes, low_rank;
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
  for (int64_t p = 0; p < call.num_parts; ++p) {
    part_branches[p] = count;
    const int64_t site = call.parts[p].site;
    if (site < 0) continue;
    for (int64_t s = 0; s < call.num_segments; ++s) {
      const Segment& segment = call.segments[s];
      const int64_t rank = segment.ranks[site], *at = segment.offsets + 3 * site;
      if (segment.start >= segment.stop || rank == 0) continue;
      branches[count++] = {segment.buffer + at[0], segment.buffer + at[1], at[2] < 0 ? nullptr : segment.buffer + at[2],
                           rank, segment.start, segment.stop, segment.weight, nullptr};
      elements += (segment.stop - segment.start) * rank;
    }
  }
  part_branches[call.num_parts] = count;
  Job job{call, pool, packed.get<float>(call.m * call.k), nullptr, branches.get(), part_branches.get(),
          (call.m + kMostRows - 1) / kMostRows};
  if (count != 0) {
    job.lanes = lanes.get<float>(call.m * call.k);
    float* h = low_rank.get<float>(elements);
    for (int64_t i = 0; i < count; ++i) {
      branches[i].h = h;
      h += (branches[i].stop - branches[i].start) * branches[i].rank;
    }
  }
  pool.run(run, &job);
}

}  // namespace loramux
