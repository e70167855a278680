// Fused selective scan for the CPU: real diagonal A, float32, b_disc='euler'.
//
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]
//   y[t] = sum_n C[t] h[t] + D u[t]
//
// Vector lanes are channels, so one load of B[t] or C[t] serves a whole block
// of them. One task owns one sequence and one slab of neighbouring blocks and
// goes through time chunk by chunk: a chunk's temporaries stay in the cache.
// Sums over channels, slabs and sequences are taken in an order that depends
// on the shape alone. The derivation of the backward pass is in README.md.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SCAN_AVX512 1
#include <immintrin.h>
#endif

namespace {

#if defined(SCAN_AVX512)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

// ------------------------------------------------------------ elementwise

inline vec splat(float x) { return vec{} + x; }

inline vec polynomial_exp2(vec f) {  // |f| <= 1/2, relative error 2e-9
  vec p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;  // exactly 1 at 0: a zero step must not decay
}

// Adding this rounds to an integer, left in the low bits of the sum.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23

inline vec times_exp2(vec x, vec rounded) {  // the result must be normal
  return (vec)((bits)x + ((bits)rounded << 23));
}

// Below the normal range 0 or nearly so, above it infinite, NaN stays NaN.
inline vec exp2_any(vec x) {
#if defined(SCAN_AVX512)
  vec f = _mm512_reduce_ps(x, 0);  // x - round(x), and 0 for infinite x
  return _mm512_scalef_ps(polynomial_exp2(f), x - f);
#else
  vec rounded = x + ROUNDER;
  vec inside = times_exp2(polynomial_exp2(x - (rounded - ROUNDER)), rounded);
  vec outside = x < 0.0f ? vec{} : x * 3e38f;
  return (x >= -126.0f) & (x < 127.5f) ? inside : outside;
#endif
}

inline vec exp_negative(vec x) {  // x <= 0 or NaN
  vec rounded = x * 1.44269504f + ROUNDER;
  vec n = rounded - ROUNDER;
  vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  vec y = times_exp2(polynomial_exp2(f * 1.44269504f), rounded);
  return x < -87.0f ? vec{} : (x == x ? y : x);
}

// softplus(x) and its derivative; the former is x itself above 20
inline void softplus(vec x, vec &value, vec &slope) {
  vec e = exp_negative(x < 0.0f ? x : -x);
  vec s = e / (2.0f + e);  // log(1 + e) = 2 atanh(s)
  vec z = s * s;
  vec p = (0.14012229f * z + 0.13999571f) * z + 0.20010850f;
  p = (p * z + 0.33333206f) * z;
  value = (x > 0.0f ? x : vec{}) + 2.0f * (s + s * p);
  slope = (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

inline vec load(const float *from, int count) {  // absent lanes are 0
  vec x{};
  if (count == LANES)
    std::memcpy(&x, from, sizeof x);
  else
    for (int i = 0; i < count; i++) x[i] = from[i];
  return x;
}

inline void store(float *to, vec x, int count) {
  if (count == LANES)
    std::memcpy(to, &x, sizeof x);
  else
    for (int i = 0; i < count; i++) to[i] = x[i];
}

inline float sum_lanes(vec x) {
  float a[LANES];
  std::memcpy(a, &x, sizeof a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

// --------------------------------------------------- arguments, as fused.py

struct View {  // strides in elements; channels or states are contiguous
  float *data;
  int64_t batch, token, group;

  float *at(int64_t b, int64_t t, int64_t g) const {
    return data + b * batch + t * token + g * group;
  }
};

// A constant B or C is (groups, state, channels), with strides 0 elsewhere.
struct Scan {
  int64_t batch, length, groups, channels, state, chunk, slabs, threads;
  int64_t softplus, reverse, constant_b, constant_c;
  View u, delta, b, c, y;
  const float *a;     // (groups, state, channels), times log2(e)
  const float *skip;  // (dim,), may be null
  const float *bias;  // (dim,), may be null
  float *last;        // (batch, groups, state, channels)
  float *borders;     // (chunks, batch, groups, state, channels), may be null
};

struct Gradients {
  View dy, du, ddelta;
  const float *dlast;  // as last, may be null
  float *db, *dc;      // (batch, length, groups, state)
  float *db_slabs, *dc_slabs;  // (slabs, batch, length, groups, state)
  float *sums;                 // (groups, rows, channels)
  float *sums_batch;  // (batch, groups, rows, channels); rows: dA,
                      // constant dB, constant dC, dD, ddelta_bias
};

// ------------------------------------------------------------- inner loops

struct PerToken {  // B or C of a group: one number for all lanes
  const float *first;
  int64_t step;
  float operator()(int k, int n) const { return first[k * step + n]; }
};

struct Constant {  // one number per lane, for all tokens
  const vec *lanes;
  vec operator()(int, int n) const { return lanes[n]; }
};

template <int N, class MatrixB, class MatrixC>
void advance(int count, const vec *dt, const vec *x, const vec *a, MatrixB b,
             MatrixC c, vec *state, vec *y) {
  vec h[N];
  for (int n = 0; n < N; n++) h[n] = state[n];
  for (int k = 0; k < count; k++) {
    vec read = y[k];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      h[n] = exp2_any(dt[k] * a[n]) * h[n] + x[k] * b(k, n);
      read += h[n] * c(k, n);
    }
    y[k] = read;
  }
  for (int n = 0; n < N; n++) state[n] = h[n];
}

template <int N, class MatrixB>
void record(int count, const vec *dt, const vec *x, const vec *a, MatrixB b,
            const vec *state, vec *decays, vec *states) {
  vec h[N];
  for (int n = 0; n < N; n++) h[n] = state[n];
  for (int k = 0; k < count; k++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      vec decay = exp2_any(dt[k] * a[n]);
      h[n] = decay * h[n] + x[k] * b(k, n);
      decays[k * N + n] = decay;
      states[k * N + n] = h[n];
    }
}

// Where sums over channels (per token) or over tokens (constant) collect.
struct Collector {
  vec *lanes;
  int64_t step;
};

template <int N, class MatrixB, class MatrixC>
void retreat(int count, const vec *dt, const vec *x, const vec *dy,
             const vec *a, MatrixB b, MatrixC c, const vec *entering,
             const vec *decays, const vec *states, vec *carry, vec *da,
             Collector db, Collector dc, vec *dx, vec *ddt) {
  vec next[N], sum_a[N];  // decay[t+1] dL/dh[t+1], and dA
  for (int n = 0; n < N; n++) next[n] = carry[n], sum_a[n] = da[n];
  for (int k = count - 1; k >= 0; k--) {
    const vec *before = k ? states + (k - 1) * N : entering;
    vec *db_k = db.lanes + k * db.step, *dc_k = dc.lanes + k * dc.step;
    vec sum_x = dx[k], sum_dt = ddt[k];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      vec g = next[n] + dy[k] * c(k, n);
      dc_k[n] += dy[k] * states[k * N + n];
      db_k[n] += g * x[k];
      sum_x += g * b(k, n);
      next[n] = g * decays[k * N + n];
      vec q = next[n] * before[n];
      sum_a[n] += q * dt[k];
      sum_dt += q * a[n];
    }
    dx[k] = sum_x, ddt[k] = sum_dt;
  }
  for (int n = 0; n < N; n++) carry[n] = next[n], da[n] = sum_a[n];
}

// ------------------------------------------------------------------- tasks

constexpr int STRIP = 4;

template <int N>
using Width = std::integral_constant<int, N>;

// Split the states into strips whose values fit in the vector registers.
template <class Run>
void in_strips(int64_t state, bool constant, Run run) {
  int n = 0;
  if (!constant)
    for (; n + STRIP <= state; n += STRIP) run(Width<STRIP>{}, n);
  for (; n < state; n++) run(Width<1>{}, n);
}

struct Span {  // tokens first, first + 1, ... or first, first - 1, ...
  int64_t first, step;
  int count;
};

// Chunks are cut from token 0 whatever the direction.
Span chunk_span(const Scan &s, int64_t index) {
  int64_t chunks = (s.length + s.chunk - 1) / s.chunk;
  int64_t start = (s.reverse ? chunks - 1 - index : index) * s.chunk;
  int64_t stop = start + s.chunk < s.length ? start + s.chunk : s.length;
  if (s.reverse) return {stop - 1, -1, int(stop - start)};
  return {start, 1, int(stop - start)};
}

struct Block {  // up to LANES channels of one group, and what they carry
  int64_t channel;
  int count;
  vec skip, bias, dskip, dbias;
  std::vector<vec> a, b, c, state, da, db, dc;  // one per state
};

struct Tokens {  // of one block in one chunk, in walking order
  std::vector<vec> u, dt, slope, x, y, dy, dx, ddt;
  explicit Tokens(int64_t n)
      : u(n), dt(n), slope(n), x(n), y(n), dy(n), dx(n), ddt(n) {}
};

class Task {
 public:
  Task(const Scan &scan, int64_t index) : s(scan), tokens(scan.chunk) {
    slab = index % s.slabs;
    group = index / s.slabs % s.groups;
    sequence = index / s.slabs / s.groups;
    int64_t all = (s.channels + LANES - 1) / LANES;
    int64_t stop = all * (slab + 1) / s.slabs;
    for (int64_t i = all * slab / s.slabs; i < stop; i++)
      blocks.push_back(make_block(i * LANES));
  }

  void forward() {
    for (Block &block : blocks) block.state.assign(s.state, vec{});
    int64_t chunks = (s.length + s.chunk - 1) / s.chunk;
    for (int64_t i = 0; i < chunks; i++)
      for (Block &block : blocks) forward_chunk(block, i, chunk_span(s, i));
    for (Block &block : blocks)
      write_states(block, s.last + state_offset(0), block.state);
  }

  void backward(const Gradients &g) {
    decays.resize(s.chunk * STRIP);
    states.resize(s.chunk * STRIP);
    lanes_b.resize(s.chunk * s.state);
    lanes_c.resize(s.chunk * s.state);
    for (Block &block : blocks) {
      block.da = block.db = block.dc = std::vector<vec>(s.state);
      block.state.assign(s.state, vec{});
      if (g.dlast)
        read_states(block, g.dlast + state_offset(0), block.state);
    }
    for (int64_t i = (s.length + s.chunk - 1) / s.chunk - 1; i >= 0; i--)
      backward_chunk(g, i, chunk_span(s, i));
    for (Block &block : blocks) write_sums(g, block);
  }

 private:
  const Scan &s;
  int64_t slab, group, sequence;
  Tokens tokens;
  std::vector<Block> blocks;
  std::vector<vec> entering;          // (state,) at a chunk's border
  std::vector<vec> decays, states;    // (chunk, N) of one strip
  std::vector<vec> lanes_b, lanes_c;  // (chunk, state): dB, dC before the sum

  Block make_block(int64_t channel) {
    Block block{};
    int64_t left = s.channels - channel, dim = group * s.channels + channel;
    block.channel = channel;
    block.count = left < LANES ? int(left) : LANES;
    if (s.skip) block.skip = load(s.skip + dim, block.count);
    if (s.bias) block.bias = load(s.bias + dim, block.count);
    read_states(block, s.a + group * s.state * s.channels, block.a);
    if (s.constant_b) read_states(block, s.b.at(0, 0, group), block.b);
    if (s.constant_c) read_states(block, s.c.at(0, 0, group), block.c);
    return block;
  }

  // Offset of this sequence and group in (chunks, batch, groups, state,
  // channels).
  int64_t state_offset(int64_t chunk) const {
    return ((chunk * s.batch + sequence) * s.groups + group) * s.state *
           s.channels;
  }

  void read_states(const Block &block, const float *from,
                   std::vector<vec> &to) const {
    to.resize(s.state);
    for (int64_t n = 0; n < s.state; n++)
      to[n] = load(from + n * s.channels + block.channel, block.count);
  }

  void write_states(const Block &block, float *to,
                    const std::vector<vec> &from) const {
    for (int64_t n = 0; n < s.state; n++)
      store(to + n * s.channels + block.channel, from[n], block.count);
  }

  vec read_token(const View &view, const Block &block, int64_t t) const {
    return load(view.at(sequence, t, group) + block.channel, block.count);
  }

  void write_token(const View &view, const Block &block, int64_t t,
                   vec x) const {
    store(view.at(sequence, t, group) + block.channel, x, block.count);
  }

  void read_tokens(const Block &block, Span span) {
    for (int k = 0; k < span.count; k++) {
      int64_t t = span.first + k * span.step;
      tokens.u[k] = read_token(s.u, block, t);
      vec dt = read_token(s.delta, block, t) + block.bias;
      vec slope = splat(1.0f);
      if (s.softplus) softplus(dt, dt, slope);
      tokens.dt[k] = dt;
      tokens.slope[k] = slope;
      tokens.x[k] = dt * tokens.u[k];
    }
  }

  PerToken per_token(const View &view, Span span, int n) const {
    return {view.at(sequence, span.first, group) + n, view.token * span.step};
  }

  // Call run(width, n, B, C) for each strip; B and C in the form they have.
  template <class Run>
  void in_strips_with(const Block &block, Span span, Run run) const {
    in_strips(s.state, s.constant_b || s.constant_c, [&](auto width, int n) {
      PerToken b = per_token(s.b, span, n), c = per_token(s.c, span, n);
      if constexpr (width == 1) {
        Constant lane_b{block.b.data() + n}, lane_c{block.c.data() + n};
        if (s.constant_b && s.constant_c) return run(width, n, lane_b, lane_c);
        if (s.constant_b) return run(width, n, lane_b, c);
        if (s.constant_c) return run(width, n, b, lane_c);
      }
      run(width, n, b, c);
    });
  }

  void forward_chunk(Block &block, int64_t index, Span span) {
    Tokens &k = tokens;
    if (s.borders)
      write_states(block, s.borders + state_offset(index), block.state);
    read_tokens(block, span);
    for (int i = 0; i < span.count; i++)
      k.y[i] = s.skip ? block.skip * k.u[i] : vec{};
    in_strips_with(block, span, [&](auto width, int n, auto b, auto c) {
      advance<width>(span.count, k.dt.data(), k.x.data(), &block.a[n], b, c,
                     &block.state[n], k.y.data());
    });
    for (int i = 0; i < span.count; i++)
      write_token(s.y, block, span.first + i * span.step, k.y[i]);
  }

  void backward_chunk(const Gradients &g, int64_t index, Span span) {
    std::memset((void *)lanes_b.data(), 0, lanes_b.size() * sizeof(vec));
    std::memset((void *)lanes_c.data(), 0, lanes_c.size() * sizeof(vec));
    for (Block &block : blocks) backward_block(g, block, index, span);
    if (!s.constant_b) write_matrix(g.db_slabs, lanes_b, span);
    if (!s.constant_c) write_matrix(g.dc_slabs, lanes_c, span);
  }

  void backward_block(const Gradients &g, Block &block, int64_t index,
                      Span span) {
    Tokens &k = tokens;
    read_tokens(block, span);
    for (int i = 0; i < span.count; i++) {
      k.dy[i] = read_token(g.dy, block, span.first + i * span.step);
      k.dx[i] = k.ddt[i] = vec{};
    }
    read_states(block, s.borders + state_offset(index), entering);
    in_strips_with(block, span, [&](auto width, int n, auto b, auto c) {
      record<width>(span.count, k.dt.data(), k.x.data(), &block.a[n], b,
                    &entering[n], decays.data(), states.data());
      retreat<width>(span.count, k.dt.data(), k.x.data(), k.dy.data(),
                     &block.a[n], b, c, &entering[n], decays.data(),
                     states.data(), &block.state[n], &block.da[n],
                     collector(s.constant_b, block.db, lanes_b, n),
                     collector(s.constant_c, block.dc, lanes_c, n),
                     k.dx.data(), k.ddt.data());
    });
    write_token_gradients(g, block, span);
  }

  Collector collector(bool constant, std::vector<vec> &own,
                      std::vector<vec> &shared, int n) const {
    if (constant) return {&own[n], 0};
    return {&shared[n], s.state};
  }

  void write_token_gradients(const Gradients &g, Block &block, Span span) {
    const float log_2 = 0.69314718f;  // a is A / log(2)
    Tokens &k = tokens;
    for (int i = 0; i < span.count; i++) {
      int64_t t = span.first + i * span.step;
      vec du = k.dx[i] * k.dt[i];
      if (s.skip) du += block.skip * k.dy[i];
      vec ddelta = (k.ddt[i] * log_2 + k.dx[i] * k.u[i]) * k.slope[i];
      write_token(g.du, block, t, du);
      write_token(g.ddelta, block, t, ddelta);
      block.dskip += k.dy[i] * k.u[i];
      block.dbias += ddelta;
    }
  }

  // One sum over the lanes for each token of the chunk and each state.
  void write_matrix(float *to, const std::vector<vec> &lanes,
                    Span span) const {
    for (int k = 0; k < span.count; k++) {
      int64_t row = (slab * s.batch + sequence) * s.length + span.first +
                    k * span.step;
      for (int64_t n = 0; n < s.state; n++)
        to[(row * s.groups + group) * s.state + n] =
            sum_lanes(lanes[k * s.state + n]);
    }
  }

  void write_sums(const Gradients &g, const Block &block) const {
    int64_t constants = (s.constant_b != 0) + (s.constant_c != 0);
    int64_t rows = s.state * (1 + constants) + 2;
    float *to = g.sums_batch +
                (sequence * s.groups + group) * rows * s.channels;
    write_states(block, to, block.da);
    to += s.state * s.channels;
    if (s.constant_b) {
      write_states(block, to, block.db);
      to += s.state * s.channels;
    }
    if (s.constant_c) {
      write_states(block, to, block.dc);
      to += s.state * s.channels;
    }
    store(to + block.channel, block.dskip, block.count);
    store(to + s.channels + block.channel, block.dbias, block.count);
  }

};

template <class Run>
void for_each_task(const Scan &s, Run run) {
  int64_t tasks = s.batch * s.groups * s.slabs;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads) \
    if (s.threads > 1)
  for (int64_t i = 0; i < tasks; i++) {
    Task task(s, i);
    run(task);
  }
}

// Sum the rows of (rows, size), first to last.
void sum_rows(const float *from, float *to, int64_t rows, int64_t size,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < size; i++) {
    float sum = from[i];
    for (int64_t row = 1; row < rows; row++) sum += from[row * size + i];
    to[i] = sum;
  }
}

}  // namespace

extern "C" void mmstabvim_scan_forward(const Scan *s) {
  for_each_task(*s, [](Task &task) { task.forward(); });
}

extern "C" void mmstabvim_scan_backward(const Scan *s, const Gradients *g) {
  for_each_task(*s, [&](Task &task) { task.backward(*g); });
  int64_t constants = (s->constant_b != 0) + (s->constant_c != 0);
  int64_t rows = s->state * (1 + constants) + 2;
  sum_rows(g->sums_batch, g->sums, s->batch, s->groups * rows * s->channels,
           s->threads);
  int64_t size = s->batch * s->length * s->groups * s->state;
  if (g->db_slabs && g->db_slabs != g->db)
    sum_rows(g->db_slabs, g->db, s->slabs, size, s->threads);
  if (g->dc_slabs && g->dc_slabs != g->dc)
    sum_rows(g->dc_slabs, g->dc, s->slabs, size, s->threads);
}
