// Decode attention on CPUs: `reference.attend` over one part, for XLA's foreign function interface.
//
// Rows are cut into blocks of slots, and threads take one block after the other, so that rows cost what they hold.
// Codes are multiplied as they are (packed.h), or become float32 numbers a tile at a time (pool.h), which stay in the first
// cache; dense float32 is read where it lies.
// A row's blocks are merged by whoever finishes its last one, in their order: results do not depend on the threads.

#include <cmath>
#include <tuple>

#include "decode_attention/packed.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kBlock = 256;           // slots that a thread takes at once
constexpr int64_t kShare = 64 << 10;  // bytes that are worth another thread

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

struct Item {
  int row, first, end;  // slots
};

// A thread's; of codes that are multiplied as they are what `packed.h` says.
struct Room {
  std::vector<float> scores, numbers, sums, query, of_query, weights, of_codes;
  std::vector<Lanes> codes, scale, zero, zeros;
};

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

  bool packed_keys() const { return !cos && packed(key, 4); }
  bool packed_values() const { return packed(value, kLanes); }

  Room room() const {
    auto floats = [](int64_t n) { return std::vector<float>(n); };
    const int64_t k = packed_keys() ? heads : 0, v = packed_values() ? heads : 0, groups = std::max(key.groups, value.groups);
    auto lanes = [](int64_t n) { return std::vector<Lanes>(n); };
    return {.scores = floats(heads * kBlock),
            .numbers = floats(kTile * std::max(key.lanes(), value.lanes())),
            .sums = floats(heads * value.lanes()),
            .query = floats(k * parts(key)),
            .of_query = floats(k * key.groups),
            .weights = floats(v * value.groups * kTile),
            .of_codes = floats(v * parts(value)),
            .codes = lanes(k ? key.bytes / 4 : 0),
            .scale = lanes(groups),
            .zero = lanes(groups),
            .zeros = lanes(v * value.groups)};
  }

  // Products of a row's queries and the keys of a tile, to `scores`.
  void score_tile(const Item& item, int slot, int64_t at, int count, Room& room) const {
    float* to = room.scores.data() + slot - item.first;
    if (packed_keys()) {
      const int64_t stride = parts(key);
      for (int s = 0; s < count; s += kLanes) {
        const int n = std::min(kLanes, count - s);
        transpose_codes(key, at + s, n, room.codes.data()), lines(key, at + s, n, room.scale.data(), room.zero.data());
        by_fours(heads, [&](int g, auto group) {
          Lanes found[4];
          score_codes<decltype(group)::value>(key, room.codes.data(), room.query.data() + g * stride, stride,
                                              room.of_query.data() + g * key.groups, room.scale.data(),
                                              room.zero.data(), found);
          for (int i = 0; i < decltype(group)::value; ++i) std::memcpy(to + (g + i) * kBlock + s, found + i, 4 * n);
        });
      }
      return;
    }
    const int lanes = key.lanes();
    const float* keys = reinterpret_cast<const float*>(key.codes) + at * lanes;
    if (!key.direct() || cos) decode(key, at, count, room.numbers.data()), keys = room.numbers.data();
    for (int i = 0; cos && i < count; ++i) turn(room.numbers.data() + i * lanes, where(item.row, slot + i, at + i));
    by_fours(heads, [&](int g, auto group) {
      const float* query = q.data() + (int64_t(item.row) * heads + g) * lanes;
      score<decltype(group)::value>(query, keys, count, lanes, to + g * kBlock, kBlock);
    });
  }

  // The values of a tile, weighted and added to `sums`.
  void add_tile(const Item& item, int slot, int64_t at, int count, Room& room) const {
    const float* p = room.scores.data() + slot - item.first;
    if (packed_values()) {
      const int64_t groups = value.groups, stride = parts(value);
      for (int s = 0; s < count; s += kLanes) {
        const int n = std::min(kLanes, count - s);
        lines(value, at + s, n, room.scale.data(), room.zero.data());
        for (int g = 0; g < heads; ++g) {
          Lanes weight{};
          std::memcpy(&weight, p + g * kBlock + s, 4 * n);
          for (int i = 0; i < groups; ++i) {
            *(Lanes*)(room.weights.data() + (g * groups + i) * kTile + s) = weight * room.scale[i];
            room.zeros[g * groups + i] += weight * room.zero[i];
          }
        }
      }
      by_fours(heads, [&](int g, auto group) {
        add_codes<decltype(group)::value>(value, at, count, room.weights.data() + g * groups * kTile,
                                          room.of_codes.data() + g * stride, stride);
      });
      return;
    }
    const float* values = reinterpret_cast<const float*>(value.codes) + at * value.width;
    if (!value.direct()) decode(value, at, count, room.numbers.data()), values = room.numbers.data();
    by_fours(heads, [&](int g, auto group) {
      add<decltype(group)::value>(p + g * kBlock, kBlock, values, count, value.lanes(),
                                  room.sums.data() + g * value.lanes());
    });
  }

  // Scores become weights; the highest score and the weights' sum.
  std::pair<float, float> soften(const Item& item, int head, const int32_t* seen, float* p) const {
    const int n = item.end - item.first;
    Lanes highest = Lanes{} + kEmpty, total{};
    for (int i = 0; i < n; i += kLanes) {
      Lanes& x = *(Lanes*)(p + i);
      x *= scale;
      if (cap > 0) x = cap * tanh_(x / cap);
      x = *(const Ints*)(seen + i) ? x : Lanes{} + kEmpty;
      highest = larger(x, highest);
    }
    float most = kEmpty;
    for (int j = 0; j < kLanes; ++j) most = std::max(most, highest[j]);
    if (logits) std::memcpy(logits + (int64_t(item.row) * heads + head) * capacity() + item.first, p, 4 * n);
    for (int i = 0; i < n; i += kLanes) {
      Lanes& x = *(Lanes*)(p + i);
      x = *(const Ints*)(seen + i) ? exp2_((x - most) * kLog2) : Lanes{};
      total += x;
    }
    return {most, sum(total)};
  }

  void attend(int index, Room& room) {
    const Item& item = items[index];
    int32_t seen[kBlock] = {};
    for (int g = 0; packed_keys() && g < heads; ++g)
      meet(key, q.data() + (int64_t(item.row) * heads + g) * key.lanes(), room.query.data() + g * parts(key),
           room.of_query.data() + g * key.groups);
    tiles(item, [&](int slot, int64_t at, int count) {
      int32_t* visible = seen + slot - item.first;
      bool any = false;
      for (int i = 0; i < count; ++i)
        any |= visible[i] = -((!after || where(item.row, slot + i, at + i) > after[item.row]) &&
                              (!slots || slots[int64_t(item.row) * capacity() + slot + i]));
      if (any) score_tile(item, slot, at, count, room);
    });
    float* out = partial.data() + int64_t(index) * heads * stride();
    for (int g = 0; g < heads; ++g)
      std::tie(out[g * stride()], out[g * stride() + 1]) = soften(item, g, seen, room.scores.data() + g * kBlock);
    std::fill(room.sums.begin(), room.sums.end(), 0.0f), std::fill(room.of_codes.begin(), room.of_codes.end(), 0.0f);
    std::fill(room.zeros.begin(), room.zeros.end(), Lanes{});
    tiles(item, [&](int slot, int64_t at, int count) {
      const int32_t* visible = seen + slot - item.first;
      if (std::any_of(visible, visible + count, [](int32_t x) { return x; })) add_tile(item, slot, at, count, room);
    });
    for (int g = 0; g < heads; ++g)
      if (packed_values())
        assemble(value, room.of_codes.data() + g * parts(value), room.zeros.data() + g * value.groups,
                 out + g * stride() + 2);
      else
        std::memcpy(out + g * stride() + 2, room.sums.data() + g * value.lanes(), 4 * value.lanes());
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

  void run(int64_t index, Room& room) {
    attend(index, room);
    if (unfinished[items[index].row].fetch_sub(1) == 1) merge(items[index].row);
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
  share(threads, call, call->items.size(), bytes / kShare);
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
