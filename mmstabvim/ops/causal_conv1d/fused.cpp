// Depthwise causal convolution and SiLU for the CPU, channels last, float32.
//
//   pre[i] = bias + sum_k tap[k] x[i - k]        y[i] = silu(pre[i])
//   g[i] = dy[i] silu'(pre[i])                  dx[i] = sum_k tap[k] g[i + k]
//   dtap[k] = sum_i g[i] x[i - k]               dbias = sum_i g[i]
//
// i counts tokens in walking order; x is 0 before the first of them and g
// after the last. One task owns a span of tokens of one sequence and goes
// through it row by row: the loops over channels become vector code. Sums over
// tokens are taken in an order that depends on the shape alone.

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// ------------------------------------------------------------ elementwise

inline float exp_negative(float x) {  // x <= 0 or NaN; 1.5 ulp
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  float rounded = x * 1.44269504f + rounder;
  float n = rounded - rounder;
  float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2, two parts
  float p = 1.3814467e-3f * f + 8.368781e-3f;
  p = p * f + 4.1668393e-2f;
  p = p * f + 1.666652e-1f;
  p = p * f + 4.9999994e-1f;
  float y = (p * f) * f + f + 1.0f;  // relative error 5e-9 before rounding
  uint32_t bits, exponent;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&exponent, &rounded, sizeof exponent);
  bits += exponent << 23;  // times 2^n
  std::memcpy(&y, &bits, sizeof y);
  return x < -87.0f ? 0.0f : (x == x ? y : x);
}

struct Sigmoid {
  float value, rest;  // rest is 1 - value, without cancellation
  explicit Sigmoid(float x) {
    float e = exp_negative(x < 0.0f ? x : -x);
    float share = 1.0f / (1.0f + e);
    value = (x < 0.0f ? e : 1.0f) * share;
    rest = (x < 0.0f ? 1.0f : e) * share;
  }
};

inline float silu(float x) { return x * Sigmoid(x).value; }

inline float silu_slope(float x) {
  Sigmoid s(x);
  return s.value * (1.0f + x * s.rest);
}

// --------------------------------------------------- arguments, as fused.py

struct View {  // strides in elements; channels are contiguous
  float *data;
  int64_t batch, token;
};

struct Conv {
  int64_t batch, length, dim, width, spans, threads, reverse, silu;
  int64_t accumulate;      // backward: add to dx, which another direction wrote
  View x, y, dy, dx;       // forward: x, y; backward: x, dy, dx
  const float *taps;       // (width, dim), the last for the token itself
  const float *bias;       // (dim,), may be null
  float *parts;            // (batch, spans, width + 1, dim): dtaps, dbias
  float *dweight, *dbias;  // (dim, width), (dim,)
};

// ------------------------------------------------------------------- tasks

template <int W>
using Rows = std::array<const float *, W>;

template <class Run>
inline void for_each_channel(int64_t dim, Run run) {
#pragma omp simd
  for (int64_t d = 0; d < dim; d++) run(d);
}

template <int W>
class Task {
 public:
  Task(const Conv &conv, int64_t index)
      : c(conv), dim(conv.dim), zeros(conv.dim), ring(W * conv.dim) {
    sequence = index / c.spans;
    start = c.length * (index % c.spans) / c.spans;
    stop = c.length * (index % c.spans + 1) / c.spans;
    bias = c.bias ? c.bias : zeros.data();
  }

  void forward() const {
    for (int64_t i = start; i < stop; i++) {
      Rows<W> x = past(i);
      float *y = row(c.y, i);
      if (c.silu)
        for_each_channel(dim, [&](int64_t d) { y[d] = silu(convolve(x, d)); });
      else
        for_each_channel(dim, [&](int64_t d) { y[d] = convolve(x, d); });
    }
  }

  // Tokens after the span lend their g to dx, no more.
  void backward(float *part) {
    std::memset(part, 0, (W + 1) * dim * sizeof(float));
    for (int64_t i = start; i < stop + W - 1; i++) {
      write_g(i);
      if (i < stop) add_to_sums(i, part);
      if (i - (W - 1) >= start) write_dx(i - (W - 1));
    }
  }

