// Attention over prompts on CPUs: `reference.attention` in float32, for XLA's foreign function interface.
//
// Threads take blocks of queries of all heads that share keys. A block goes along its keys with an online softmax (arXiv
// 2112.05682), both products in tiles of rows and vectors that stay in registers; nobody sees what is skipped.

#include <cmath>
#include <cstring>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kRows = 6;  // of a tile
#ifdef __AVX512F__
constexpr int kWide = 4;  // vectors of a tile
#else
constexpr int kWide = 1;
#endif
constexpr int kPanel = kWide * kLanes;    // keys that lie side by side
constexpr int kKeys = 256;                // of a block
constexpr int kQueries = 192;             // of a block, of all heads that share keys
constexpr int64_t kShare = int64_t(1) << 21;  // products that are worth another thread

// Rows of `c [V vectors]`, or what is added to them: `a [n] b [n, V vectors]`.
template <int V, bool Add>
inline void tile(const float* a, int64_t row, const float* b, int64_t line, int n, float* c, int64_t to) {
  Lanes sums[kRows][V] = {};
  if (Add)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = *(const Lanes*)(c + r * to + v * kLanes);
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] += a[r * row + i] * *(const Lanes*)(b + i * line + v * kLanes);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) *(Lanes*)(c + r * to + v * kLanes) = sums[r][v];
}

// The same of `width` numbers, at most a panel, and any rows: there is room for whole tiles.
template <bool Add>
void multiply(int rows, const float* a, int64_t row, const float* b, int64_t line, int n, int width, float* c,
              int64_t to) {
  auto all = [&](auto vectors) {
    for (int r = 0; r < rows; r += kRows)
      tile<std::min(decltype(vectors)::value, kWide), Add>(a + r * row, row, b, line, n, c + r * to, to);
  };
  const int vectors = padded(width) / kLanes;
  if (vectors == 1) all(std::integral_constant<int, 1>());
  if (vectors == 2) all(std::integral_constant<int, 2>());
  if (vectors == 3) all(std::integral_constant<int, 3>());
  if (vectors == 4) all(std::integral_constant<int, 4>());
}

struct Item {
  int row, head, first, count;  // of the batch, of keys, queries
  int from, to;                 // keys that any of them sees
};

// A thread's.
struct Room {
  std::vector<float> q, keys, values, weights, o;
  std::vector<Lanes> total;
  std::vector<float> top;
};

struct Call {
  int heads, group, queries, tokens, width, window;  // key heads, query heads of each; a window of 0 is none
  float scale, cap;        // logits are of base 2, and so is their cap
  const float *q, *k, *v;  // [B heads tokens width]
  const int32_t *length, *behind, *until;  // the last two may be null
  float *o, *lse;
  std::vector<Item> items;

  int lanes() const { return padded(width); }
  int start(int row) const { return behind ? length[row] : 0; }
  int count(int row) const { return std::clamp(behind ? behind[row] : length[row], 0, queries); }
  int first_key(int pos) const { return window ? std::max(0, pos + 1 - window) : 0; }
  int last_key(int row, int pos) const { return std::clamp(length[row], 0, behind ? tokens : std::min(tokens, pos + 1)); }

  Room room() const {
    const int64_t rows = (kQueries + group + kLanes) / kLanes * kLanes + kRows, n = lanes();
    return {.q = std::vector<float>(rows * n),
            .keys = std::vector<float>(kKeys * n),
            .values = std::vector<float>(width == n ? 0 : kKeys * n),
            .weights = std::vector<float>(rows * kKeys),
            .o = std::vector<float>(rows * n),
            .total = std::vector<Lanes>(rows),
            .top = std::vector<float>(rows)};
  }

