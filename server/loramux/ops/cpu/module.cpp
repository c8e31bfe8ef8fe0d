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
#include <memory>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace {

using torch::stable::Tensor;
using namespace loramux;

enum Isa : int64_t { kAvx2 = 0, kAvx512 = 1, kAmx = 2 };
Isa g_isa = kAvx2;
std::unique_ptr<Pool> g_pool;

// Words of a part in `plan`, and of a segment in `segments`.
constexpr int64_t kPartWords = 11, kSegmentWords = 6;

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
  g_isa = static_cast<Isa>(isa);
  if (g_pool == nullptr || g_pool->threads() != threads) g_pool.release(), g_pool.reset(new Pool(static_cast<int>(threads)));
  return true;
}

void linear(Tensor x, Tensor plan, Tensor segments, Tensor y) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::BFloat16 && x.dim() == 2 && x.stride(1) == 1, "x");
  STD_TORCH_CHECK(y.scalar_type() == torch::headeronly::ScalarType::BFloat16 && y.dim() == 2 && y.stride(1) == 1 && y.size(0) == x.size(0), "y");
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<Segment> branches;
  const int64_t* word = static_cast<const int64_t*>(plan.const_data_ptr());
  const int64_t num_parts = plan.numel() / kPartWords;
  parts.resize(num_parts);
  for (int64_t i = 0; i < num_parts; ++i, word += kPartWords) {
    parts[i] = {reinterpret_cast<const uint8_t*>(word[0]), reinterpret_cast<const bf16*>(word[1]),
                reinterpret_cast<const uint8_t*>(word[2]), reinterpret_cast<const float*>(word[3]),
                reinterpret_cast<const float*>(word[4]),   reinterpret_cast<const float*>(word[5]),
                reinterpret_cast<const float*>(word[6]),   float_of(word[7]),
                word[8], word[9], word[10]};
  }
  word = static_cast<const int64_t*>(segments.const_data_ptr());
  const int64_t num_segments = segments.numel() / kSegmentWords;
  branches.resize(num_segments);
  for (int64_t i = 0; i < num_segments; ++i, word += kSegmentWords) {
    branches[i] = {word[0], word[1], float_of(word[2]), reinterpret_cast<const bf16*>(word[3]),
                   reinterpret_cast<const int64_t*>(word[4]), reinterpret_cast<const int32_t*>(word[5])};
  }
  const LinearCall call{static_cast<const bf16*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0),
                        static_cast<bf16*>(y.mutable_data_ptr()), y.stride(0), parts.data(), num_parts,
                        branches.data(), num_segments};
  if (call.m == 0) return;
  switch (g_isa) {
    case kAmx: linear_amx(*g_pool, call); break;
    case kAvx512: linear_avx512(*g_pool, call); break;
    default: linear_avx2(*g_pool, call);
  }
}

template <typename T>
const T* in(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
void check(const Tensor& t, int64_t dims, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::BFloat16 && t.dim() == dims && t.stride(dims - 1) == 1,
                  what, " must be bfloat16 with dense rows");
}

void attention(Tensor q, Tensor k, Tensor v, Tensor cosines, Tensor sines, Tensor keys, Tensor values, Tensor slots,
               Tensor query_starts, Tensor contexts, Tensor tables, Tensor sinks, Tensor y, double scaling,
               double softcap, int64_t window) {
  check(q, 3, "q");
  check(k, 3, "k");
  check(v, 3, "v");
  check(y, 3, "out");
  STD_TORCH_CHECK(q.stride(1) == q.size(2) && k.stride(1) == k.size(2) && v.stride(1) == v.size(2), "heads must be dense");
  const AttentionCall call{in<bf16>(q), in<bf16>(k), in<bf16>(v), q.stride(0), k.stride(0), v.stride(0),
                           in<bf16>(cosines), in<bf16>(sines), out<bf16>(keys), out<bf16>(values), in<int64_t>(slots),
                           in<int32_t>(query_starts), in<int32_t>(contexts), in<int32_t>(tables), out<bf16>(y),
                           q.size(0), q.size(1), k.size(1), q.size(2), v.size(2), keys.size(1), contexts.numel(),
                           tables.stride(0), static_cast<float>(scaling), static_cast<float>(softcap), window,
                           in<float>(sinks)};
  if (call.rows == 0) return;
  switch (g_isa) {
    case kAmx: attention_amx(*g_pool, call); break;
    case kAvx512: attention_avx512(*g_pool, call); break;
    default: attention_avx2(*g_pool, call);
  }
}

void norm(Tensor x, Tensor residual, Tensor weight, double epsilon, Tensor sum, Tensor y) {
  const int64_t width = weight.numel();
  const NormCall call{in<bf16>(x), in<bf16>(residual), in<bf16>(weight), residual.numel() == 0 ? nullptr : out<bf16>(sum),
                      out<bf16>(y), x.numel() / width, width, static_cast<float>(epsilon)};
  switch (g_isa) {
    case kAmx: norm_amx(*g_pool, call); break;
    case kAvx512: norm_avx512(*g_pool, call); break;
    default: norm_avx2(*g_pool, call);
  }
}

void gate(Tensor both, Tensor y) {
  const int64_t width = y.size(y.dim() - 1);
  const GateCall call{in<bf16>(both), out<bf16>(y), y.numel() / width, width};
  switch (g_isa) {
    case kAmx: gate_amx(*g_pool, call); break;
    case kAvx512: gate_avx512(*g_pool, call); break;
    default: gate_avx2(*g_pool, call);
  }
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
}
STABLE_TORCH_LIBRARY_IMPL(loramux_cpu, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
}
STABLE_TORCH_LIBRARY_IMPL(loramux_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("gate", TORCH_BOX(&gate));
}
