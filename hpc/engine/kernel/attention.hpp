// Attention over the KV cache. A sequence has one extent, and may read a shared prefix in another.
#pragma once
#include <atomic>
#include <cmath>
#include <vector>

#include "tile.hpp"

struct Span {
  I row, count, position, start, prefix, cut;
};
struct Shape {
  I heads, groups, k_dim, v_dim, v_pad, window, q_row, k_row, v_row, turned, alibi_row;
  float scale, softcap;
  int threads;
};

// Apply the rotary embedding, in halves, to the first `turned` dimensions of a key or query x[k_dim].
template <typename T> static void turn(const T* x, const T* cos, const T* sin, I row, float* to, const Shape& sh) {
  const I h = sh.turned / 2;
  cos += row * sh.turned, sin += row * sh.turned;
  for (I d = 0; d < h; d++) {
    const float a = to_float(x[d]), b = to_float(x[d + h]);
    to[d] = a * to_float(cos[d]) - b * to_float(sin[d]);
    to[d + h] = b * to_float(cos[d + h]) + a * to_float(sin[d + h]);
  }
  for (I d = 2 * h; d < sh.k_dim; d++) to[d] = to_float(x[d]);
}

// Inputs and outputs of attention; `alibi` has a row of scores by position for each query head.
template <typename T> struct Memory {
  const T *q, *k, *v, *cos, *sin;
  T *keys, *values;
  const float *sinks, *alibi;
  T* out;
};

// The stored dimensions of keys and queries: an even number, the last one may be padding.
static inline I even(I dims) { return dims + dims % 2; }

// Store `count` new keys of one span, from its `first` on, [tokens/BK][heads][BK/NR][k_dim][NR], and values,
// [tokens/BK][heads][BK][v_pad]; where pairs are multiplied, keys [..][k_dim/2][NR][2] and values [..][BK/2][v_pad][2].
template <typename T>
static void write(const Memory<T>& io, const Span& s, I first, I count, const Shape& sh, std::vector<float>& scratch) {
  typedef typename Unit<T>::right B;
  constexpr int U = Unit<T>::size;
  const I D = even(sh.k_dim);
  scratch.assign(2 * D, 0.f);
  float *turned = scratch.data(), *narrow = turned + D;
  for (I i = first; i < first + count; i++) {
    const I at = s.start + s.position - s.cut + i, row = s.row + i;
    for (I h = 0; h < sh.heads; h++) {
      const I block = (at / BK * sh.heads + h) * BK;
      B* key = (B*)(io.keys + block * D + at % BK / NR * D * NR) + at % NR;
      turn(io.k + row * sh.k_row + h * sh.k_dim, io.cos, io.sin, row, turned, sh);
      copy(turned, D, (T*)narrow);
      for (I d = 0; d < D / U; d++) key[d * NR] = ((const B*)narrow)[d];
      const T* v = io.v + row * sh.v_row + h * sh.v_dim;
      T* value = io.values + (block + at % BK / U * U) * sh.v_pad + at % U;
      for (I d = 0; d < sh.v_dim; d++) value[d * U] = v[d];
    }
  }
}

