// Products with codes that are never scaled: with number = code x scale + zero,
//
//   q . key      = scale (q . codes) + zero (sum of q)      once per slot and group
//   sum p value  = sum (p scale) codes + sum p zero         likewise
//
// Slots are the lanes of keys: 16 of them are transposed as they lie, four bytes to a number, and one mask then takes the
// codes of a number out of all 16. No sum goes across lanes. Bits are masked in place; powers of 2 are put right elsewhere.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_attention/pool.h"

typedef float Half __attribute__((vector_size(2 * kLanes), aligned(4)));
typedef float Quarter __attribute__((vector_size(kLanes), aligned(4)));

// Whether codes are multiplied as they are; else they become numbers first.
inline bool packed(const Pool& pool, int width) {
  return pool.kind == kAffine && pool.bytes % sizeof(Quarter) == 0 &&
         std::all_of(pool.pieces, pool.pieces + pool.count,
                     [=](const Piece& piece) { return piece.at % width == 0 && piece.width % width == 0; });
}

// Numbers of all pieces: those of several planes count more than once.
inline int64_t parts(const Pool& pool) {
  int64_t all = 0;
  for (int i = 0; i < pool.count; ++i) all += pool.pieces[i].width;
  return all;
}

// Scales and zero points of at most 16 slots, `[groups]`; zeros behind them.
inline void lines(const Pool& pool, int64_t slot, int slots, Lanes* scale, Lanes* zero) {
  const int64_t groups = pool.groups;
  auto read = [&](const uint16_t* from, Lanes* to) {
    from += slot * groups;
    if (groups == 2 && slots == kLanes) {
      const Ints pairs = *(const Ints*)from;
      to[0] = (Lanes)(pairs << 16), to[1] = (Lanes)(pairs >> 16 << 16);
    } else {
      std::fill_n(to, groups, Lanes{});
      for (int s = 0; s < slots; ++s)
        for (int i = 0; i < groups; ++i) ((float*)(to + i))[s] = of_bfloat16(from[s * groups + i]);
    }
  };
  read(pool.scale, scale);
  if (pool.zero) return read(pool.zero, zero);
  for (int i = 0; i < groups; ++i) zero[i] = scale[i] * pool.offset;
}

// Lanes of W numbers of a slot each: after each other before, side by side after it.
template <int W>
inline void transpose_part(const char* codes, int64_t bytes, int slots, Lanes* to) {
  auto row = [&](int s) { return codes + std::min(s, slots - 1) * bytes; };
  auto pair = [&](int s) {
    return __builtin_shufflevector(*(const Quarter*)row(s), *(const Quarter*)row(s + 4), 0, 1, 2, 3, 4, 5, 6, 7);
  };
  auto join = [](Half a, Half b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  };
  Lanes x[W];
  for (int i = 0; i < W; ++i) {
    if constexpr (W == 16) x[i] = *(const Lanes*)row(i);
    if constexpr (W == 8) x[i] = join(*(const Half*)row(i), *(const Half*)row(i + 8));
    if constexpr (W == 4) x[i] = join(pair(i), pair(i + 8));
  }
  transpose(x);
  for (int i = 0; i < W; ++i) to[i] = x[i];
}

// Codes of at most 16 slots, four bytes of each to a vector.
inline void transpose_codes(const Pool& pool, int64_t slot, int slots, Lanes* to) {
  const char* codes = pool.codes + slot * pool.bytes;
  for (int64_t i = 0, n = pool.bytes / 4; i < n;) {
    const char* at = codes + 4 * i;
    if (n - i >= 16) transpose_part<16>(at, pool.bytes, slots, to + i), i += 16;
    else if (n - i >= 8) transpose_part<8>(at, pool.bytes, slots, to + i), i += 8;
    else transpose_part<4>(at, pool.bytes, slots, to + i), i += 4;
  }
}

// A query as keys' pieces meet it, and its sums over groups.
inline void meet(const Pool& pool, const float* q, float* to, float* sums) {
  std::fill_n(sums, pool.groups, 0.0f);
  for (const Piece* piece = pool.pieces; piece < pool.pieces + pool.count; ++piece)
    for (int i = 0; i < piece->width; ++i, ++to) {
      const int place = std::min(i % 4, 2) * 8 + int(piece->shift);  // the highest byte is moved down: it has the sign
      *to = q[piece->start + i] * std::ldexp(float(piece->weight), -place);
      if (piece->weight == 1) sums[piece->group] += q[piece->start + i];
    }
}

