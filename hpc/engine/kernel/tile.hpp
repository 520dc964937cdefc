// Products of small matrices, all in registers, and the numbers they are made of.
//
// Letters, the same in all three files:
//   I            int64_t: indices and sizes
//   V U S H      vectors of W floats, of their bits as unsigned and as signed numbers, of W bfloat16 numbers;
//                Vu, Hu: the same at any address
//   W            floats in a vector          MR  rows of a tile         NR  columns of a tile, two vectors
//   MB           rows of x for a panel       KB  depth of a panel       BK  keys of a block
//   A B          what is multiplied: numbers of an activation (left) and of a weight or key (right); `Unit` says which
//   T            the type that tensors have: float or bf16
//   M N K        rows, columns and depth of a product; m n k: the same of a part; lda ldb ldc: from row to row
//   R P G D      attention: rows of queries, padded value columns, query heads per key head, dimensions of a head
//   p q r j l    a panel or a probability, a vector of a row, a row, a column, a cache line
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__x86_64__)
#define IN_REGISTER(v) asm("" : "+v"(v))  // compilers load a vector anew for each row otherwise, at half the speed
#else
#define IN_REGISTER(v)
#endif

#if defined(__AVX512F__)
constexpr int W = 16, MR = 12;  // floats in a vector; rows of a tile: two vectors each, all in registers
#elif defined(__AVX2__)
constexpr int W = 8, MR = 6;
#else
constexpr int W = 4, MR = 8;
#endif
constexpr int NR = 2 * W;          // columns of a tile, and of a panel of packed weights or keys
constexpr int MB = 16 * MR;        // rows that stay in the second cache while a panel passes
constexpr int KB = 384;            // depth of a panel that stays in the first cache
constexpr int BK = 64;             // keys between two corrections of the softmax; what the cache keeps together
constexpr int ROWS = 48;           // query rows that share the reading of a block of keys

typedef int64_t I;
typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t S __attribute__((vector_size(4 * W)));
typedef float Vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint16_t Hu __attribute__((vector_size(2 * W), aligned(2), may_alias));
struct bf16 {
  uint16_t bits;
};

static inline V load(const float* p) { return *(const Vu*)p; }
static inline void store(float* p, V v) { *(Vu*)p = v; }
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline void from_float(float& to, float x) { to = x; }
static inline void from_float(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  to.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__)
static inline H narrowed(V v) { return (H)_mm512_cvtneps_pbh((__m512)v); }
#else
static inline H narrowed(V v) {
  const U u = (U)v, bits = v == v ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : U{} + 0x7fc0;
  return __builtin_convertvector(bits, H);
}
#endif
#if defined(__AVX512F__)
static inline V widened(H h) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16); }
#else
static inline V widened(H h) { return (V)(__builtin_convertvector(h, U) << 16); }
#endif
template <typename T> static inline V rounded(V v) { return sizeof(T) == 2 ? widened(narrowed(v)) : v; }
static inline V load(const bf16* p) { return widened(*(const Hu*)p); }
static inline void store(bf16* p, V v) { *(Hu*)p = narrowed(v); }
template <typename T> static inline void copy(const float* x, I n, T* to) {
  I i = 0;
  for (; i + W <= n; i += W) store(to + i, load(x + i));
  for (; i < n; i++) from_float(to[i], x[i]);
}

// What a tile multiplies: left (an activation) and right (a weight, a key) of a product, and how many numbers are in
// one.
struct __attribute__((may_alias)) pair {
  uint32_t bits;
};  // two of bfloat16, neighbours along the depth of the product
template <typename T> struct Unit {
  typedef float left, number;
  typedef T right;
  static constexpr int size = 1;
};
static inline V plus_product(V x, float s, V u) { return x + s * u; }
#if defined(__AVX512BF16__)
template <> struct Unit<bf16> {
  typedef pair left, right;
  typedef bf16 number;
  static constexpr int size = 2;
};
static inline V load(const pair* p) { return *(const Vu*)p; }
static inline V plus_product(V x, pair s, V u) {
  return (V)_mm512_dpbf16_ps((__m512)x, (__m512bh)u, (__m512bh)_mm512_set1_epi32(s.bits));
}
#endif

