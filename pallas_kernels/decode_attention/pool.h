// Pools of cached vectors, and how their codes become float32 numbers, a tile at a time.

#pragma once

#include <cstring>
#include <vector>

#include "native.h"

constexpr int kTile = 32;  // slots that are decoded at once

inline Ints widened(const uint8_t* x) {
#ifdef __AVX512F__  // compilers take the bytes one by one
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#else
  int32_t y[kLanes];
  for (int i = 0; i < kLanes; ++i) y[i] = x[i];
  return *(const Ints*)y;
#endif
}

inline float of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Numbers of a vector whose codes lie in neighbouring bytes: `pallas_kernels.codes.Piece`.
struct Piece {
  int64_t start, width, at, shift, mask, weight, group;
};

enum Kind { kDense, kAffine, kFloat8, kPerChannel };

struct Pool {
  xla::ffi::DataType dtype;
  const char* codes;
  const uint16_t *scale, *zero;  // bfloat16; zero may be null
  int64_t bytes, groups;         // of a slot
  Kind kind;
  int width, run;
  float offset;  // of codes without zero points
  const Piece* pieces;
  int count;

  int lanes() const { return padded(width); }
  bool direct() const { return dtype == xla::ffi::F32 && width % kLanes == 0; }
};

inline float same(float x) { return x; }

inline float of_bfloat16(uint16_t x) { return of_bits(uint32_t(x) << 16); }

// XLA's threads take subnormal numbers for zero: products of codes, which are no such numbers, stand for them.
inline float of_half(uint16_t x) {
  const uint32_t rest = x & 0x7fffu, infinite = rest >= 0x7c00 ? 112u << 23 : 0;
  const uint32_t normal = (rest << 13) + (112u << 23) + infinite;
  const uint32_t small = __builtin_bit_cast(uint32_t, float(int(rest)) * 0x1p-24f);
  return of_bits((rest < 0x400 ? small : normal) | (x & 0x8000u) << 16);
}

inline float of_float8(uint8_t x) {
  const uint32_t rest = x & 0x7fu, normal = rest == 0x7f ? 0x7fc00000u : (rest << 20) + (120u << 23);
  const uint32_t small = __builtin_bit_cast(uint32_t, float(int(rest)) * 0x1p-9f);
  return of_bits((rest < 8 ? small : normal) | (x & 0x80u) << 24);
}

template <class T, float Number(T)>
void convert(const Pool& pool, int64_t slot, int slots, float* __restrict to) {
  auto* __restrict x = reinterpret_cast<const T*>(pool.codes + slot * pool.bytes);
  const int width = pool.width, lanes = pool.lanes();
  if (width == lanes)
    for (int i = 0; i < slots * width; ++i) to[i] = Number(x[i]);
  else
    for (int s = 0; s < slots; ++s)
      for (int i = 0; i < width; ++i) to[s * lanes + i] = Number(x[s * width + i]);
}

// What a piece adds to the numbers of neighbouring slots. `Bytes`: a code is a byte; `Higher`: the piece is added to a
// plane of lower bits. `scale` and `zero` are those of the piece's group, `groups` apart.
template <int Width, bool Bytes, bool Higher>
void unpack(const Pool& pool, const Piece& piece, int64_t slot, int slots, const float* scale, const float* zero,
            int64_t groups, float* __restrict to) {
  const int width = Width ? Width : piece.width, shift = piece.shift, mask = piece.mask, lanes = pool.lanes();
  const int64_t bytes = pool.bytes;
  const float weight = piece.weight;
  auto* codes = reinterpret_cast<const uint8_t*>(pool.codes) + slot * bytes + piece.at;
  for (float* x = to + piece.start; slots-- > 0; x += lanes, codes += bytes, scale += groups, zero += groups) {
    const float factor = Higher ? *scale * weight : *scale, added = *zero;
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Ints code = Bytes ? widened(codes + i) : widened(codes + i) >> shift & mask;
      const Lanes number = __builtin_convertvector(code, Lanes) * factor;
      *(Lanes*)(x + i) = number + (Higher ? *(const Lanes*)(x + i) : Lanes{} + added);
    }
    for (; i < width; ++i) x[i] = float(codes[i] >> shift & mask) * factor + (Higher ? x[i] : added);
  }
}

