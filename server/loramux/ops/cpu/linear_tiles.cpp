// The linear operation on AMX tiles.
//
// Weights stand on the left: a tile is 16 outputs × 32 inputs, x is packed into tiles of 16 input pairs × 16 rows, and
// the product is 16 outputs × 16 rows in float32. So one row costs what sixteen cost, NF4 needs no transposition (a
// row's 64 weights are 32 bytes), and the factors A and B of adapters are used where they lie.
//
// NF4 is expanded into bf16(table[code]·absmax), the very values that bitsandbytes dequantizes to, by one look-up a zmm
// in a table that is scaled once for each 64 weights. Nothing is expanded that is not multiplied at once.
//
// Order of summation, whatever m is: inputs in ascending order, then the adapters' branches in segment order, then their
// biases, a scale, and the base's bias.

#include "linear.h"

#include <memory>

#include "tiles.h"

namespace loramux {
namespace {

// One block of a tile, 16 rows × 64 weights: two tiles of bf16, inputs 0 … 31 and 32 … 63.
inline __attribute__((always_inline)) void expand(const uint8_t* codes, const float* scale, bf16* to) {
  const __m512 table = _mm512_load_ps(kNF4);
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + r * 32)));
    const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale[r]));
    const __m512i values = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
    // Look-ups read five bits: the table stands twice, so what the low code's neighbour leaves in bit 4 is harmless.
    _mm512_store_si512(to + r * kDepth, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values));
    _mm512_store_si512(to + kElements + r * kDepth, _mm512_permutexvar_epi16(words, values));
  }
}

inline void block_scales(const Part& part, int64_t tile, int64_t block, int64_t blocks, float* scale) {
  const int64_t at = (tile * blocks + block) * kTile;
  if (part.absmax_float != nullptr) {
    std::memcpy(scale, part.absmax_float + at, kTile * sizeof(float));
    return;
  }
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part.absmax + at)));
  const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const int64_t first = tile * kTile * blocks + block;  // canonical number of the first row's block
  const int64_t base = first >> 8;
  const __m512i group = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(blocks))),
                       _mm512_set1_epi32(static_cast<int>(first & 255))), 8);
  const __m512 value = _mm512_i32gather_ps(index, part.table256, 4);
  // The sixteen rows' groups lie within sixteen of the first one's as long as a row has at most 255 blocks.
  const __m512 group_scale = blocks < 256 ? _mm512_permutexvar_ps(group, _mm512_loadu_ps(part.group_scale + base))
                                          : _mm512_i32gather_ps(group, part.group_scale + base, 4);
  _mm512_store_ps(scale, _mm512_fmadd_ps(value, group_scale, _mm512_set1_ps(part.offset)));
}

// Weights are read once, in order, from memory: asking for them early is worth more than anything else here. Past the
// end this is harmless.
inline __attribute__((always_inline)) void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// ---- Packing -------------------------------------------------------------------------------------------------------

// `rows` rows of `elements` values each, `stride` elements apart, as a full tile; the rest is zero.
void copy_tile(const bf16* from, int64_t stride, int64_t rows, int64_t elements, bf16* to) {
  std::memset(to, 0, kElements * sizeof(bf16));
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * kDepth, from + r * stride, elements * sizeof(bf16));
}

// ---- The operation -------------------------------------------------------------------------------------------------

// One adapter's branch at one part, found once a call.
struct Branch {
  const bf16* a;
  const bf16* b;
  const bf16* bias;
  const float* scale;
  int64_t rank, start, stop, first_tile, last_tile;  // rows, and the row tiles that hold them
  float weight;
  // [row tiles][2][ceil(rank/32)] tiles: A·x packed like x, as the sum of two bf16, for a rounded A·x would cost more
  // accuracy than all other roundings of the branch together.
  bf16* h;
  int64_t part;
  int64_t depth() const { return (rank + kDepth - 1) / kDepth; }
};

struct Job {
  const LinearCall& c;
  Pool& pool;
  bf16* x;  // [row tiles][k/32] tiles
  Branch* branches;
  int64_t num_branches;
  int64_t row_tiles, depth;
};

