// Matrix products and attention for CPUs whose sums do not depend on what else is in the batch: every output is
// one chain of fused multiply-adds in a fixed order, whichever tile, chunk or thread computes it.
// All float32 inside; weights and cache are float32 or bfloat16. Plain C calls, compiled for the machine it runs on.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

// y[M][N] = x[M][K] * w^T + bias, w packed in panels [N/NR][K][NR], `plus` something. `gated`: y = silu(gate) * up
// instead, the panels of both by turns, the bias of `up` behind that of `gate`. Rounded where a model rounds.
template <typename T>
static void linear(const T* x, const T* w, const T* bias, const T* plus, T* y, I M, I N, I K, bool gated, int threads) {
  constexpr bool narrow = sizeof(T) == 2;
  std::vector<float> wide(narrow ? M * K : 0);
  const I panels = (N + NR - 1) / NR, blocks = (M + MB - 1) / MB;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float c[2][MB * NR], b[narrow ? KB * NR : 1];
    if (narrow) {
#pragma omp for schedule(static)
      for (I i = 0; i < M * K; i++) wide[i] = to_float(x[i]);
    }
    const float* a = narrow ? wide.data() : (const float*)x;
#pragma omp for schedule(dynamic)  // a thread that the system keeps waiting holds up one item, not half of them
    for (I item = 0; item < blocks * panels; item++) {
      const I p = item / blocks, m0 = item % blocks * MB, m = std::min<I>(MB, M - m0), n = std::min<I>(NR, N - p * NR);
      for (int g = 0; g <= gated; g++) {
        for (I k0 = 0; k0 < K; k0 += KB) {
          const I k = std::min<I>(KB, K - k0);
          const T* panel = w + ((p * (1 + gated) + g) * K + k0) * NR;
          const float* from = a + m0 * K + k0;
          // Fetched meanwhile: of few rows the panel that this thread takes next, of many the rest of this one.
          const I reach = M <= MB && p + threads < panels ? threads * (1 + gated) * K : 192 / std::min<I>(m, MR);
          if (narrow && m > MR) {  // widened once for all rows
            for (I i = 0; i < k * NR; i += W) store(b + i, load(panel + i));
            product<float>(m, NR, from, K, b, NR, 0, b, c[g], NR, k, k0 > 0);
          } else {
            product<T>(m, NR, from, K, panel, NR, 0, panel + reach * NR, c[g], NR, k, k0 > 0);
          }
        }
        float add[NR] = {};
        for (I j = 0; bias && j < n; j++) add[j] = to_float(bias[g * N + p * NR + j]);
        for (I i = 0; i < m * NR; i += W) store(c[g] + i, rounded<T>(load(c[g] + i) + load(add + i % NR)));
      }
      for (I i = 0; gated && i < m * NR; i += W) {
        const V v = load(c[0] + i), e = exp_(v < 0 ? v : -v), s = v * ((v < 0 ? e : V{} + 1.f) / (1.f + e));
        store(c[0] + i, rounded<T>(s) * load(c[1] + i));
      }
      for (I r = 0; r < m; r++) {
        T* to = y + (m0 + r) * N + p * NR;
        float* row = c[0] + r * NR;
        if (plus) for (I j = 0; j < n; j++) row[j] += to_float(plus[(m0 + r) * N + p * NR + j]);
        if (n == NR) for (int j = 0; j < NR; j++) from_float(to[j], row[j]);
        else for (I j = 0; j < n; j++) from_float(to[j], row[j]);
      }
    }
  }
}

// A weight w[N], and what is added to the mean square.
template <typename T>
struct Norm { const T* w; I N; float eps; };

