// Decode attention on CPUs: `reference.attend` over one part, for XLA's foreign function interface.
//
// Rows are cut into blocks of slots, and threads take one block after the other, so that rows cost what they hold.
// Codes become float32 numbers a tile at a time, which stay in the first cache; dense float32 is read where it lies.
// A row's blocks are merged by whoever finishes its last one, in their order: results do not depend on the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr float kEmpty = -1e30f;  // the logit of a slot that is not there
constexpr int kBlock = 256;       // slots that a thread takes at once
constexpr int kTile = 32;         // slots that are decoded at once
constexpr int kLanes = 16;
constexpr int64_t kShare = 64 << 10;  // bytes that are worth another thread

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Ints widened(const uint8_t* x) {
#ifdef __AVX512F__  // compilers take the bytes one by one
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#else
  int32_t y[kLanes];
  for (int i = 0; i < kLanes; ++i) y[i] = x[i];
  return *(const Ints*)y;
#endif
}

int padded(int width) { return (width + kLanes - 1) / kLanes * kLanes; }

float of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Numbers of a vector whose codes lie in neighbouring bytes: `pallas_kernels.codes.Piece`.
struct Piece {
  int64_t start, width, at, shift, mask, weight, group;
};

enum Kind { kDense, kAffine, kFloat8, kPerChannel };

struct Pool {
  ffi::DataType dtype;
  const char* codes;
  const uint16_t *scale, *zero;  // bfloat16; zero may be null
  int64_t bytes, groups;         // of a slot
  Kind kind;
  int width, run;
  float offset;  // of codes without zero points
  const Piece* pieces;
  int count;

  int lanes() const { return padded(width); }
  bool direct() const { return dtype == ffi::F32 && width % kLanes == 0; }
};

float same(float x) { return x; }

float of_bfloat16(uint16_t x) { return of_bits(uint32_t(x) << 16); }

// XLA's threads take subnormal numbers for zero: products of codes, which are no such numbers, stand for them.
float of_half(uint16_t x) {
  const uint32_t rest = x & 0x7fffu, infinite = rest >= 0x7c00 ? 112u << 23 : 0;
  const uint32_t normal = (rest << 13) + (112u << 23) + infinite;
  const uint32_t small = __builtin_bit_cast(uint32_t, float(int(rest)) * 0x1p-24f);
  return of_bits((rest < 0x400 ? small : normal) | (x & 0x8000u) << 16);
}