// h = weight·(A·x) for 16 ranks and 16 rows, packed as one half of a tile of x.
void down(const Job& job, const Branch& branch, int64_t row_tile, int64_t rank0, bf16* staging, float* sums) {
  const LinearCall& c = job.c;
  const int64_t ranks = std::min<int64_t>(kTile, branch.rank - rank0);
  const bf16* x = job.x + row_tile * job.depth * kElements;
  const bf16* a = branch.a + rank0 * c.k;
  prefetch(a, ranks * c.k * static_cast<int64_t>(sizeof(bf16)));
  clear();
  for (int64_t d = 0; d < job.depth; ++d) {
    if (ranks == kTile) {
      multiply<1, 1>(a + d * kDepth, nullptr, c.k * sizeof(bf16), x + d * kElements, nullptr);
    } else {
      bf16* tile = staging + (d & 1) * kElements;
      copy_tile(a + d * kDepth, c.k, ranks, kDepth, tile);
      multiply<1, 1>(tile, nullptr, kDepth * sizeof(bf16), x + d * kElements, nullptr);
    }
  }
  store(0, 0, sums);
  bf16* high = branch.h + ((row_tile - branch.first_tile) * 2 * branch.depth() + rank0 / kDepth) * kElements;
  bf16* low = high + branch.depth() * kElements;
  // Ranks past the last are rows of zeros in the tile; rows of other requests get exact zeros.
  const int64_t half = (rank0 % kDepth) / 2 * kTile * 2;
  std::memset(high + half, 0, kElements / 2 * sizeof(bf16));
  std::memset(low + half, 0, kElements / 2 * sizeof(bf16));
  const int64_t row0 = std::max<int64_t>(branch.start - row_tile * kTile, 0);
  const int64_t row1 = std::min<int64_t>(branch.stop - row_tile * kTile, kTile);
  for (int rank = 0; rank < kTile; ++rank) {
    const int64_t at = half + (rank / 2) * kTile * 2 + rank % 2;
    for (int64_t row = row0; row < row1; ++row) {
      const float value = branch.weight * sums[rank * kTile + row];
      high[at + 2 * row] = to_bf16(value);
      low[at + 2 * row] = to_bf16(value - to_float(high[at + 2 * row]));
    }
  }
  if (ranks + rank0 == branch.rank && (rank0 % kDepth) == 0) {
    std::memset(high + kElements / 2, 0, kElements / 2 * sizeof(bf16));
    std::memset(low + kElements / 2, 0, kElements / 2 * sizeof(bf16));
  }
}

// Adds the branches of one part to the accumulators for outputs tile0 (and the next) × rows tile m0 (and the next).
template <int N, int M>
void up(const Job& job, int64_t p, int64_t n, int64_t tile0, int64_t m0, const bf16* zero, bf16* staging) {
  for (int64_t i = 0; i < job.num_branches; ++i) {
    const Branch& branch = job.branches[i];
    if (branch.part != p || branch.last_tile < m0 || branch.first_tile > m0 + M - 1) continue;
    const int64_t depth = branch.depth();
    for (int64_t d = 0; d < depth; ++d) {
      const bf16 *high[2] = {zero, zero}, *low[2] = {zero, zero};
      for (int m = 0; m < M; ++m)
        if (m0 + m >= branch.first_tile && m0 + m <= branch.last_tile) {
          high[m] = branch.h + ((m0 + m - branch.first_tile) * 2 * depth + d) * kElements;
          low[m] = high[m] + depth * kElements;
        }
      const int64_t columns = std::min<int64_t>(kDepth, branch.rank - d * kDepth);
      const bf16* b = branch.b + tile0 * kTile * branch.rank + d * kDepth;
      // A tile reads 32 columns; past the rank those are the next row's, and meet zeros in h. Only where there is no
      // next row must the tile be copied.
      if ((tile0 + N) * kTile <= n - (columns < kDepth ? 2 : 0)) {
        if (d == 0) prefetch(b + N * kTile * branch.rank, N * kTile * branch.rank * static_cast<int64_t>(sizeof(bf16)));
        multiply<N, M>(b, b + kTile * branch.rank, branch.rank * sizeof(bf16), high[0], high[1]);
        multiply<N, M>(b, b + kTile * branch.rank, branch.rank * sizeof(bf16), low[0], low[1]);
      } else {
        for (int t = 0; t < N; ++t)
          copy_tile(b + t * kTile * branch.rank, branch.rank, std::clamp<int64_t>(n - (tile0 + t) * kTile, 0, kTile),
                    columns, staging + t * kElements);
        multiply<N, M>(staging, staging + kElements, kDepth * sizeof(bf16), high[0], high[1]);
        multiply<N, M>(staging, staging + kElements, kDepth * sizeof(bf16), low[0], low[1]);
      }
    }
  }
}