  // Keys on their side, in panels `[width][kPanel]`; those that are not there are 0.
  void turn(const float* from, int count, float* to) const {
    for (int s = 0; s < count; s += kLanes)
      for (int h = 0; h < width; h += kLanes) {
        float* to_panel = to + int64_t(s / kPanel * kPanel) * lanes() + s % kPanel + h * kPanel;
        const float* at = from + int64_t(s) * width + h;
        const int n = std::min(kLanes, count - s), m = std::min(kLanes, width - h);
        float part[kLanes * kLanes];
        const bool whole = n == kLanes && m == kLanes;
        if (!whole) {
          std::memset(part, 0, sizeof part);
          for (int i = 0; i < n; ++i) std::memcpy(part + i * kLanes, at + int64_t(i) * width, 4 * m);
          at = part;
        }
        Lanes x[kLanes];
        for (int i = 0; i < kLanes; ++i) x[i] = *(const Lanes*)(at + int64_t(i) * (whole ? width : kLanes));
        transpose(x);
        for (int i = 0; i < kLanes; ++i) *(Lanes*)(to_panel + i * kPanel) = x[i];
      }
  }

  // Which of the keys [s, s + count) a query at `pos` sees.
  struct Seen {
    int from, to, pos, count;
    const int32_t* ends;

    bool all() const { return !ends && from == 0 && to == count && count % kLanes == 0; }
    Ints operator()(int i) const {
      const Ints at = Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + i;
      Ints end = Ints{} + pos;
      if (ends) std::memcpy(&end, ends + i, 4 * std::min(kLanes, count - i));
      return (at >= from) & (at < to) & (end >= pos);
    }
  };

  Seen seen(const Item& item, int pos, int s, int count) const {
    return {first_key(pos) - s, std::min(last_key(item.row, pos) - s, count), pos, count,
            until ? until + (int64_t(item.row) * heads + item.head) * tokens + s : nullptr};
  }

  // Products become logits; the highest of each lane, or what it was.
  Lanes bound(const Seen& seen, float* p) const {
    const bool all = seen.all();
    Lanes most = Lanes{} + kEmpty;
    for (int i = 0; i < seen.count; i += kLanes) {
      Lanes& x = *(Lanes*)(p + i);
      if (cap > 0) x = cap * tanh_(x / cap);
      if (!all) x = seen(i) ? x : Lanes{} + kEmpty;
      most = larger(x, most);
    }
    return most;
  }

  // Logits become weights; returns their sums.
  Lanes weigh(const Seen& seen, float above, float* p) const {
    const bool all = seen.all();
    Lanes sums{};
    for (int i = 0; i < seen.count; i += kLanes) {
      Lanes& x = *(Lanes*)(p + i);
      x = exp2_(x - above);
      if (!all) x = seen(i) ? x : Lanes{};
      sums += x;
    }
    return sums;
  }

  // Products of queries and the keys [s, s + count) become weights, and what is there already is scaled to them.
  void soften(const Item& item, int s, int count, Room& room) const {
    const int rows = item.count * group;
    const int pos = start(item.row) + item.first;
    Seen of[kLanes];
    for (int r = 0, query = 0; r < rows; r += kLanes) {
      const int n = std::min(kLanes, rows - r);
      float* p = room.weights.data() + int64_t(r) * kKeys;
      Lanes most[kLanes] = {}, &top = *(Lanes*)(room.top.data() + r);
      for (int i = 0; i < n; ++i, query = query + 1 == item.count ? 0 : query + 1) {
        of[i] = seen(item, pos + query, s, count);
        most[i] = bound(of[i], p + i * kKeys);
      }
      transpose(most);
      Lanes above = top;
      for (const Lanes& x : most) above = larger(x, above);
      const Lanes factor = exp2_(top - above);
      top = above;
      for (int i = 0; i < n; ++i) {
        room.total[r + i] = room.total[r + i] * factor[i] + weigh(of[i], above[i], p + i * kKeys);
        if (factor[i] == 1) continue;
        float* o = room.o.data() + int64_t(r + i) * lanes();
        for (int h = 0; h < width; h += kLanes) *(Lanes*)(o + h) *= factor[i];
      }
    }
  }

