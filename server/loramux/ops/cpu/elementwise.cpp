// Row-wise operations, compiled once for each instruction set; loops that the compiler vectorizes.
//
// A row is computed by one thread in one order, so it does not depend on the other rows.

#include "elementwise.h"

#include <cmath>

#include "common.h"

namespace loramux {
namespace {

constexpr int kLanes = 16;
// Below this many elements one thread is done before another has woken up.
constexpr int64_t kWorthSharing = 1 << 13;

void norm_rows(const NormCall& c, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const bf16* x = c.x + r * c.width;
    if (c.residual != nullptr) {
      const bf16* residual = c.residual + r * c.width;
      bf16* sum = c.sum + r * c.width;
      // `sum` may be x itself, element for element.
#pragma GCC ivdep
      for (int64_t i = 0; i < c.width; ++i) sum[i] = to_bf16(to_float(x[i]) + to_float(residual[i]));
      x = sum;
    }
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= c.width; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lanes[j] += to_float(x[i + j]) * to_float(x[i + j]);
    for (; i < c.width; ++i) lanes[0] += to_float(x[i]) * to_float(x[i]);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    const float scale = 1.0f / std::sqrt(lanes[0] / static_cast<float>(c.width) + c.epsilon);
    bf16* y = c.y + r * c.width;
    for (i = 0; i < c.width; ++i) y[i] = to_bf16(to_float(c.weight[i]) * to_float(to_bf16(to_float(x[i]) * scale)));
  }
}

// e^-|x| keeps the exponential's argument where it is accurate; both signs follow from it.
inline float sigmoid(float x) {
  const float e = exponential(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

void gate_rows(const GateCall& c, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const bf16 *gate = c.both + r * 2 * c.width, *up = gate + c.width;
    bf16* y = c.y + r * c.width;
    for (int64_t i = 0; i < c.width; ++i) {
      const float g = to_float(gate[i]);
      y[i] = to_bf16(to_float(to_bf16(g * sigmoid(g))) * to_float(up[i]));
    }
  }
}

template <typename Call, void (*rows)(const Call&, int64_t, int64_t)>
void spread(Pool& pool, const Call& call) {
  if (call.rows * call.width < kWorthSharing) {
    rows(call, 0, call.rows);
    return;
  }
  const auto task = [](void* argument, int thread, int threads) {
    const Call& c = *static_cast<const Call*>(argument);
    const Range mine = share(c.rows, thread, threads);
    rows(c, mine.begin, mine.end);
  };
  pool.run(task, const_cast<Call*>(&call));
}

}  // namespace

void LORAMUX_JOIN(norm_, LORAMUX_SET)(Pool& pool, const NormCall& call) { spread<NormCall, norm_rows>(pool, call); }
void LORAMUX_JOIN(gate_, LORAMUX_SET)(Pool& pool, const GateCall& call) { spread<GateCall, gate_rows>(pool, call); }

}  // namespace loramux