// Writes one accumulator to y as bf16, with the biases added and the scale applied in float32.
void finish(const Job& job, int64_t p, int64_t tile, int64_t row_tile, const float* sums) {
  const LinearCall& c = job.c;
  const Part& part = c.parts[p];
  const int64_t outputs = std::min<int64_t>(kTile, part.n - tile * kTile);
  const int64_t rows = std::min<int64_t>(kTile, c.m - row_tile * kTile);
  alignas(64) float lines[kTile * kTile];
  transpose_sums(sums, lines);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = row_tile * kTile + r;
    float* line = lines + r * kTile;
    for (int64_t i = 0; i < job.num_branches; ++i) {
      const Branch& branch = job.branches[i];
      if (branch.part != p || m < branch.start || m >= branch.stop) continue;
      if (branch.bias != nullptr)
        for (int64_t n = 0; n < outputs; ++n) line[n] += branch.weight * to_float(branch.bias[tile * kTile + n]);
      if (branch.scale != nullptr)
        for (int64_t n = 0; n < outputs; ++n) line[n] *= branch.scale[tile * kTile + n];
    }
    if (part.bias != nullptr)
      for (int64_t n = 0; n < outputs; ++n) line[n] += part.bias[tile * kTile + n];
    bf16* y = c.y + m * c.y_stride + part.column + tile * kTile;
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(line));
    if (outputs == kTile) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), rounded);
      continue;
    }
    for (int64_t n = 0; n < outputs; ++n) y[n] = to_bf16(line[n]);
  }
}

// All rows for N tiles of outputs, beginning with tile0.
template <int N>
void outputs(const Job& job, int64_t p, int64_t tile0, bf16* expanded, bf16* staging, float* sums, const bf16* zero) {
  const LinearCall& c = job.c;
  const Part& part = c.parts[p];
  const int64_t blocks = c.k / kBlock;
  const bool dense = part.dense != nullptr, whole = (tile0 + N) * kTile <= part.n;
  const bool resident = job.row_tiles > 2;  // rows for more than one pass: expand once, use many times
  const int64_t slot = resident ? job.depth * kElements : 0;
  alignas(64) float scale[kTile];
  const auto fetch = [&](int64_t block, bf16* to, int64_t tile_distance) {
    for (int t = 0; t < N; ++t) {
      const int64_t at = (tile0 + t) * blocks + block;
      block_scales(part, tile0 + t, block, blocks, scale);
      expand(part.codes + at * kTile * 32, scale, to + t * tile_distance);
      // The same place in the tiles that come next: a row of tiles ahead is some hundred nanoseconds ahead.
      prefetch(part.codes + (at + N * blocks) * kTile * 32, kTile * 32);
    }
  };
  if (!dense && resident)
    for (int64_t block = 0; block < blocks; ++block) fetch(block, expanded + block * 2 * kElements, slot);
  for (int64_t m0 = 0; m0 < job.row_tiles; m0 += 2) {
    const bool two = m0 + 1 < job.row_tiles;
    const bf16* x0 = job.x + m0 * job.depth * kElements;
    const bf16* x1 = two ? x0 + job.depth * kElements : x0;
    const auto step = [&](const bf16* w0, const bf16* w1, int64_t stride, int64_t d) {
      if (two)
        multiply<N, 2>(w0, w1, stride, x0 + d * kElements, x1 + d * kElements);
      else
        multiply<N, 1>(w0, w1, stride, x0 + d * kElements, nullptr);
    };
    clear();
    if (dense) {
      const bf16* w = part.dense + tile0 * kTile * c.k;
      for (int64_t d = 0; d < job.depth; ++d) {
        if (whole) {
          for (int row = 0; row < N * kTile; ++row) prefetch(w + (N * kTile + row) * c.k + d * kDepth, 64);
          step(w + d * kDepth, w + kTile * c.k + d * kDepth, c.k * sizeof(bf16), d);
        } else {
          for (int t = 0; t < N; ++t)
            copy_tile(w + t * kTile * c.k + d * kDepth, c.k, std::clamp<int64_t>(part.n - (tile0 + t) * kTile, 0, kTile),
                      kDepth, staging + t * kElements);
          step(staging, staging + kElements, kDepth * sizeof(bf16), d);
        }
      }
    } else if (resident) {
      for (int64_t d = 0; d < job.depth; ++d)
        step(expanded + d * kElements, expanded + slot + d * kElements, kDepth * sizeof(bf16), d);
    } else {
      // One block ahead, so that what is expanded has reached the cache when its tile is loaded.
      constexpr int64_t kRing = 2 * N * 2 * kElements;
      fetch(0, expanded, 2 * kElements);
      for (int64_t block = 0; block < blocks; ++block) {
        bf16* now = expanded + (block & 1) * kRing / 2;
        if (block + 1 < blocks) fetch(block + 1, expanded + ((block + 1) & 1) * kRing / 2, 2 * kElements);
        step(now, now + 2 * kElements, kDepth * sizeof(bf16), 2 * block);
        step(now + kElements, now + 3 * kElements, kDepth * sizeof(bf16), 2 * block + 1);
      }
    }
    if (two)
      up<N, 2>(job, p, part.n, tile0, m0, zero, staging);
    else
      up<N, 1>(job, p, part.n, tile0, m0, zero, staging);
    for (int t = 0; t < N; ++t)
      for (int m = 0; m < (two ? 2 : 1); ++m) {
        store(t, m, sums);
        finish(job, p, tile0 + t, m0 + m, sums);
      }
  }
}

