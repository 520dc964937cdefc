// Matrix products and attention on CPUs. The sums of a row do not depend on the other rows of the batch: every output
// is one chain of fused multiply-adds in a fixed order, whichever tile, chunk or thread computes it.
// Sums are float32. Weights and cache are float32 or bfloat16; bfloat16 numbers are multiplied as pairs where the CPU
// can do that, and widened to float32 first where it cannot. Plain C calls, compiled for the machine it runs on.
#include <cmath>
#include <vector>

#include "attention.hpp"
#include "tile.hpp"

// Convert a row of x to what a tile multiplies, with a zero behind an odd number of values.
template <typename T> static void widen(const T* x, I k, float* to) {
  for (I i = 0; i < k; i++) to[i] = to_float(x[i]);
}
static void widen(const bf16* x, I k, pair* to) {
  to[k / 2] = {0};
  memcpy(to, x, k * sizeof(bf16));
}

// y[M][N] = x[M][K] * w^T + bias + plus, w packed in panels [N/NR][K][NR] (of pairs [N/NR][K/2][NR][2]).
// `gated`: y = silu(gate) * up instead, the panels of both alternating, the bias of `up` behind that of `gate`.
// Rounds to T where a model does.
template <typename T>
static void linear(const T* x, const T* w, const T* bias, const T* plus, T* y, I M, I N, I size, bool gated,
                   int threads) {
  typedef typename Unit<T>::left A;
  typedef typename Unit<T>::right B;
  constexpr bool narrow = sizeof(B) == 2;
  const bool as_is = sizeof(A) == sizeof(T) * Unit<T>::size && size % Unit<T>::size == 0;
  const I K = (size + Unit<T>::size - 1) / Unit<T>::size;
  std::vector<A> wide(as_is ? 0 : M * K);
  const I panels = (N + NR - 1) / NR, blocks = (M + MB - 1) / MB;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float c[2][MB * NR], b[narrow ? KB * NR : 1];
    if (!as_is) {
#pragma omp for schedule(static)
      for (I r = 0; r < M; r++) widen(x + r * size, size, wide.data() + r * K);
    }
    const A* a = as_is ? (const A*)x : wide.data();
#pragma omp for schedule(dynamic)  // a thread that the system keeps waiting holds up one item, not half of them
    for (I item = 0; item < blocks * panels; item++) {
      const I p = item / blocks, m0 = item % blocks * MB, m = std::min<I>(MB, M - m0), n = std::min<I>(NR, N - p * NR);
      for (int g = 0; g <= gated; g++) {
        for (I k0 = 0; k0 < K; k0 += KB) {
          const I k = std::min<I>(KB, K - k0);
          const B* panel = (const B*)w + ((p * (1 + gated) + g) * K + k0) * NR;
          const A* from = a + m0 * K + k0;
          // Of the panel that is next, here or on another thread, each block of rows fetches its part.
          const I bytes = k * NR * sizeof(B), then = p + (blocks > 1 ? 1 : threads), begin = m0 / MB * bytes / blocks;
          const Ahead ahead = {(const char*)(panel + (then - p) * (1 + gated) * K * NR) + begin,
                               then < panels ? bytes / blocks : 0};
          if constexpr (narrow) {
            if (m > MR) {  // widened once for all rows
              for (I i = 0; i < k * NR; i += W) store(b + i, load(panel + i));
              product(m, NR, from, K, b, NR, 0, ahead, c[g], NR, k, k0 > 0);
              continue;
            }
          }
          product(m, NR, from, K, panel, NR, 0, ahead, c[g], NR, k, k0 > 0);
        }
      }
      alignas(64) float add[2][NR] = {}, end[NR];
      for (int g = 0; bias && g <= gated; g++)
        for (I j = 0; j < n; j++) add[g][j] = to_float(bias[g * N + p * NR + j]);
      for (I r = 0; r < m; r++) {
        const I at = (m0 + r) * N + p * NR;
        for (I j = 0; j < NR; j += W) {
          V v = rounded<T>(load(c[0] + r * NR + j) + load(add[0] + j));
          if (gated) {
            const V up = rounded<T>(load(c[1] + r * NR + j) + load(add[1] + j)), e = exp_(v < 0 ? v : -v);
            v = rounded<T>(v * ((v < 0 ? e : V{} + 1.f) / (1.f + e))) * up;
          }
          if (n == NR) store(y + at + j, plus ? v + load(plus + at + j) : v);
          else store(end + j, v);
        }
        for (I j = 0; n < NR && j < n; j++) from_float(y[at + j], plus ? end[j] + to_float(plus[at + j]) : end[j]);
      }
    }
  }
}

