// Products of small matrices, all in registers, and the numbers they are made of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

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
typedef uint16_t Hu __attribute__((vector_size(2 * W), aligned(2), may_alias));
struct bf16 { uint16_t bits; };

static inline V load(const float* p) { return *(const Vu*)p; }
static inline V load(const bf16* p) { return (V)(__builtin_convertvector(*(const Hu*)p, U) << 16); }
static inline void store(float* p, V v) { *(Vu*)p = v; }
static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f; }
static inline void from_float(float& to, float x) { to = x; }
static inline void from_float(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u; memcpy(&u, &x, 4);
  to.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

template <typename T>
static inline V rounded(V v) {
  if (sizeof(T) == 2) for (int i = 0; i < W; i++) { T t; from_float(t, v[i]); v[i] = to_float(t); }
  return v;
}

// c[R][P * NR] (+)= a[R][k] * b[k][P * NR]: panel p of b begins at b + p * step. FETCH: what is `ahead` is fetched
// meanwhile. Few instructions beside the sums count: a core is often shared with another thread.
template <int R, int P, bool FETCH, typename B>
static void tile(const float* a, I lda, const B* b, I ldb, I step, const B* ahead, float* c, I ldc, I k, bool add) {
  V x[R][2 * P];
  for (int r = 0; r < R; r++) for (int q = 0; q < 2 * P; q++) x[r][q] = add ? load(c + r * ldc + q * W) : V{};
#define SUM                                                                                                    \
  for (I i = 0; i < k; i++)                                                                                    \
    _Pragma("GCC unroll 2") for (int p = 0; p < P; p++) {                                                      \
      if (FETCH) __builtin_prefetch(ahead + i * ldb + p * step, 0, 2); /* into the second cache */              \
      V u = load(b + i * ldb + p * step), v = load(b + i * ldb + p * step + W);                                \
      _Pragma("GCC unroll 16") for (int r = 0; r < R; r++) {                                                   \
        float s = a[r * lda + i];                                                                              \
        x[r][2 * p] += s * u; x[r][2 * p + 1] += s * v;                                                        \
      }                                                                                                        \
    }
  if constexpr (P == 1) {
#pragma GCC unroll 4
    SUM
  } else {
    SUM
  }
  for (int r = 0; r < R; r++) for (int q = 0; q < 2 * P; q++) store(c + r * ldc + q * W, x[r][q]);
}
template <int R, int P, bool FETCH, typename B>
static void part(I m, const float* a, I lda, const B* b, I ldb, I step, const B* ahead, float* c, I ldc, I k, bool add) {
  if constexpr (R > 0) {
    if (m == R) tile<R, P, FETCH>(a, lda, b, ldb, step, ahead, c, ldc, k, add);
    else part<R - 1, P, FETCH>(m, a, lda, b, ldb, step, ahead, c, ldc, k, add);
  }
}
// The same for m rows and n columns, in whole panels. Few rows take two panels at a time, to have sums enough under way.
template <typename B>
static void product(I m, I n, const float* a, I lda, const B* b, I ldb, I step, const B* ahead, float* c, I ldc, I k, bool add) {
  for (I j = 0; j < n; j += NR, b += step, ahead += step, c += NR) {
    if (m <= MR / 2 && j + NR < n) {
      part<MR / 2, 2, true>(m, a, lda, b, ldb, step, ahead, c, ldc, k, add);
      j += NR, b += step, ahead += step, c += NR;
      continue;
    }
    part<MR, 1, true>(std::min<I>(MR, m), a, lda, b, ldb, step, ahead, c, ldc, k, add);
    for (I r = MR; r < m; r += MR)
      part<MR, 1, false>(std::min<I>(MR, m - r), a + r * lda, lda, b, ldb, step, ahead, c + r * ldc, ldc, k, add);
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
static inline float sum(V v) { float s = 0; for (int i = 0; i < W; i++) s += v[i]; return s; }