// y = x / sqrt(mean(x^2) + eps) * w for `parts` vectors in each of M rows, which begin `row` apart; rounded where a model rounds
template <typename T>
static void rms_norm(const T* x, const Norm<T>& norm, T* y, I M, I parts, I row, int threads) {
  const I N = norm.N;
#pragma omp parallel for num_threads(threads) schedule(static) if (M * parts * N > 1 << 15)
  for (I r = 0; r < M * parts; r++) {
    const I at = r / parts * row + r % parts * N;
    V squares = {};
    float rest = 0;
    I i = 0;
    for (; i + W <= N; i += W) { V v = load(x + at + i); squares += v * v; }
    for (; i < N; i++) rest += to_float(x[at + i]) * to_float(x[at + i]);
    const float scale = 1 / std::sqrt((sum(squares) + rest) / N + norm.eps);
    for (i = 0; i < N; i++) {
      T& to = y[at + i];
      from_float(to, to_float(x[at + i]) * scale);
      from_float(to, to_float(to) * to_float(norm.w[i]));
    }
  }
}

struct Span { I row, count, position, start, prefix, cut; };
struct Shape { I heads, groups, k_dim, v_dim, v_pad, window, q_row, k_row, v_row, turned; float scale, softcap; int threads; };

// The key or query x[k_dim] with its first `turned` dimensions turned to its position (rotary embedding, in halves).
template <typename T>
static void turn(const T* x, const T* cos, const T* sin, I row, float* to, const Shape& sh) {
  const I h = sh.turned / 2;
  cos += row * sh.turned, sin += row * sh.turned;
  for (I d = 0; d < h; d++) {
    const float a = to_float(x[d]), b = to_float(x[d + h]);
    to[d] = a * to_float(cos[d]) - b * to_float(sin[d]);
    to[d + h] = b * to_float(cos[d + h]) + a * to_float(sin[d + h]);
  }
  for (I d = 2 * h; d < sh.k_dim; d++) to[d] = to_float(x[d]);
}

// Everything that attention reads and writes.
template <typename T>
struct Memory { const T *q, *k, *v, *cos, *sin; T *keys, *values; const float* sinks; T* out; };

// Store the new keys, [tokens/BK][heads][BK/NR][k_dim][NR], and values, [tokens/BK][heads][BK][v_pad].
template <typename T>
static void write(const Memory<T>& io, const Span& s, const Shape& sh, std::vector<float>& scratch) {
  scratch.resize(sh.k_dim);
  for (I i = 0; i < s.count; i++) {
    const I at = s.start + s.position - s.cut + i, row = s.row + i;
    for (I h = 0; h < sh.heads; h++) {
      const I block = (at / BK * sh.heads + h) * BK;
      T* panel = io.keys + block * sh.k_dim + at % BK / NR * sh.k_dim * NR + at % NR;
      turn(io.k + row * sh.k_row + h * sh.k_dim, io.cos, io.sin, row, scratch.data(), sh);
      for (I d = 0; d < sh.k_dim; d++) from_float(panel[d * NR], scratch[d]);
      memcpy(io.values + (block + at % BK) * sh.v_pad, io.v + row * sh.v_row + h * sh.v_dim, sh.v_dim * sizeof(T));
    }
  }
}