// What is fetched into the second cache during a product: what is read next. Spread evenly, for memory is slower than
// that cache: all at once it would be waited for, and nothing be fetched afterwards.
struct Ahead {
  const void* at;
  I bytes;
};

// c[R][P * NR] (+)= a[R][k] * b[k][P * NR]: panel p of b begins at b + p * step; fetches meanwhile what lies between
// `ahead` and `end`.
template <int R, int P, typename A, typename B>
static void tile(const A* a, I lda, const B* b, I ldb, I step, const char* ahead, const char* end, float* c, I ldc, I k,
                 bool add) {
  constexpr int LINES = NR * sizeof(B) > 64 ? NR * sizeof(B) / 64 : 1;
  V x[R][2 * P];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int q = 0; q < 2 * P; q++) x[r][q] = add ? load(c + r * ldc + q * W) : V{};
#define SUM                                                                           \
  for (I i = 0; i < k; i++) _Pragma("GCC unroll 2") for (int p = 0; p < P; p++) {     \
      if (ahead < end)                                                                \
        for (int l = 0; l < LINES; l++, ahead += 64) __builtin_prefetch(ahead, 0, 2); \
      V u = load(b + i * ldb + p * step), v = load(b + i * ldb + p * step + W);       \
      IN_REGISTER(u);                                                                 \
      IN_REGISTER(v);                                                                 \
      _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                          \
        const A s = a[r * lda + i];                                                   \
        x[r][2 * p] = plus_product(x[r][2 * p], s, u);                                \
        x[r][2 * p + 1] = plus_product(x[r][2 * p + 1], s, v);                        \
      }                                                                               \
    }
  if constexpr (P == 1) {
#pragma GCC unroll 4
    SUM
  } else {
    SUM
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int q = 0; q < 2 * P; q++) store(c + r * ldc + q * W, x[r][q]);
}
template <int R, int P, typename A, typename B>
static void part(I m, const A* a, I lda, const B* b, I ldb, I step, const char* ahead, const char* end, float* c, I ldc,
                 I k, bool add) {
  if constexpr (R > 0) {
    if (m == R) tile<R, P>(a, lda, b, ldb, step, ahead, end, c, ldc, k, add);
    else part<R - 1, P>(m, a, lda, b, ldb, step, ahead, end, c, ldc, k, add);
  }
}
// The same for m rows and n columns, in whole panels. Few rows take two panels at a time, to have sums enough under
// way.
template <typename A, typename B>
static void product(I m, I n, const A* a, I lda, const B* b, I ldb, I step, Ahead ahead, float* c, I ldc, I k,
                    bool add) {
  const char *at = (const char*)ahead.at, *end = at;
  I done = 0;
  const auto share = [&](I rows) {  // by the work of each tile
    done += rows;
    at = end, end = (const char*)ahead.at + ahead.bytes * done / (m * (n / NR)) / 64 * 64;
  };
  for (I j = 0; j < n; j += NR, b += step, c += NR) {
    if (m <= MR / 2 && j + NR < n) {
      share(2 * m);
      part<MR / 2, 2>(m, a, lda, b, ldb, step, at, end, c, ldc, k, add);
      j += NR, b += step, c += NR;
      continue;
    }
    for (I r = 0; r < m; r += MR) {
      const I rows = std::min<I>(MR, m - r);
      share(rows);
      part<MR, 1>(rows, a + r * lda, lda, b, ldb, step, at, end, c + r * ldc, ldc, k, add);
    }
  }
}

// e^x for x <= 0, within 2e-7: 2^n * e^r with |r| <= ln(2)/2, e^r by its series
static inline V exp_(V x) {
  x = x < -87.f ? V{} - 87.f : x;
  const V shift = V{} + 12582912.f;
  const V n = (x * 1.44269504f + shift) - shift;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.f / 720;
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = p * r + c;
  return p * (V)((__builtin_convertvector(n, S) + 127) << 23);
}
static inline S lanes() {
  S s;
  for (int i = 0; i < W; i++) s[i] = i;
  return s;
}
#if defined(__AVX512F__)
static inline float sum(V v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float largest(V v) { return _mm512_reduce_max_ps((__m512)v); }
#else
static inline float sum(V v) {
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
}
static inline float largest(V v) {
  float m = v[0];
  for (int i = 1; i < W; i++) m = std::max(m, v[i]);
  return m;
}
#endif