// Products of G queries, `stride` and `groups` apart, and 16 slots.
template <int G>
inline void score_codes(const Pool& pool, const Lanes* codes, const float* q, int64_t stride, const float* sums,
                        const Lanes* scale, const Lanes* zero, Lanes* to) {
  for (int g = 0; g < G; ++g) to[g] = Lanes{};
  for (const Piece* piece = pool.pieces; piece < pool.pieces + pool.count; q += piece++->width) {
    const Ints low = Ints{} + int32_t(piece->mask << piece->shift), middle = low << 8, high = low << 16;
    Lanes sum[G][4] = {};
    for (int i = 0; i < piece->width; i += 4) {
      const Ints x = (Ints)codes[(piece->at + i) / 4];
      const Lanes code[4] = {__builtin_convertvector(x & low, Lanes), __builtin_convertvector(x & middle, Lanes),
                             __builtin_convertvector(x & high, Lanes), __builtin_convertvector(x >> 8 & high, Lanes)};
      for (int g = 0; g < G; ++g)
        for (int j = 0; j < 4; ++j) sum[g][j] += q[g * stride + i + j] * code[j];
    }
    for (int g = 0; g < G; ++g) to[g] += (sum[g][0] + sum[g][1] + (sum[g][2] + sum[g][3])) * scale[piece->group];
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < pool.groups; ++i) to[g] += sums[g * pool.groups + i] * zero[i];
}

// Codes of a tile, weighted and added to G sums, `stride` apart; weights of a group are `kTile`, those of heads `line` apart.
template <int G, int N>
inline void add_part(const uint8_t* codes, int64_t bytes, int slots, Ints mask, const float* weight, int64_t line,
                     float* to, int64_t stride) {
  Lanes sum[G][N];
  for (int g = 0; g < G; ++g)
    for (int j = 0; j < N; ++j) sum[g][j] = *(const Lanes*)(to + g * stride + j * kLanes);
  for (int s = 0; s < slots; ++s)
    for (int j = 0; j < N; ++j) {
      const Lanes code = __builtin_convertvector(widened(codes + s * bytes + j * kLanes) & mask, Lanes);
      for (int g = 0; g < G; ++g) sum[g][j] += weight[g * line + s] * code;
    }
  for (int g = 0; g < G; ++g)
    for (int j = 0; j < N; ++j) *(Lanes*)(to + g * stride + j * kLanes) = sum[g][j];
}

template <int G>
inline void add_codes(const Pool& pool, int64_t slot, int slots, const float* weight, float* to, int64_t stride) {
  const uint8_t* codes = (const uint8_t*)pool.codes + slot * pool.bytes;
  for (const Piece* piece = pool.pieces; piece < pool.pieces + pool.count; to += piece++->width) {
    const Ints mask = Ints{} + int32_t(piece->mask << piece->shift);
    auto part = [&](int i, auto vectors) {
      add_part<G, decltype(vectors)::value>(codes + piece->at + i, pool.bytes, slots, mask,
                                            weight + piece->group * kTile, pool.groups * kTile, to + i, stride);
    };
    int i = 0;
    for (; i + 4 * kLanes <= piece->width; i += 4 * kLanes) part(i, std::integral_constant<int, 4>());
    for (; i + 2 * kLanes <= piece->width; i += 2 * kLanes) part(i, std::integral_constant<int, 2>());
    for (; i < piece->width; i += kLanes) part(i, std::integral_constant<int, 1>());
  }
}

// Values from what their pieces came to, and from the sums of zero points.
inline void assemble(const Pool& pool, const float* sums, const Lanes* zeros, float* to) {
  std::fill_n(to, pool.lanes(), 0.0f);
  for (const Piece* piece = pool.pieces; piece < pool.pieces + pool.count; sums += piece++->width) {
    const float factor = std::ldexp(float(piece->weight), -int(piece->shift));
    const float zero = piece->weight == 1 ? sum(zeros[piece->group]) : 0;
    for (int i = 0; i < piece->width; ++i) to[piece->start + i] += sums[i] * factor + zero;
  }
}
