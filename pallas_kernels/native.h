// What kernels in C++ share: vectors of 16 numbers, the exponential, XLA's threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

constexpr float kEmpty = -1e30f;  // the logit of a slot or token that is not there
constexpr int kLanes = 16;

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

inline int padded(int width) { return (width + kLanes - 1) / kLanes * kLanes; }

// The larger one; the second, where one of them is no number.
inline Lanes larger(Lanes a, Lanes b) {
#ifdef __AVX512F__  // compilers compare, and then choose
  return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Powers of 2 to what is at most 64 (the polynomial of least relative error, 7.5e-8), at least 2^-126 or so.
inline Lanes exp2_(Lanes x) {
  x = larger(Lanes{} - 126.0f, x);
  const Lanes rounded = x + 12582912.0f;  // 1.5 x 2^23: the integer is in its last bits
  x = x - (rounded - 12582912.0f);
  Lanes y = Lanes{} + 1.32764720e-3f;
  for (float c : {9.67554133e-3f, 5.55071327e-2f, 2.40221197e-1f, 6.93146967e-1f, 1.00000007f})
    y = y * x + c;
  return y * (Lanes)(((Ints)rounded << 23) + (127 << 23));
}

constexpr float kLog2 = 1.44269504f;  // of e

// tanh, a rational function (Eigen's, 2 units in the last place).
inline Lanes tanh_(Lanes x) {
  x = x > 7.90531110f ? Lanes{} + 7.90531110f : x < -7.90531110f ? Lanes{} - 7.90531110f : x;
  const Lanes y = x * x;
  Lanes above = Lanes{} - 2.76076847742355e-16f, below = Lanes{} + 1.19825839466702e-06f;
  for (float c : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f, 1.48572235717979e-05f,
                  6.37261928875436e-04f, 4.89352455891786e-03f})
    above = above * y + c;
  for (float c : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f}) below = below * y + c;
  return x * above / below;
}

template <int D, int... I>
inline void exchange(Lanes& a, Lanes& b, std::integer_sequence<int, I...>) {
  const Lanes x = __builtin_shufflevector(a, b, (I & D ? I - D + kLanes : I)...);
  const Lanes y = __builtin_shufflevector(a, b, (I & D ? I + kLanes : I + D)...);
  a = x, b = y;
}

// Blocks of N x N numbers transposed, each of N neighbouring lanes of N vectors.
template <int N, int D = 1>
inline void transpose(Lanes (&x)[N]) {
  for (int i = 0; i < N; ++i)
    if (!(i & D)) exchange<D>(x[i], x[i + D], std::make_integer_sequence<int, kLanes>());
  if constexpr (2 * D < N) transpose<N, 2 * D>(x);
}

inline float sum(Lanes x) {
  float all = 0;
  for (int i = 0; i < kLanes; ++i) all += x[i];
  return all;
}

// Work that threads share, item by item. Those that come too late find nothing to do, but may still look.
template <class Call>
void share(xla::ffi::ThreadPool& threads, std::shared_ptr<Call> call, int64_t items, int64_t helpers) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [call, state, items] {
    if (state->next.load() >= items) return;
    auto room = call->room();
    for (int64_t i; (i = state->next.fetch_add(1)) < items; state->done.fetch_add(1)) call->run(i, room);
  };
  for (int64_t i = 0; i < std::min({helpers, threads.num_threads() - 1, items - 1}); ++i) threads.Schedule([work] { work(); });
  work();
  while (state->done.load() < items) std::this_thread::yield();
}