// Attend with `count` positions of one span, from its `first` on, and the query heads of one key head.
template <typename T>
static void attend(const Memory<T>& io, const Span& s, I first, I count, I head, I then, const Shape& sh, std::vector<float>& scratch) {
  const I G = sh.groups, R = count * G, D = sh.k_dim, P = sh.v_pad;
  scratch.assign(R * (D + BK + P + 2), 0.f);
  float *qs = scratch.data(), *p = qs + R * D, *acc = p + R * BK, *top = acc + R * P, *total = top + R;
  for (I r = 0; r < R; r++) {
    const I row = s.row + first + r / G;
    turn(io.q + row * sh.q_row + (head * G + r % G) * D, io.cos, io.sin, row, qs + r * D, sh);
    for (I d = 0; d < D; d++) qs[r * D + d] *= sh.scale;
    top[r] = io.sinks ? io.sinks[head * G + r % G] : -INFINITY;
    total[r] = io.sinks ? 1.f : 0.f;
  }
  const I begin = s.position + first, end = begin + count;  // positions of the queries
  const I low = sh.window ? std::max<I>(0, begin - sh.window + 1) : 0;
  for (int own = s.cut ? 0 : 1; own < 2; own++) {
    const I from = own ? s.cut : 0, to = own ? end : s.cut, base = own ? s.start : s.prefix;
    for (I k0 = from + std::max<I>(0, low - from) / BK * BK; k0 < to; k0 += BK) {
      const I n = std::min<I>(BK, to - k0), block = ((base + k0 - from) / BK * sh.heads + head) * BK;
      const I after = own ? then : (s.start / BK * sh.heads + head) * BK;
      const I next = k0 + BK < to ? block + sh.heads * BK : after;  // is fetched while this one is computed with
      product(R, (n + NR - 1) / NR * NR, qs, D, io.keys + block * D, NR, D * NR, io.keys + next * D, p, BK, D, false);
      for (I r = 0; r < R; r++) {
        float* row = p + r * BK;
        const I at = begin + r / G, u = std::min(n, at + 1 - k0), l = sh.window ? at - sh.window + 1 - k0 : 0;
        if (sh.softcap) for (I j = 0; j < u; j++) row[j] = sh.softcap * std::tanh(row[j] / sh.softcap);
        for (I j = 0; j < std::min(l, n); j++) row[j] = -INFINITY;
        for (I j = std::max<I>(0, u); j < BK; j++) row[j] = -INFINITY;
        V most = load(row);
        for (I j = W; j < BK; j += W) { V x = load(row + j); most = x > most ? x : most; }
        float m = top[r];
        for (int i = 0; i < W; i++) m = std::max(m, most[i]);
        if (u <= 0 || l >= n) { memset(row, 0, BK * sizeof(float)); continue; }  // nothing here for this row
        V sums = {};
        for (I j = 0; j < BK; j += W) { V x = load(row + j); V e = x < -3e38f ? V{} : exp_(x - m); sums += e; store(row + j, e); }
        const float fade = exp_(V{} + (top[r] - m))[0] * (top[r] > -INFINITY);
        total[r] = total[r] * fade + sum(sums);
        top[r] = m;
        if (fade != 1.f) for (I d = 0; d < P; d += W) store(acc + r * P + d, load(acc + r * P + d) * fade);
      }
      product(R, P, p, BK, io.values + block * P, P, NR, io.values + next * P, acc, P, n, true);
    }
  }
  for (I r = 0; r < R; r++) {
    T* to = io.out + ((s.row + first + r / G) * sh.heads + head) * G * sh.v_dim + r % G * sh.v_dim;
    for (I d = 0; d < sh.v_dim; d++) from_float(to[d], acc[r * P + d] / total[r]);
  }
}

template <typename T>
static void attention(const Memory<T>& io, const Span* spans, I num_spans, const Shape& sh) {
  const I step = std::max<I>(1, ROWS / sh.groups);
  struct Item { I span, first, count; };
  std::vector<Item> items;
  for (I s = 0; s < num_spans; s++)
    for (I i = 0; i < spans[s].count; i += step) items.push_back({s, i, std::min(step, spans[s].count - i)});
  std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {  // the longest first: even threads
    return (spans[a.span].position + a.first) * a.count > (spans[b.span].position + b.first) * b.count;
  });
  std::atomic<I> next{0};
#pragma omp parallel num_threads(sh.threads)
  {
    std::vector<float> scratch;
#pragma omp for schedule(static)
    for (I s = 0; s < num_spans; s++) write(io, spans[s], sh, scratch);
    for (I i; (i = next++) < I(items.size()) * sh.heads;) {  // all keys are stored: the loop above ends with a barrier
      const Item& it = items[i / sh.heads];
      const I soon = std::min<I>(i + sh.threads, I(items.size()) * sh.heads - 1);  // what this thread may take next
      const Span& other = spans[items[soon / sh.heads].span];
      const I then = ((other.cut ? other.prefix : other.start) / BK * sh.heads + soon % sh.heads) * BK;
      attend(io, spans[it.span], it.first, it.count, i % sh.heads, then, sh, scratch);
    }
  }
}