 private:
  const Conv &c;
  int64_t dim, sequence, start, stop;
  std::vector<float> zeros;  // (dim,)
  std::vector<float> ring;   // (W, dim): g of the last W tokens
  const float *bias;

  float *row(const View &view, int64_t i) const {
    int64_t t = c.reverse ? c.length - 1 - i : i;
    return view.data + sequence * view.batch + t * view.token;
  }

  float *g_row(int64_t i) { return ring.data() + i % W * dim; }

  const float *tap(int k) const { return c.taps + (W - 1 - k) * dim; }

  Rows<W> past(int64_t i) const {
    Rows<W> x;
    for (int k = 0; k < W; k++) x[k] = i < k ? zeros.data() : row(c.x, i - k);
    return x;
  }

  float weigh(const Rows<W> &rows, int64_t d, float sum) const {
#pragma GCC unroll 8
    for (int k = 0; k < W; k++) sum += tap(k)[d] * rows[k][d];
    return sum;
  }

  float convolve(const Rows<W> &x, int64_t d) const {
    return weigh(x, d, bias[d]);
  }

  void write_g(int64_t i) {
    float *g = g_row(i);
    if (i >= c.length) {
      std::memset(g, 0, dim * sizeof(float));
      return;
    }
    const float *dy = row(c.dy, i);
    Rows<W> x = past(i);
    if (c.silu)
      for_each_channel(dim, [&](int64_t d) {
        g[d] = dy[d] * silu_slope(convolve(x, d));
      });
    else
      std::memcpy(g, dy, dim * sizeof(float));
  }

  void add_to_sums(int64_t i, float *part) {
    const float *g = g_row(i);
    Rows<W> x = past(i);
    for_each_channel(dim, [&](int64_t d) {
#pragma GCC unroll 8
      for (int k = 0; k < W; k++)
        part[(W - 1 - k) * dim + d] += g[d] * x[k][d];
      part[W * dim + d] += g[d];
    });
  }

  void write_dx(int64_t i) {
    Rows<W> g;
    for (int k = 0; k < W; k++) g[k] = g_row(i + k);
    float *dx = row(c.dx, i);
    if (c.accumulate)
      for_each_channel(dim, [&](int64_t d) { dx[d] = weigh(g, d, dx[d]); });
    else
      for_each_channel(dim, [&](int64_t d) { dx[d] = weigh(g, d, 0.0f); });
  }
};

template <int W, class Run>
void for_each_task(const Conv &c, Run run) {
  int64_t tasks = c.batch * c.spans;
#pragma omp parallel for schedule(dynamic) num_threads(c.threads) \
    if (c.threads > 1)
  for (int64_t i = 0; i < tasks; i++) {
    Task<W> task(c, i);
    run(task, i);
  }
}

// Add up the parts, first to last, the taps into the layout of the weight.
void sum_parts(const Conv &c) {
  int64_t size = (c.width + 1) * c.dim;
  std::vector<double> sums(c.parts, c.parts + size);
  for (int64_t i = 1; i < c.batch * c.spans; i++)
    for (int64_t k = 0; k < size; k++) sums[k] += c.parts[i * size + k];
  for (int64_t d = 0; d < c.dim; d++) {
    for (int64_t k = 0; k < c.width; k++)
      c.dweight[d * c.width + k] = float(sums[k * c.dim + d]);
    c.dbias[d] = float(sums[c.width * c.dim + d]);
  }
}

template <int W>
using Width = std::integral_constant<int, W>;

// Call run with the width as a constant: 8 at most, as fused.py makes sure.
template <int W = 8, class Run>
void with_width(int64_t width, Run run) {
  if (width == W)
    run(Width<W>{});
  else if constexpr (W > 1)
    with_width<W - 1>(width, run);
}

}  // namespace

extern "C" void mmstabvim_conv_forward(const Conv *c) {
  with_width(c->width, [&](auto width) {
    for_each_task<width>(*c, [](auto &task, int64_t) { task.forward(); });
  });
}

extern "C" void mmstabvim_conv_backward(const Conv *c) {
  int64_t size = (c->width + 1) * c->dim;
  with_width(c->width, [&](auto width) {
    for_each_task<width>(*c, [&](auto &task, int64_t i) {
      task.backward(c->parts + i * size);
    });
  });
  sum_parts(*c);
}