// An RMS norm: its weight w[N] and the epsilon that is added to the mean square.
template <typename T> struct Norm {
  const T* w;
  I N;
  float eps;
};

// y = x / sqrt(mean(x^2) + eps) * w for `parts` vectors in each of M rows, which begin `row` apart; rounded where a
// model rounds
template <typename T> static void rms_norm(const T* x, const Norm<T>& norm, T* y, I M, I parts, I row, int threads) {
  const I N = norm.N;
#pragma omp parallel for num_threads(threads) schedule(static) if (M * parts * N > 1 << 15)
  for (I r = 0; r < M * parts; r++) {
    const I at = r / parts * row + r % parts * N;
    V squares = {};
    float rest = 0;
    I i = 0;
    for (; i + W <= N; i += W) {
      V v = load(x + at + i);
      squares += v * v;
    }
    for (; i < N; i++) rest += to_float(x[at + i]) * to_float(x[at + i]);
    const float scale = 1 / std::sqrt((sum(squares) + rest) / N + norm.eps);
    for (i = 0; i + W <= N; i += W) store(y + at + i, rounded<T>(load(x + at + i) * scale) * load(norm.w + i));
    for (; i < N; i++) {
      T& to = y[at + i];
      from_float(to, to_float(x[at + i]) * scale);
      from_float(to, to_float(to) * to_float(norm.w[i]));
    }
  }
}

// The parts of a decoder layer, except its attention.
template <typename T> struct Linear {
  const T *w, *bias;
};
template <typename T> struct Layer {
  Linear<T> qkv, o, gate_up, down;
  Norm<T> before, q, k, between;
  I size, inner, some, num_kept;
  const I* kept;
};

// y = x + o(attention(norm(x))), then y += down(gated(norm(y))); if `some`, of the rows `kept` alone, of which there
// may be none.
template <typename T>
static void layer(const Layer<T>& l, const T* x, T* y, I M, Memory<T> io, const Span* spans, I num_spans, Shape sh,
                  T* scratch) {
  const I q = sh.heads * sh.groups * sh.k_dim, k = sh.heads * sh.k_dim, wide = q + k + sh.heads * sh.v_dim;
  const I out = sh.heads * sh.groups * sh.v_dim, R = l.some ? l.num_kept : M;
  T *normed = scratch, *qkv = normed + M * l.size, *attended = qkv + M * wide, *chosen = attended + M * out,
    *inner = chosen + M * out;
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

#define FUNCTIONS(T, NAME)                                                                                         \
  void linear_##NAME(const T* x, const T* w, const T* b, T* y, I M, I N, I K, bool gated, int threads) {           \
    linear<T>(x, w, b, nullptr, y, M, N, K, gated, threads);                                                       \
  }                                                                                                                \
  void rms_norm_##NAME(const T* x, const T* w, T* y, I M, I N, float eps, int threads) {                           \
    rms_norm<T>(x, {w, N, eps}, y, M, 1, N, threads);                                                              \
  }                                                                                                                \
  void attention_##NAME(const Memory<T>* io, const Span* spans, I num_spans, const Shape* shape) {                 \
    attention(*io, spans, num_spans, *shape);                                                                      \
  }                                                                                                                \
  void layer_##NAME(const Layer<T>* l, const T* x, T* y, I M, const Memory<T>* io, const Span* spans, I num_spans, \
                    const Shape* shape, T* scratch) {                                                              \
    layer(*l, x, y, M, *io, spans, num_spans, *shape, scratch);                                                    \
  }
extern "C" {
int panel() { return NR; }
int pair_size() { return Unit<bf16>::size; }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
}