// Attend with `count` positions of one span, from its `first` on, and the query heads of one key head.
template <typename T>
static void attend(const Memory<T>& io, const Span& s, I first, I count, I head, I then, const Shape& sh,
                   std::vector<float>& scratch) {
  typedef typename Unit<T>::left A;
  typedef typename Unit<T>::right B;
  typedef typename Unit<T>::number N;  // of queries and softmax: narrow numbers use half of the same memory
  constexpr int U = Unit<T>::size;
  const I G = sh.groups, R = count * G, D = even(sh.k_dim), P = sh.v_pad;
  scratch.assign(R * (D + BK + P + W + 1) + D + P, 0.f);
  float *qs = scratch.data(), *p = qs + R * D, *acc = p + R * BK, *total = acc + R * P,
        *top = total + R * W;  // total: by lanes
  float *turned = top + R, *tail = turned + D;
  for (I r = 0; r < R; r++) {
    const I row = s.row + first + r / G;
    turn(io.q + row * sh.q_row + (head * G + r % G) * sh.k_dim, io.cos, io.sin, row, turned, sh);
    copy(turned, D, (N*)(qs + r * D));
    top[r] = io.sinks ? io.sinks[head * G + r % G] : -INFINITY;
    total[r * W] = io.sinks ? 1.f : 0.f;
  }
  const I begin = s.position + first, end = begin + count;  // positions of the queries
  const I low = sh.window ? std::max<I>(0, begin - sh.window + 1) : 0;
  for (int own = s.cut ? 0 : 1; own < 2; own++) {
    const I from = own ? s.cut : 0, to = own ? end : s.cut, base = own ? s.start : s.prefix;
    for (I k0 = from + std::max<I>(0, low - from) / BK * BK; k0 < to; k0 += BK) {
      const I n = std::min<I>(BK, to - k0), block = ((base + k0 - from) / BK * sh.heads + head) * BK;
      const I after = own ? then : (s.start / BK * sh.heads + head) * BK;
      const I left = to - k0 - BK, more = left > 0 ? std::min<I>(BK, left) : BK;
      const I next = left > 0 ? block + sh.heads * BK : after;  // is fetched while this one is computed with
      const B *keys = (const B*)(io.keys + block * D), *values = (const B*)(io.values + block * P);
      const Ahead more_keys = {io.keys + next * D, more * D * I(sizeof(T))},
                  more_values = {io.values + next * P, more * P * I(sizeof(T))};
      product(R, (n + NR - 1) / NR * NR, (const A*)qs, D, keys, NR, D / U * NR, more_keys, p, BK, D / U, false);
      for (I r = 0; r < R; r++) {
        float* row = p + r * BK;
        const I at = begin + r / G, until = std::min(n, at + 1 - k0), since = sh.window ? at - sh.window + 1 - k0 : 0;
        if (until <= 0 || since >= n) {
          memset(row, 0, BK * sizeof(float));
          continue;
        }  // no key of this block is visible to this row
        const float* alibi = io.alibi ? io.alibi + (head * G + r % G) * sh.alibi_row + k0 : nullptr;
        V x[BK / W], peak = V{} - INFINITY, sums = {};
        for (int j = 0; j < BK / W; j++) {
          x[j] = load(row + j * W) * sh.scale;
          if (alibi) x[j] += load(alibi + j * W);
          for (int i = 0; sh.softcap && i < W; i++) x[j][i] = sh.softcap * std::tanh(x[j][i] / sh.softcap);
          const S key = lanes() + j * W;
          x[j] = (key < int(until)) & (key >= int(since)) ? x[j] : V{} - INFINITY;
          peak = x[j] > peak ? x[j] : peak;
        }
        const float m = std::max(top[r], largest(peak));
        for (int j = 0; j < BK / W; j++) {
          const V e = x[j] < -3e38f ? V{} : exp_(x[j] - m);
          sums += e;
          store((N*)row + j * W, e);
        }
        if (m > top[r]) {  // rescale the sums so far to the new maximum
          const V fade = exp_(V{} + (top[r] - m));
          store(total + r * W, load(total + r * W) * fade);
          for (I d = 0; d < P; d += W) store(acc + r * P + d, load(acc + r * P + d) * fade);
          top[r] = m;
        }
        store(total + r * W, load(total + r * W) + sums);
      }
      product(R, P, (const A*)p, BK, values, P, NR, more_values, acc, P, n / U, true);
      if (n % U) {  // behind the last key may be anything: 0 times that is not 0
        for (I d = 0; d < P; d++) ((T*)tail)[d * U] = ((const T*)values)[(n / U * P + d) * U];
        product(R, P, (const A*)p + n / U, BK, (const B*)tail, P, NR, Ahead{}, acc, P, 1, true);
      }
    }
  }
  for (I r = 0; r < R; r++) {
    T* to = io.out + ((s.row + first + r / G) * sh.heads + head) * G * sh.v_dim + r % G * sh.v_dim;
    const float share = 1 / sum(load(total + r * W));
    for (I d = 0; d < P; d += W) store(acc + r * P + d, load(acc + r * P + d) * share);
    copy(acc + r * P, sh.v_dim, to);
  }
}

template <typename T> static void attention(const Memory<T>& io, const Span* spans, I num_spans, const Shape& sh) {
  const I step = std::max<I>(1, ROWS / sh.groups);
  struct Item {
    I span, first, count;
  };
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
    for (I i = 0; i < I(items.size()); i++)
      write(io, spans[items[i].span], items[i].first, items[i].count, sh, scratch);
    for (I i; (i = next++) < I(items.size()) * sh.heads;) {  // all keys are stored: the loop above ends with a barrier
      const Item& it = items[i / sh.heads];
      const I soon = std::min<I>(i + sh.threads, I(items.size()) * sh.heads - 1);  // what this thread may take next
      const Span& other = spans[items[soon / sh.heads].span];
      const I then = ((other.cut ? other.prefix : other.start) / BK * sh.heads + soon % sh.heads) * BK;
      attend(io, spans[it.span], it.first, it.count, i % sh.heads, then, sh, scratch);
    }
  }
}
