// The operations as torch sees them, on torch's stable ABI: one library serves every torch from 2.10 on.
//
// Addresses travel in int64 tensors that Python builds once (weights) or once a step (segments): see backend.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "decoder.h"

namespace {

using torch::stable::Tensor;
using namespace loramux;

enum Isa : int64_t { kAvx2 = 0, kAvx512 = 1, kAmx = 2 };
constexpr Kernels kKernels[] = {{linear_avx2, attention_avx2, norm_avx2, gate_avx2},
                                {linear_avx512, attention_avx512, norm_avx512, gate_avx512},
                                {linear_amx, attention_amx, norm_amx, gate_amx}};
const Kernels* g_kernels = kKernels;
Pool* g_pool = nullptr;  // never deleted: its threads may still look at it while the process ends

// Words of a part, of a segment, and of what a decoder layer has besides its seven parts.
constexpr int64_t kPartWords = 11, kSegmentWords = 6, kLayerWords = 8;

float float_of(int64_t word) {
  const uint32_t bits = static_cast<uint32_t>(word);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool configure(int64_t isa, int64_t threads) {
  if (isa == kAmx) {
    // The kernel hands out the tile registers' state only to processes that ask for it.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  }
  g_kernels = kKernels + isa;
  if (g_pool == nullptr || g_pool->threads() != threads) g_pool = new Pool(static_cast<int>(threads));
  return true;
}

template <typename T>
T* pointer(int64_t word) {
  return reinterpret_cast<T*>(word);
}

Part part(const int64_t* word) {
  return {pointer<const uint8_t>(word[0]), pointer<const bf16>(word[1]), pointer<const uint8_t>(word[2]),
          pointer<const float>(word[3]), pointer<const float>(word[4]), pointer<const float>(word[5]),
          pointer<const float>(word[6]), float_of(word[7]), word[8], word[9], word[10]};
}

// The segments of a step; valid until this thread asks again.
const std::vector<Segment>& segments_of(const Tensor& table) {
  static thread_local std::vector<Segment> segments;
  segments.resize(table.numel() / kSegmentWords);
  const int64_t* word = static_cast<const int64_t*>(table.const_data_ptr());
  for (Segment& segment : segments) {
    segment = {word[0], word[1], float_of(word[2]), pointer<const bf16>(word[3]), pointer<const int64_t>(word[4]),
               pointer<const int32_t>(word[5])};
    word += kSegmentWords;
  }
  return segments;
}

template <typename T>
const T* in(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
// Whether steps along a dimension are of `stride` elements. One of size 1 has no steps, and torch gives it any stride.
bool strided(const Tensor& t, int64_t dimension, int64_t stride) {
  return t.size(dimension) <= 1 || t.stride(dimension) == stride;
}
void check(const Tensor& t, int64_t dims, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::BFloat16 && t.dim() == dims && strided(t, dims - 1, 1),
                  what, " must be bfloat16 with dense rows");
}
// A matrix [rows, width] whose rows follow each other.
void check_matrix(const Tensor& t, int64_t width, const char* what) {
  check(t, 2, what);
  STD_TORCH_CHECK(t.size(1) == width && strided(t, 0, width), what, " must have dense rows of ", width);
}
void check_heads(int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim) {
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " heads cannot share ", kv_heads, " key-value heads evenly");
  STD_TORCH_CHECK(dim <= kWidestHead && value_dim <= kWidestHead, "heads may be ", kWidestHead, " wide at most");
}

void linear(Tensor x, Tensor plan, Tensor segments, Tensor y) {
  check(x, 2, "x");
  check(y, 2, "y");
  STD_TORCH_CHECK(y.size(0) == x.size(0), "x and y must have the same rows");
  if (x.size(0) == 0) return;
  static thread_local std::vector<Part> parts;
  parts.resize(plan.numel() / kPartWords);
  for (size_t i = 0; i < parts.size(); ++i) parts[i] = part(in<int64_t>(plan) + i * kPartWords);
  const std::vector<Segment>& branches = segments_of(segments);
  g_kernels->linear(*g_pool, {in<bf16>(x), x.size(0), x.size(1), x.stride(0), out<bf16>(y), y.stride(0), parts.data(),
                              static_cast<int64_t>(parts.size()), branches.data(), static_cast<int64_t>(branches.size())});
}

void attention(Tensor q, Tensor k, Tensor v, Tensor cosines, Tensor sines, Tensor keys, Tensor values, Tensor slots,
               Tensor query_starts, Tensor contexts, Tensor tables, Tensor sinks, Tensor y, double scaling,
               double softcap, int64_t window) {
  check(q, 3, "q");
  check(k, 3, "k");
  check(v, 3, "v");
  check(y, 3, "out");
  STD_TORCH_CHECK(strided(q, 1, q.size(2)) && strided(k, 1, k.size(2)) && strided(v, 1, v.size(2)), "heads must be dense");
  check_heads(q.size(1), k.size(1), q.size(2), v.size(2));
  if (cosines.numel() != 0) {
    check_matrix(cosines, q.size(2), "cosines");
    check_matrix(sines, q.size(2), "sines");
  }
  const AttentionCall call{in<bf16>(q), in<bf16>(k), in<bf16>(v), q.stride(0), k.stride(0), v.stride(0),
                           in<bf16>(cosines), in<bf16>(sines), out<bf16>(keys), out<bf16>(values), in<int64_t>(slots),
                           in<int32_t>(query_starts), in<int32_t>(contexts), in<int32_t>(tables), out<bf16>(y),
                           q.size(0), q.size(1), k.size(1), q.size(2), v.size(2), keys.size(2), contexts.numel(),
                           tables.stride(0), static_cast<float>(scaling), static_cast<float>(softcap), window,
                           in<float>(sinks)};
  if (call.rows == 0) return;
  g_kernels->attention(*g_pool, call);
}

void norm(Tensor x, Tensor residual, Tensor weight, double epsilon, Tensor sum, Tensor y) {
  const int64_t width = weight.numel();
  check_matrix(x, width, "x");
  if (residual.numel() != 0) check_matrix(residual, width, "residual");
  const NormCall call{in<bf16>(x), in<bf16>(residual), in<bf16>(weight), residual.numel() == 0 ? nullptr : out<bf16>(sum),
                      out<bf16>(y), x.numel() / width, width, static_cast<float>(epsilon)};
  g_kernels->norm(*g_pool, call);
}

void gate(Tensor both, Tensor y) {
  const int64_t width = y.size(y.dim() - 1);
  check_matrix(both, 2 * width, "both");
  const GateCall call{in<bf16>(both), out<bf16>(y), y.numel() / width, width};
  g_kernels->gate(*g_pool, call);
}

void decoder(Tensor x, Tensor plan, Tensor segments, Tensor cosines, Tensor sines, Tensor slots, Tensor query_starts,
             Tensor contexts, Tensor tables, int64_t heads, int64_t kv_heads, int64_t dim, int64_t inner,
             int64_t block_size) {
  check_matrix(x, x.size(1), "x");
  check_matrix(cosines, dim, "cosines");
  check_matrix(sines, dim, "sines");
  check_heads(heads, kv_heads, dim, dim);
  if (x.size(0) == 0) return;
  constexpr int64_t kWords = 7 * kPartWords + kLayerWords;
  static thread_local std::vector<Layer> layers;
  layers.resize(plan.numel() / kWords);
  const int64_t* word = in<int64_t>(plan);
  for (Layer& layer : layers) {
    Part parts[7];
    for (Part& p : parts) p = part(word), word += kPartWords;
    layer = {{parts[0], parts[1], parts[2]}, parts[3], {parts[4], parts[5]}, parts[6],
             pointer<const bf16>(word[0]), pointer<const bf16>(word[1]), float_of(word[2]), float_of(word[3]),
             pointer<bf16>(word[4]), pointer<bf16>(word[5]), word[6], float_of(word[7])};
    word += kLayerWords;
  }
  AttentionCall attention{};
  attention.cosines = in<bf16>(cosines);
  attention.sines = in<bf16>(sines);
  attention.slots = in<int64_t>(slots);
  attention.query_starts = in<int32_t>(query_starts);
  attention.contexts = in<int32_t>(contexts);
  attention.tables = in<int32_t>(tables);
  attention.rows = x.size(0);
  attention.heads = heads;
  attention.kv_heads = kv_heads;
  attention.dim = attention.value_dim = dim;
  attention.block_size = block_size;
  attention.sequences = contexts.numel();
  attention.table_stride = tables.stride(0);
  const std::vector<Segment>& branches = segments_of(segments);
  decode(*g_kernels, *g_pool, {out<bf16>(x), x.size(0), x.size(1), inner, layers.data(),
                               static_cast<int64_t>(layers.size()), branches.data(),
                               static_cast<int64_t>(branches.size()), attention});
}

}  // namespace

STABLE_TORCH_LIBRARY(loramux_cpu, m) {
  m.def("configure(int isa, int threads) -> bool");
  m.def("linear(Tensor x, Tensor plan, Tensor segments, Tensor(a!) y) -> ()");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cosines, Tensor sines, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor slots, Tensor query_starts, Tensor contexts, Tensor tables, Tensor sinks, Tensor(c!) y, float scaling, "
      "float softcap, int window) -> ()");
  m.def("norm(Tensor x, Tensor residual, Tensor weight, float epsilon, Tensor(a!) sum, Tensor(b!) y) -> ()");
  m.def("gate(Tensor both, Tensor(a!) y) -> ()");
  m.def(
      "decoder(Tensor(a!) x, Tensor plan, Tensor segments, Tensor cosines, Tensor sines, Tensor slots, "
      "Tensor query_starts, Tensor contexts, Tensor tables, int heads, int kv_heads, int dim, int inner, "
      "int block_size) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(loramux_cpu, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}
STABLE_TORCH_LIBRARY_IMPL(loramux_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("decoder", TORCH_BOX(&decoder));
}