float of_float8(uint8_t x) {
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
void unpack_all(const Pool& pool, int64_t slot, int slots, float* to) {
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
void decode(const Pool& pool, int64_t slot, int slots, float* to) {
  auto ask = [&](const void* array, int64_t bytes) {
    const char* next = static_cast<const char*>(array) + (slot + slots) * bytes;
    for (int64_t i = 0; i < slots * bytes; i += 64) __builtin_prefetch(next + i);
  };
  ask(pool.codes, pool.bytes);
  if (pool.scale) ask(pool.scale, 2 * pool.groups);
  if (pool.zero) ask(pool.zero, 2 * pool.groups);
  const int lanes = pool.lanes();
  if (pool.kind == kDense) {
    (pool.dtype == ffi::F32    ? convert<float, same>(pool, slot, slots, to)
     : pool.dtype == ffi::BF16 ? convert<uint16_t, of_bfloat16>(pool, slot, slots, to)
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

// Products of G queries and the keys of a tile, four keys at once.
template <int G>
void score(const float* q, const float* keys, int slots, int lanes, float* to, int stride) {
  for (int s = 0; s < slots; s += 4) {
    const int n = std::min(4, slots - s);
    const float* key[4];
    for (int j = 0; j < 4; ++j) key[j] = keys + (s + std::min(j, n - 1)) * int64_t(lanes);
    Lanes sum[G][4] = {};
    for (int i = 0; i < lanes; i += kLanes)
      for (int g = 0; g < G; ++g)
        for (int j = 0; j < 4; ++j)
          sum[g][j] += *(const Lanes*)(q + g * lanes + i) * *(const Lanes*)(key[j] + i);
    for (int g = 0; g < G; ++g) {
      auto pairs = [](Lanes a, Lanes b) {
        return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
      };
      const Lanes a = pairs(sum[g][0], sum[g][1]), b = pairs(sum[g][2], sum[g][3]);
      const Lanes all = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      for (int j = 0; j < n; ++j) to[g * stride + s + j] = all[j] + all[j + 4] + all[j + 8] + all[j + 12];
    }
  }
}

// The values of a tile, weighted and added to G sums.
template <int G>
void add(const float* weight, int stride, const float* values, int slots, int lanes, float* to) {
  auto part = [&](int i, auto parts) {
    constexpr int N = decltype(parts)::value;
    Lanes sum[G][N];
    for (int g = 0; g < G; ++g)
      for (int j = 0; j < N; ++j) sum[g][j] = *(const Lanes*)(to + g * lanes + i + j * kLanes);
    for (int s = 0; s < slots; ++s)
      for (int g = 0; g < G; ++g)
        for (int j = 0; j < N; ++j)
          sum[g][j] += weight[g * stride + s] * *(const Lanes*)(values + s * int64_t(lanes) + i + j * kLanes);
    for (int g = 0; g < G; ++g)
      for (int j = 0; j < N; ++j) *(Lanes*)(to + g * lanes + i + j * kLanes) = sum[g][j];
  };
  int i = 0;
  for (; i + 4 * kLanes <= lanes; i += 4 * kLanes) part(i, std::integral_constant<int, 4>());
  for (; i < lanes; i += kLanes) part(i, std::integral_constant<int, 1>());
}

// `run(g, constant G)` for all heads of a group, four at a time.
template <class F>
void by_fours(int heads, F run) {
  int g = 0;
  for (; g + 4 <= heads; g += 4) run(g, std::integral_constant<int, 4>());
  if (heads - g == 3) run(g, std::integral_constant<int, 3>());
  if (heads - g == 2) run(g, std::integral_constant<int, 2>());
  if (heads - g == 1) run(g, std::integral_constant<int, 1>());
}

// exp of what is not positive (Cephes' polynomial, 1 unit in the last place).
inline Lanes exp_(Lanes x) {
  x = x > -87.0f ? x : Lanes{} - 87.0f;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Lanes k = __builtin_convertvector(n, Lanes);
  x = x - k * 0.693359375f + k * 2.12194440e-4f;
  Lanes y = Lanes{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * x + c;
  return (y * x * x + x + 1.0f) * (Lanes)((n + 127) << 23);
}

struct Item {
  int row, first, end;  // slots
};

// All that a call is about; threads that come too late find nothing to do, but may still look.
struct Call {
  int heads, page, pages, size;  // query heads of a row, slots of a page, pages of a row, of the pool
  float scale, cap;
  Pool key, value;
  std::vector<float> q;  // [rows heads lanes]
  const int32_t *table, *length, *pos, *place, *after;  // the last three may be null
  const bool* slots;                                    // null = all
  const float *cos, *sin;                               // of places, by which keys are turned; null = they are not
  int half;                                             // pairs of numbers that turn
  float *o, *l, *m, *logits;                            // the last may be null
  std::vector<Item> items;
  std::vector<int> begin;                        // first item of each row, and their number
  std::vector<float> partial;                    // [items heads (m, l, o[lanes])]
  std::unique_ptr<std::atomic<int>[]> unfinished;  // items of each row
  std::atomic<int> next{0}, done{0};

  int capacity() const { return pages * page; }
  int stride() const { return 2 + value.lanes(); }

  // `run(slot, physical slot, slots)` for the tiles of a block.
  template <class F>
  void tiles(const Item& item, F run) const {
    for (int s = item.first; s < item.end;) {
      const int offset = s % page, n = std::min({kTile - s % kTile, page - offset, item.end - s});
      const int at = std::clamp(table[int64_t(item.row) * pages + s / page], 0, size - 1);
      run(s, int64_t(at) * page + offset, n);
      s += n;
    }
  }

  int where(int row, int slot, int64_t physical) const {
    return place ? place[int64_t(row) * capacity() + slot] : pos ? pos[physical] : slot;
  }

  void turn(float* __restrict x, int64_t at) const {
    const float *c = cos + at * half, *s = sin + at * half;
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      x[i] = a * c[i] - b * s[i], x[half + i] = b * c[i] + a * s[i];
    }
  }

  void attend(int index) {
    const Item& item = items[index];
    std::vector<float> scores(heads * kBlock), numbers(kTile * std::max(key.lanes(), value.lanes()));
    const int lanes = key.lanes(), n = item.end - item.first;
    const float* query = q.data() + int64_t(item.row) * heads * lanes;
    int32_t seen[kBlock] = {};
    tiles(item, [&](int slot, int64_t at, int count) {
      int32_t* visible = seen + slot - item.first;
      bool any = false;
      for (int i = 0; i < count; ++i)
        any |= visible[i] = -((!after || where(item.row, slot + i, at + i) > after[item.row]) &&
                              (!slots || slots[int64_t(item.row) * capacity() + slot + i]));
      if (!any) return;
      const float* keys = reinterpret_cast<const float*>(key.codes) + at * lanes;
      if (!key.direct() || cos) decode(key, at, count, numbers.data()), keys = numbers.data();
      for (int i = 0; cos && i < count; ++i) turn(numbers.data() + i * lanes, where(item.row, slot + i, at + i));
      by_fours(heads, [&](int g, auto group) {
        float* to = scores.data() + g * kBlock + slot - item.first;
        score<decltype(group)::value>(query + g * lanes, keys, count, lanes, to, kBlock);
      });
    });
    float* out = partial.data() + int64_t(index) * heads * stride();
    std::vector<float> sums(heads * value.lanes());
    for (int g = 0; g < heads; ++g) {
      float* p = scores.data() + g * kBlock;
      Lanes highest = Lanes{} + kEmpty, total{};
      for (int i = 0; i < n; i += kLanes) {
        Lanes& x = *(Lanes*)(p + i);
        x *= scale;
        if (cap > 0)
          for (int j = 0; j < kLanes; ++j) x[j] = cap * std::tanh(x[j] / cap);
        x = *(const Ints*)(seen + i) ? x : Lanes{} + kEmpty;
        highest = x > highest ? x : highest;
      }
      float most = kEmpty, sum = 0;
      for (int j = 0; j < kLanes; ++j) most = std::max(most, highest[j]);
      if (logits) std::memcpy(logits + (int64_t(item.row) * heads + g) * capacity() + item.first, p, 4 * n);
      for (int i = 0; i < n; i += kLanes) {
        Lanes& x = *(Lanes*)(p + i);
        const Lanes below = x - most, weight = exp_(below);
        x = *(const Ints*)(seen + i) ? (below == below ? weight : below) : Lanes{};  // what is not a number stays so
        total += x;
      }
      for (int j = 0; j < kLanes; ++j) sum += total[j];
      out[g * stride()] = most, out[g * stride() + 1] = sum;
    }
    tiles(item, [&](int slot, int64_t at, int count) {
      const int32_t* visible = seen + slot - item.first;
      if (!std::any_of(visible, visible + count, [](int32_t x) { return x; })) return;
      const float* values = reinterpret_cast<const float*>(value.codes) + at * value.width;
      if (!value.direct()) decode(value, at, count, numbers.data()), values = numbers.data();
      by_fours(heads, [&](int g, auto group) {
        const float* weights = scores.data() + g * kBlock + slot - item.first;
        add<decltype(group)::value>(weights, kBlock, values, count, value.lanes(), sums.data() + g * value.lanes());
      });
    });
    for (int g = 0; g < heads; ++g)
      std::memcpy(out + g * stride() + 2, sums.data() + g * value.lanes(), 4 * value.lanes());
  }

  void merge(int row) {
    for (int g = 0; g < heads; ++g) {
      const int64_t at = int64_t(row) * heads + g;
      m[at] = kEmpty, l[at] = 0;
      std::fill_n(o + at * value.width, value.width, 0.0f);
      auto of = [&](int i) { return partial.data() + (int64_t(i) * heads + g) * stride(); };
      for (int i = begin[row]; i < begin[row + 1]; ++i) m[at] = std::max(m[at], *of(i));
      for (int i = begin[row]; i < begin[row + 1]; ++i) {
        const float* x = of(i);
        const float factor = std::exp(x[0] - m[at]);
        l[at] += x[1] * factor;
        for (int w = 0; w < value.width; ++w) o[at * value.width + w] += x[2 + w] * factor;
      }
    }
  }

  void work() {
    for (int i; (i = next.fetch_add(1)) < int(items.size());) {
      attend(i);
      if (unfinished[items[i].row].fetch_sub(1) == 1) merge(items[i].row);
      done.fetch_add(1);
    }
  }
};

Pool pool_of(ffi::AnyBuffer codes, ffi::AnyBuffer scale, ffi::AnyBuffer zero, ffi::Span<const int64_t> format) {
  // Kind, width, offset, run; then pieces.
  const int64_t slots = codes.dimensions()[0] * codes.dimensions()[1];
  auto bits = [](ffi::AnyBuffer x) -> const uint16_t* {
    return x.element_count() ? static_cast<const uint16_t*>(x.untyped_data()) : nullptr;
  };
  return {.dtype = codes.element_type(),
          .codes = static_cast<const char*>(codes.untyped_data()),
          .scale = bits(scale),
          .zero = bits(zero),
          .bytes = int64_t(codes.size_bytes()) / slots,
          .groups = int64_t(scale.element_count()) / slots,
          .kind = Kind(format[0]),
          .width = int(format[1]),
          .run = int(format[3]),
          .offset = float(format[2]),
          .pieces = reinterpret_cast<const Piece*>(format.begin() + 4),
          .count = int(format.size() - 4) / 7};
}

ffi::Error Attend(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer key, ffi::AnyBuffer key_scale,
                  ffi::AnyBuffer key_zero, ffi::AnyBuffer value, ffi::AnyBuffer value_scale, ffi::AnyBuffer value_zero,
                  ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::S32> pos,
                  ffi::Buffer<ffi::S32> place, ffi::Buffer<ffi::S32> after, ffi::Buffer<ffi::PRED> slots,
                  ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::Result<ffi::Buffer<ffi::F32>> o,
                  ffi::Result<ffi::Buffer<ffi::F32>> l, ffi::Result<ffi::Buffer<ffi::F32>> m,
                  ffi::Result<ffi::Buffer<ffi::F32>> logits, float scale, float cap,
                  ffi::Span<const int64_t> key_format, ffi::Span<const int64_t> value_format) {
  auto call = std::make_shared<Call>();
  auto some = [](auto& x) { return x.element_count() ? x.typed_data() : nullptr; };
  const int rows = length.element_count(), width = q.dimensions()[3];
  call->heads = q.dimensions()[2], call->page = key.dimensions()[1], call->size = key.dimensions()[0];
  call->pages = table.dimensions()[2], call->scale = scale, call->cap = cap;
  call->key = pool_of(key, key_scale, key_zero, key_format);
  call->value = pool_of(value, value_scale, value_zero, value_format);
  call->table = table.typed_data(), call->length = length.typed_data();
  call->pos = some(pos), call->place = some(place), call->after = some(after);
  call->slots = some(slots), call->cos = some(cos), call->sin = some(sin), call->half = cos.dimensions().back();
  call->o = o->typed_data(), call->l = l->typed_data(), call->m = m->typed_data(), call->logits = some(*logits);
  const int lanes = call->key.lanes();
  call->q.resize(int64_t(rows) * call->heads * lanes);
  for (int64_t i = 0; i < int64_t(rows) * call->heads; ++i)
    std::copy_n(q.typed_data() + i * width, width, call->q.data() + i * lanes);
  if (call->logits) std::fill_n(call->logits, logits->element_count(), kEmpty);
  call->unfinished.reset(new std::atomic<int>[rows]);
  int64_t held = 0;
  for (int row = 0; row < rows; ++row) {
    call->begin.push_back(call->items.size());
    const int end = std::min(call->length[row], call->capacity());
    const bool in_order = call->after && !call->pos && !call->place;
    for (int s = in_order ? std::max(0, call->after[row] + 1) : 0; s < end;) {
      const int next = std::min(end, s / kBlock * kBlock + kBlock);
      call->items.push_back({row, s, next}), held += next - s, s = next;
    }
    call->unfinished[row] = int(call->items.size()) - call->begin[row];
  }
  call->begin.push_back(call->items.size());
  call->partial.resize(call->items.size() * call->heads * call->stride());
  for (int row = 0; row < rows; ++row)
    if (call->unfinished[row] == 0) call->merge(row);
  const int64_t bytes = held * (call->key.bytes + call->value.bytes);
  const int64_t helpers = std::min({threads.num_threads() - 1, bytes / kShare, int64_t(call->items.size()) - 1});
  for (int64_t i = 0; i < helpers; ++i) threads.Schedule([call] { call->work(); });
  call->work();
  while (call->done.load() < int(call->items.size())) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

#define BUFFERS Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(decode_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .BUFFERS.BUFFERS.Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<ffi::Span<const int64_t>>("key")
                                  .Attr<ffi::Span<const int64_t>>("value"));