  void run(int64_t index, Room& room) const {
    const Item& item = items[index];
    const int n = lanes(), rows = item.count * group;
    const int64_t pair = int64_t(item.row) * heads + item.head;
    auto query = [&](int r) {  // of a row of the block
      return (pair * group + r / item.count) * queries + item.first + r % item.count;
    };
    std::fill(room.q.begin(), room.q.end(), 0.0f), std::fill(room.o.begin(), room.o.end(), 0.0f);
    std::fill(room.total.begin(), room.total.end(), Lanes{}), std::fill(room.top.begin(), room.top.end(), kEmpty);
    for (int r = 0; r < rows; ++r)
      for (int h = 0; h < width; ++h) room.q[int64_t(r) * n + h] = q[query(r) * width + h] * (scale * kLog2);
    for (int s = item.from; s < item.to; s += kKeys) {
      const int count = std::min(kKeys, item.to - s);
      const float* values = v + (pair * tokens + s) * width;
      turn(k + (pair * tokens + s) * width, count, room.keys.data());
      for (int j = 0; j < count; j += kPanel)
        multiply<false>(rows, room.q.data(), n, room.keys.data() + int64_t(j) * n, kPanel, width,
                        std::min(kPanel, count - j), room.weights.data() + j, kKeys);
      soften(item, s, count, room);
      for (int i = 0; width < n && i < count; ++i)
        std::memcpy(room.values.data() + int64_t(i) * n, values + int64_t(i) * width, 4 * width);
      if (width < n) values = room.values.data();
      for (int h = 0; h < n; h += kPanel)
        multiply<true>(rows, room.weights.data(), kKeys, values + h, n, count, std::min(kPanel, n - h),
                       room.o.data() + h, n);
    }
    for (int r = 0; r < rows; ++r) {
      const float total = sum(room.total[r]), factor = total == 0 ? 0 : 1 / total;
      for (int h = 0; h < width; ++h) o[query(r) * width + h] = room.o[int64_t(r) * n + h] * factor;
      lse[query(r)] = total == 0 ? kEmpty : room.top[r] / kLog2 + std::log(total);
    }
  }
};

ffi::Error Attend(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                  ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::S32> until, ffi::Buffer<ffi::S32> behind,
                  ffi::Result<ffi::Buffer<ffi::F32>> o, ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale, float cap,
                  int64_t window) {
  auto call = std::make_shared<Call>();
  auto some = [](auto& x) { return x.element_count() ? x.typed_data() : nullptr; };
  const int batch = q.dimensions()[0];
  call->heads = k.dimensions()[1], call->group = q.dimensions()[1] / call->heads, call->queries = q.dimensions()[2];
  call->tokens = k.dimensions()[2], call->width = k.dimensions()[3];
  call->window = int(std::min<int64_t>(window, INT32_MAX)), call->scale = scale, call->cap = cap * kLog2;
  call->q = q.typed_data(), call->k = k.typed_data(), call->v = v.typed_data(), call->length = length.typed_data();
  call->until = some(until), call->behind = some(behind), call->o = o->typed_data(), call->lse = lse->typed_data();
  const int most = std::max(1, kQueries / call->group);
  int64_t products = 0;
  for (int row = 0; row < batch; ++row) {
    const int count = call->count(row), start = call->start(row);
    for (int n = 0; n < call->heads * call->group; ++n) {  // padding
      const int64_t at = (int64_t(row) * call->heads * call->group + n) * call->queries + count;
      std::fill_n(call->o + at * call->width, int64_t(call->queries - count) * call->width, 0.0f);
      std::fill_n(call->lse + at, call->queries - count, 0.0f);
    }
    for (int first = 0; first < count; first += most)
      for (int head = 0; head < call->heads; ++head) {
        const int n = std::min(most, count - first), last = start + first + n - 1;
        const Item item = {row, head, first, n, call->first_key(start + first), call->last_key(row, last)};
        call->items.push_back(item), products += int64_t(std::max(0, item.to - item.from)) * n * call->group * call->width;
      }
  }
  std::stable_sort(call->items.begin(), call->items.end(),  // the longest first: nobody waits long for another's last
                   [](const Item& a, const Item& b) { return a.to - a.from > b.to - b.from; });
  share(threads, call, call->items.size(), products / kShare);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(prefill_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window"));
