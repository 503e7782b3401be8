// The product of a few rows and one of several equal matrices, for XLA's foreign function interface.
//
// Threads take columns of the result, a piece at a time, and read the matrix once, `kDepth` of its rows at a time: the
// sums of a piece stay in the first cache. A row's sums are added up in the same order whatever is computed beside it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;
constexpr int kDepth = 8;
constexpr int kGroup = 32;              // inputs whose codes share a scale
constexpr int64_t kSums = 16 << 10;   // bytes of a piece's sums, at most
constexpr int64_t kShare = 64 << 10;  // bytes that are worth another thread

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));

Lanes numbers(const float* x) { return *(const Lanes*)x; }

Lanes numbers(const uint16_t* x) {  // bfloat16
  return (Lanes)(__builtin_convertvector(*(const Halves*)x, Ints) << 16);
}

Ints numbers(const uint8_t* x) {
#ifdef __AVX512F__  // compilers take the bytes one by one
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
#else
  return __builtin_convertvector(*(const Bytes*)x, Ints);
#endif
}

// The first numbers of a line, zeros behind them.
template <typename Number>
auto read(const Number* x, int count) {
  if (count >= kLanes) return numbers(x);
  Number rest[kLanes] = {};
  std::memcpy(rest, x, count * sizeof(Number));
  return numbers(rest);
}

struct Matrix {
  const void* numbers;           // [inner, outer], or codes of `bits` bits [inner * bits / 8, outer]
  const uint16_t *scale, *zero;  // of codes, bfloat16 [inner / kGroup, outer]; zero of 4 bits
  int bits;
};

template <typename Number>
struct Call {
  int rows, inner, outer, width;  // a piece has `width` columns
  std::vector<float> x, total;    // [rows, inner]; its sums over groups
  Matrix matrix;
  float* y;  // [rows, outer]
  std::atomic<int> next{0}, done{0};

  int pieces() const { return (outer + width - 1) / width; }
  const Number* at(int row, int column) const {
    return static_cast<const Number*>(matrix.numbers) + int64_t(row) * outer + column;
  }
  Lanes& sum(float* sums, int row, int j) const { return *(Lanes*)(sums + int64_t(row) * (width + kLanes) + j); }

  // Adds the products with `depth` rows of the matrix, from row k on, in columns that start at `first`.
  template <int depth>
  void add(float* sums, int k, int first, int columns) const {
    for (int j = 0; j < columns; j += kLanes) {
      Lanes w[depth];
      for (int i = 0; i < depth; ++i) w[i] = read(at(k + i, first + j), columns - j);
      for (int row = 0; row < rows; ++row) {
        Lanes y = sum(sums, row, j);
        for (int i = 0; i < depth; ++i) y += x[int64_t(row) * inner + k + i] * w[i];
        sum(sums, row, j) = y;
      }
    }
  }

  // The same of a group of codes: number = code * scale + zero; byte i of 4 bits holds codes i and i + kGroup / 2.
  void add_group(float* sums, int group, int first, int columns) const {
    for (int j = 0; j < columns; j += kLanes) {
      const int64_t place = int64_t(group) * outer + first + j;
      const int bytes = kGroup * matrix.bits / 8;
      Lanes code[kGroup];
      for (int i = 0; i < bytes; ++i) {
        const Ints byte = read(reinterpret_cast<const uint8_t*>(at(group * bytes + i, first + j)), columns - j);
        code[i] = __builtin_convertvector(matrix.bits == 4 ? byte & 15 : byte, Lanes);
        if (matrix.bits == 4) code[i + bytes] = __builtin_convertvector(byte >> 4, Lanes);
      }
      const Lanes scale = read(matrix.scale + place, columns - j);
      const Lanes zero = matrix.zero ? read(matrix.zero + place, columns - j) : -128.0f * scale;
      for (int row = 0; row < rows; ++row) {
        const float* own = x.data() + int64_t(row) * inner + group * kGroup;
        Lanes products = {};
        for (int i = 0; i < kGroup; ++i) products += own[i] * code[i];
        sum(sums, row, j) += products * scale + total[int64_t(row) * (inner / kGroup) + group] * zero;
      }
    }
  }

  void work() {
    std::vector<float> sums;
    for (int piece; (piece = next.fetch_add(1)) < pieces(); done.fetch_add(1)) {
      const int first = piece * width, columns = std::min(width, outer - first);
      sums.assign(int64_t(rows) * (width + kLanes), 0.0f);
      int k = 0;
      if constexpr (sizeof(Number) == 1) {
        for (; k < inner / kGroup; ++k) add_group(sums.data(), k, first, columns);
      } else {
        for (; k + kDepth <= inner; k += kDepth) add<kDepth>(sums.data(), k, first, columns);
        for (; k < inner; ++k) add<1>(sums.data(), k, first, columns);
      }
      for (int row = 0; row < rows; ++row)
        std::copy_n(sums.data() + int64_t(row) * (width + kLanes), columns, y + int64_t(row) * outer + first);
    }
  }
};

template <typename Number>
void multiply(ffi::ThreadPool& threads, ffi::Buffer<ffi::F32>& x, Matrix matrix, ffi::Buffer<ffi::F32>& y) {
  auto call = std::make_shared<Call<Number>>();
  call->rows = x.dimensions()[0], call->inner = x.dimensions()[1], call->outer = y.dimensions()[1];
  call->x.assign(x.typed_data(), x.typed_data() + x.element_count());
  call->matrix = matrix, call->y = y.typed_data();
  for (size_t i = 0; sizeof(Number) == 1 && i < call->x.size(); i += kGroup)
    call->total.push_back(std::accumulate(&call->x[i], &call->x[i] + kGroup, 0.0f));
  const int64_t bytes = int64_t(call->inner) * call->outer * matrix.bits / 8, fits = kSums / 4 / call->rows;
  const int64_t shares = std::min(threads.num_threads(), 1 + bytes / kShare);
  const int64_t even = (call->outer + shares - 1) / shares + kLanes - 1;
  call->width = int(std::max<int64_t>(1, std::min(even, fits) / kLanes) * kLanes);
  for (int64_t i = 1; i < std::min<int64_t>(shares, call->pieces()); ++i) threads.Schedule([call] { call->work(); });
  call->work();
  while (call->done.load() < call->pieces()) std::this_thread::yield();
}

ffi::Error Product(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> index,
                   ffi::RemainingArgs arrays, ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t each) {
  // Of each matrix the numbers, or codes, scales and perhaps zeros.
  const int64_t last = int64_t(arrays.size()) / each - 1, chosen = std::clamp<int64_t>(*index.typed_data(), 0, last);
  auto array = [&](int64_t i) { return *arrays.get<ffi::AnyBuffer>(chosen * each + i); };
  auto bits = [&](int64_t i) { return i < each ? static_cast<const uint16_t*>(array(i).untyped_data()) : nullptr; };
  const ffi::DataType dtype = array(0).element_type();
  const Matrix matrix = {array(0).untyped_data(), bits(1), bits(2),
                         dtype == ffi::F32 ? 32 : dtype == ffi::BF16 ? 16 : each == 2 ? 8 : 4};
  if (dtype == ffi::F32)
    multiply<float>(threads, x, matrix, *y);
  else if (dtype == ffi::BF16)
    multiply<uint16_t>(threads, x, matrix, *y);
  else
    multiply<uint8_t>(threads, x, matrix, *y);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chosen_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("each"));