// What a decoder layer consists of, beside its attention.
template <typename T>
struct Linear { const T *w, *bias; };
template <typename T>
struct Layer { Linear<T> qkv, o, gate_up, down; Norm<T> before, q, k, between; I size, inner, some, num_kept; const I* kept; };

// y = x + o(attention(norm(x))), then y += down(gated(norm(y))); if `some`, of the rows `kept` alone, of which there may be none.
template <typename T>
static void layer(const Layer<T>& l, const T* x, T* y, I M, Memory<T> io, const Span* spans, I num_spans, Shape sh, T* scratch) {
  const I q = sh.heads * sh.groups * sh.k_dim, k = sh.heads * sh.k_dim, wide = q + k + sh.heads * sh.v_dim;
  const I out = sh.heads * sh.groups * sh.v_dim, R = l.some ? l.num_kept : M;
  T *normed = scratch, *qkv = normed + M * l.size, *attended = qkv + M * wide, *chosen = attended + M * out, *inner = chosen + M * out;
  rms_norm(x, l.before, normed, M, 1, l.size, sh.threads);
  linear<T>(normed, l.qkv.w, l.qkv.bias, nullptr, qkv, M, wide, l.size, false, sh.threads);
  if (l.q.w) rms_norm(qkv, l.q, qkv, M, q / l.q.N, wide, sh.threads);
  if (l.k.w) rms_norm(qkv + q, l.k, qkv + q, M, k / l.k.N, wide, sh.threads);
  io.q = qkv, io.k = qkv + q, io.v = io.k + k, io.out = attended;
  sh.q_row = sh.k_row = sh.v_row = wide;
  attention(io, spans, num_spans, sh);
  for (I r = 0; l.some && r < R; r++) {
    memcpy(chosen + r * out, attended + l.kept[r] * out, out * sizeof(T));
    memcpy(y + r * l.size, x + l.kept[r] * l.size, l.size * sizeof(T));
  }
  linear<T>(l.some ? chosen : attended, l.o.w, l.o.bias, l.some ? y : x, y, R, l.size, out, false, sh.threads);
  rms_norm(y, l.between, normed, R, 1, l.size, sh.threads);
  linear<T>(normed, l.gate_up.w, l.gate_up.bias, nullptr, inner, R, l.inner, l.size, true, sh.threads);
  linear<T>(inner, l.down.w, l.down.bias, y, y, R, l.size, l.inner, false, sh.threads);
}

#define FUNCTIONS(T, NAME)                                                                                          \
  void linear_##NAME(const T* x, const T* w, const T* b, T* y, I M, I N, I K, bool gated, int threads) {            \
    linear<T>(x, w, b, nullptr, y, M, N, K, gated, threads);                                                        \
  }                                                                                                                 \
  void rms_norm_##NAME(const T* x, const T* w, T* y, I M, I N, float eps, int threads) {                            \
    rms_norm<T>(x, {w, N, eps}, y, M, 1, N, threads);                                                               \
  }                                                                                                                 \
  void attention_##NAME(const Memory<T>* io, const Span* spans, I num_spans, const Shape* shape) {                  \
    attention(*io, spans, num_spans, *shape);                                                                       \
  }                                                                                                                 \
  void layer_##NAME(const Layer<T>* l, const T* x, T* y, I M, const Memory<T>* io, const Span* spans, I num_spans,  \
                    const Shape* shape, T* scratch) {                                                               \
    layer(*l, x, y, M, *io, spans, num_spans, *shape, scratch);                                                     \
  }
extern "C" {
int panel() { return NR; }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
}