template <bool Bytes, bool Higher>
auto unpack_of(int64_t width) {
  return width == 16   ? unpack<16, Bytes, Higher>
         : width == 32 ? unpack<32, Bytes, Higher>
         : width == 64 ? unpack<64, Bytes, Higher>
                       : unpack<0, Bytes, Higher>;
}

// Numbers of neighbouring slots from codes with scales, a tile at most.
inline void unpack_all(const Pool& pool, int64_t slot, int slots, float* to) {
  const int64_t groups = pool.run ? 1 : pool.groups, n = pool.run ? slots : slots * groups;
  static thread_local std::vector<float> scale, zero;  // of the tile's groups, which lie one after the other
  scale.resize(kTile * groups), zero.resize(kTile * groups);
  if (pool.run) {
    std::fill_n(scale.data(), n, 1.0f), std::fill_n(zero.data(), n, 0.0f);  // channels have theirs
  } else {
    float *__restrict s = scale.data(), *__restrict z = zero.data();
    for (int64_t i = 0; i < n; ++i) s[i] = of_bfloat16(pool.scale[slot * groups + i]);
    if (pool.zero)
      for (int64_t i = 0; i < n; ++i) z[i] = of_bfloat16(pool.zero[slot * groups + i]);
    else
      for (int64_t i = 0; i < n; ++i) z[i] = s[i] * pool.offset;
  }
  for (const Piece* piece = pool.pieces; piece < pool.pieces + pool.count; ++piece) {
    auto run = piece->mask == 255   ? unpack_of<true, false>(piece->width)
               : piece->weight == 1 ? unpack_of<false, false>(piece->width)
                                    : unpack_of<false, true>(piece->width);
    run(pool, *piece, slot, slots, scale.data() + piece->group, zero.data() + piece->group, groups, to);
  }
}

// Numbers of neighbouring slots, `[slots lanes]`. The processor would wait for the next codes while it computes.
inline void decode(const Pool& pool, int64_t slot, int slots, float* to) {
  auto ask = [&](const void* array, int64_t bytes) {
    const char* next = static_cast<const char*>(array) + (slot + slots) * bytes;
    for (int64_t i = 0; i < slots * bytes; i += 64) __builtin_prefetch(next + i);
  };
  ask(pool.codes, pool.bytes);
  if (pool.scale) ask(pool.scale, 2 * pool.groups);
  if (pool.zero) ask(pool.zero, 2 * pool.groups);
  const int lanes = pool.lanes();
  if (pool.kind == kDense) {
    (pool.dtype == xla::ffi::F32    ? convert<float, same>(pool, slot, slots, to)
     : pool.dtype == xla::ffi::BF16 ? convert<uint16_t, of_bfloat16>(pool, slot, slots, to)
                               : convert<uint16_t, of_half>(pool, slot, slots, to));
  } else if (pool.kind == kFloat8) {
    convert<uint8_t, of_float8>(pool, slot, slots, to);
    for (int s = 0; s < slots; ++s)
      for (int i = 0; i < lanes; ++i) to[s * lanes + i] *= of_bfloat16(pool.scale[slot + s]);
  } else {
    unpack_all(pool, slot, slots, to);
  }
  if (pool.kind != kPerChannel) return;
  for (int s = 0; s < slots; ++s)  // channel c has its scale in column c / run of the run's slot c % run
    for (int c = 0; c < pool.width; ++c) {
      const int64_t at = ((slot + s) / pool.run * pool.run + c % pool.run) * pool.groups + c / pool.run;
      float& x = to[s * lanes + c];
      x = x * of_bfloat16(pool.scale[at]) + of_bfloat16(pool.zero[at]);
    }
}