void run(void* argument, int thread, int threads) {
  const Job& job = *static_cast<Job*>(argument);
  const LinearCall& c = job.c;
  static thread_local Scratch scratch;
  // staging (4 tiles), zeros (1), sums (1 of float), expanded weights
  bf16* staging = scratch.get<bf16>((4 + 1 + 2 + 8 + 2 * job.depth) * kElements);
  bf16* zero = staging + 4 * kElements;
  float* sums = reinterpret_cast<float*>(zero + kElements);
  bf16* expanded = zero + 3 * kElements;
  std::memset(zero, 0, kElements * sizeof(bf16));
  const Engine engine;
  const Range packing = share(job.row_tiles * job.depth, thread, threads);
  for (int64_t i = packing.begin; i < packing.end; ++i) {
    const int64_t row = i / job.depth * kTile;
    pack_rows(c.x + row * c.x_stride + i % job.depth * kDepth, c.x_stride, std::min<int64_t>(kTile, c.m - row),
              job.x + i * kElements);
  }
  job.pool.barrier();
  if (job.num_branches != 0) {
    int64_t count = 0;
    for (int64_t i = 0; i < job.num_branches; ++i) {
      const Branch& branch = job.branches[i];
      for (int64_t tile = branch.first_tile; tile <= branch.last_tile; ++tile)
        for (int64_t rank0 = 0; rank0 < branch.rank; rank0 += kTile)
          if (count++ % threads == thread) down(job, branch, tile, rank0, staging, sums);
    }
    job.pool.barrier();
  }
  int64_t total = 0;
  for (int64_t p = 0; p < c.num_parts; ++p) total += tiles(c.parts[p].n);
  const Range mine = share(total, thread, threads, 2);
  int64_t before = 0;
  for (int64_t p = 0; p < c.num_parts; ++p) {
    const int64_t count = tiles(c.parts[p].n);
    int64_t tile = std::max<int64_t>(mine.begin - before, 0);
    const int64_t end = std::min(mine.end - before, count);
    for (; tile + 2 <= end; tile += 2) outputs<2>(job, p, tile, expanded, staging, sums, zero);
    if (tile < end) outputs<1>(job, p, tile, expanded, staging, sums, zero);
    before += count;
  }
}

}  // namespace

void linear_amx(Pool& pool, const LinearCall& call) {
  static thread_local Scratch packed, low_rank;
  static thread_local std::unique_ptr<Branch[]> branches;
  static thread_local int64_t room = 0;
  Job job{call, pool, nullptr, nullptr, 0, tiles(call.m), call.k / kDepth};
  if (room < call.num_segments * call.num_parts) {
    room = call.num_segments * call.num_parts;
    branches.reset(new Branch[room]);
  }
  job.branches = branches.get();
  int64_t elements = 0;
  for (int64_t s = 0; s < call.num_segments; ++s) {
    const Segment& segment = call.segments[s];
    for (int64_t p = 0; p < call.num_parts; ++p) {
      const int64_t site = call.parts[p].site;
      if (!segment.changes(site)) continue;
      Branch& branch = job.branches[job.num_branches++];
      branch = {segment.a(site), segment.b(site), segment.bias(site), segment.scale(site), segment.ranks[site],
                segment.start, segment.stop, segment.start / kTile, (segment.stop - 1) / kTile, segment.weight, nullptr, p};
      elements += (branch.last_tile - branch.first_tile + 1) * 2 * branch.depth() * kElements;
    }
  }
  job.x = packed.get<bf16>(job.row_tiles * job.depth * kElements);
  bf16* h = low_rank.get<bf16>(elements + kElements);
  for (int64_t i = 0; i < job.num_branches; ++i) {
    Branch& branch = job.branches[i];
    branch.h = h;
    h += (branch.last_tile - branch.first_tile + 1) * 2 * branch.depth() * kElements;
  }
  pool.run(run, &job);
}

}  // namespace loramux
