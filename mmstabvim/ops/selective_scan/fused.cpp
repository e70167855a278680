// Fused selective scan for the CPU, float32: real or complex diagonal A.
//
//   h[t] = exp(dt[t] A) h[t-1] + w[t] u[t] B[t]
//   y[t] = sum_n C[t] h[t] + D u[t]       (complex A: twice the real part)
//
// with w = dt (Euler) or w = (exp(dt A) - 1) / A (zero-order hold).
//
// Vector lanes are channels, so one load of B[t] or C[t] serves a whole block
// of them. One task owns one direction of one sequence and one slab of
// neighbouring blocks and goes through time chunk by chunk: a chunk's
// temporaries stay in the cache. Sums over channels, slabs and sequences are
// taken in an order that depends on the shape of one direction alone. The
// derivation of the backward pass is in README.md.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SCAN_AVX512 1
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

inline vec splat(float x) { return vec{} + x; }

// --------------------------------------------------------- complex numbers

template <class T>
struct Pair {
  T re, im;
};
using Complex = Pair<vec>;

inline Complex operator+(Complex x, Complex y) {
  return {x.re + y.re, x.im + y.im};
}
inline Complex operator-(Complex x, Complex y) {
  return {x.re - y.re, x.im - y.im};
}
inline Complex operator*(Complex x, vec y) { return {x.re * y, x.im * y}; }
template <class T>
Complex operator*(vec x, Pair<T> y) {
  return {x * y.re, x * y.im};
}
template <class T>
Complex operator*(Complex x, Pair<T> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
inline Complex &operator+=(Complex &x, Complex y) { return x = x + y; }

template <class T>
vec times_conj(vec x, T y) {
  return x * y;
}
template <class T>
Complex times_conj(vec x, Pair<T> y) {
  return {x * y.re, -(x * y.im)};
}
template <class T>
Complex times_conj(Complex x, Pair<T> y) {
  return {x.re * y.re + x.im * y.im, x.im * y.re - x.re * y.im};
}

template <class T>
vec real_of_product(vec x, T y) {
  return x * y;
}
template <class T>
vec real_of_product(Complex x, Pair<T> y) {
  return x.re * y.re - x.im * y.im;
}

template <class T>
vec dot(vec x, T y) {
  return x * y;
}
template <class T>
vec dot(Complex x, Pair<T> y) {  // the real part of x times conj(y)
  return x.re * y.re + x.im * y.im;
}

// ------------------------------------------------------------- exponential

// 2^f - 1, |f| <= 1/2: absolute error 2e-9, relative error 5e-9
inline vec polynomial_exp2_less_1(vec f) {
  vec p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f;  // exactly 0 at 0: a zero step must not decay
}

constexpr float LOG2_E = 1.44269504f, LOG_2 = 0.69314718f;

// Adding this rounds to an integer, left in the low bits of the sum.
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23

inline vec times_exp2(vec x, vec rounded) {  // the result must be normal
  return (vec)((bits)x + ((bits)rounded << 23));
}

// 2^x, and 2^x - 1 without cancellation. Below the normal range 0 or nearly
// so, above it infinite, NaN stays NaN.
struct Exp2 {
  vec value, less_1;
};

inline Exp2 exp2_both(vec x) {
#if defined(SCAN_AVX512)
  vec f = _mm512_reduce_ps(x, 0);  // x - round(x), and 0 for infinite x
  vec p = polynomial_exp2_less_1(f), power = x - f;
  vec value = _mm512_scalef_ps(p + 1.0f, power);
  power = _mm512_scalef_ps(splat(1.0f), power);
  vec less_1 = power * p + (power - 1.0f);
#else
  vec rounded = x + ROUNDER;
  vec p = polynomial_exp2_less_1(x - (rounded - ROUNDER));
  vec outside = x < 0.0f ? vec{} : x * 3e38f;
  vec value = times_exp2(p + 1.0f, rounded);
  value = (x >= -126.0f) & (x < 127.5f) ? value : outside;
  vec power = times_exp2(splat(1.0f), rounded);
  vec less_1 = power * p + (power - 1.0f);
  less_1 = x < -64.0f ? splat(-1.0f) : less_1;
#endif
  return {value, x > 64.0f ? value : less_1};
}

inline vec exp2_any(vec x) { return exp2_both(x).value; }

inline vec exp_negative(vec x) {  // x <= 0 or NaN
  vec rounded = x * LOG2_E + ROUNDER;
  vec n = rounded - ROUNDER;
  vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  vec y = times_exp2(polynomial_exp2_less_1(f * LOG2_E) + 1.0f, rounded);
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

// ------------------------------------------------------------ sine, cosine

struct Circle {  // cos(x), sin(x), and cos(x) - 1 without cancellation
  vec cosine, sine, cosine_less_1;
};

// Beyond this the reduction below would lose digits.
constexpr float FAR_ANGLE = 65536.0f;

inline bool any_far(vec x) {
#if defined(SCAN_AVX512)
  return _mm512_cmp_ps_mask(_mm512_abs_ps(x), splat(FAR_ANGLE), _CMP_GT_OQ);
#else
  vec far = (vec)((x > FAR_ANGLE) | (x < -FAR_ANGLE));
#if defined(__AVX__)
  return _mm256_movemask_ps(far);
#elif defined(__x86_64__)
  return _mm_movemask_ps(far);
#else
  uint32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= ((bits)far)[i];
  return any;
#endif
#endif
}

__attribute__((noinline)) Circle circle_far(vec x) {
  Circle c{};
  for (int i = 0; i < LANES; i++) {
    c.cosine[i] = std::cos(x[i]);
    c.sine[i] = std::sin(x[i]);
  }
  c.cosine_less_1 = c.cosine - 1.0f;
  return c;
}

// Absolute error 1.2e-7.
inline Circle circle(vec x) {
  if (__builtin_expect(any_far(x), 0)) return circle_far(x);
  vec rounded = x * 0.318309886f + ROUNDER;
  vec k = rounded - ROUNDER;
  // pi in three parts: the products with the first ones are exact
  vec r = ((x - k * 3.140625f) - k * 9.67502594e-4f) - k * 1.50995799e-7f;
  vec z = r * r;
  vec s = 2.59975154e-6f * z - 1.98064788e-4f;
  s = (s * z + 8.33301542e-3f) * z - 1.66666570e-1f;
  s = r + s * (z * r);
  vec c = -2.60742179e-7f * z + 2.47617299e-5f;
  c = (c * z - 1.38884006e-3f) * z + 4.16666405e-2f;
  c = (c * z - 0.5f) * z;
  bits sign = (bits)rounded << 31;  // of (-1)^k
  vec cosine = (vec)((bits)(c + 1.0f) ^ sign);
  return {cosine, (vec)((bits)s ^ sign), k == 0.0f ? c : cosine - 1.0f};
}

// ---------------------------------------------- from A to one step's factors

// One state of a block of channels. Real A is stored times log2(e).
template <class V, bool HOLD>
struct Mode {
  V a;
};
template <class V>
struct Mode<V, true> {
  V a;
  V inverse;  // 1 / A, but 0 where A is 0 or nearly so
  vec flat;   // 1 there, else 0
};

inline vec decay(vec a, vec dt) { return exp2_any(dt * a); }
inline Complex decay(Complex a, vec dt) {
  vec size = exp2_any(dt * a.re * LOG2_E);
  Circle c = circle(dt * a.im);
  return {size * c.cosine, size * c.sine};
}

template <class V>
struct Step {  // exp(dt A), and w of the zero-order hold
  V decay, gain;
};

inline Step<vec> hold(const Mode<vec, true> &mode, vec dt) {
  Exp2 e = exp2_both(dt * mode.a);
  return {e.value, e.less_1 * mode.inverse + mode.flat * dt};
}
inline Step<Complex> hold(const Mode<Complex, true> &mode, vec dt) {
  Exp2 e = exp2_both(dt * mode.a.re * LOG2_E);
  Circle c = circle(dt * mode.a.im);
  vec im = e.value * c.sine;
  Complex less_1 = {e.less_1 * c.cosine + c.cosine_less_1, im};
  Complex gain = less_1 * mode.inverse;
  gain.re += mode.flat * dt;
  return {{e.value * c.cosine, im}, gain};
}

// dw/dA = dt^2 phi1'(dt A). Near 0 the power series of phi1' / phi1, whose
// terms decrease fast; elsewhere the quotient, which cancels near 0.
constexpr float NEAR = 0.5f;
constexpr float LAG_1 = 1 / 12.0f, LAG_3 = -1 / 720.0f, LAG_5 = 1 / 30240.0f;

inline vec lag(const Mode<vec, true> &mode, vec dt, vec decay, vec gain) {
  constexpr float SQUARE = LOG_2 * LOG_2;
  vec t = dt * mode.a, z = t * t;  // t = dt A log2(e)
  vec p = (LAG_5 * SQUARE * SQUARE * z + LAG_3 * SQUARE) * z + LAG_1;
  vec near = gain * dt * (0.5f + LOG_2 * t * p);
  vec far = (dt * decay - gain) * mode.inverse;
  return z < NEAR * NEAR / SQUARE ? near : far;
}
inline Complex lag(const Mode<Complex, true> &mode, vec dt, Complex decay,
                   Complex gain) {
  Complex x = mode.a * dt, z = x * x;
  Complex p = {LAG_5 * z.re + LAG_3, LAG_5 * z.im};
  p = p * z;
  p.re += LAG_1;
  p = p * x;
  p.re += 0.5f;
  Complex near = gain * dt * p, far = (decay * dt - gain) * mode.inverse;
  auto small = x.re * x.re + x.im * x.im < NEAR * NEAR;
  return {small ? near.re : far.re, small ? near.im : far.im};
}

// ----------------------------------------------------------- loads, stores

inline void load(const float *from, int count, vec &x) {
  x = vec{};  // absent lanes are 0
  if (count == LANES)
    std::memcpy(&x, from, sizeof x);
  else
    for (int i = 0; i < count; i++) x[i] = from[i];
}
inline void load(const float *from, int count, Complex &x) {
  float parts[2][LANES] = {};
  for (int i = 0; i < count; i++)
    parts[0][i] = from[2 * i], parts[1][i] = from[2 * i + 1];
  std::memcpy(&x, parts, sizeof x);
}

inline void store(float *to, vec x, int count) {
  if (count == LANES)
    std::memcpy(to, &x, sizeof x);
  else
    for (int i = 0; i < count; i++) to[i] = x[i];
}
inline void store(float *to, Complex x, int count) {
  float parts[2][LANES];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 0; i < count; i++)
    to[2 * i] = parts[0][i], to[2 * i + 1] = parts[1][i];
}

inline void store_sum(float *to, vec x) {
  float a[LANES];
  std::memcpy(a, &x, sizeof a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  *to = a[0];
}
inline void store_sum(float *to, Complex x) {
  store_sum(to, x.re);
  store_sum(to + 1, x.im);
}

// --------------------------------------------------- arguments, as fused.py

// Strides are in floats; channels or states are contiguous. A complex number
// is two neighbouring floats wherever it is in memory.
struct View {
  float *data;
  int64_t direction, batch, token, group;

  float *at(int64_t k, int64_t b, int64_t t, int64_t g) const {
    return data + k * direction + b * batch + t * token + g * group;
  }
};

// A constant B or C is (directions, groups, state, channels), with strides 0
// for batch and token. One that all groups share has stride 0 for the group.
struct Scan {
  int64_t directions, batch, length, groups, channels, state, chunk, slabs;
  int64_t threads, complex, hold, softplus;
  int64_t constant_b, constant_c, shared_b, shared_c;
  View u, delta, b, c, y;
  const float *a;        // (directions, groups, state, channels), see Mode
  const float *inverse;  // as a; with hold only
  const float *flat;     // as a, but real; with hold only
  const float *skip;     // (directions, dim), may be null
  const float *bias;     // (directions, dim), may be null
  const int64_t *reverse;  // (directions,)
  float *last;             // (directions, batch, groups, state, channels)
  float *borders;  // (directions, chunks, batch, groups, state, channels),
                   // may be null

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
  int64_t parts(bool shared) const { return slabs * (shared ? groups : 1); }
  // floats in a group's row of Gradients::sums
  int64_t sums_size() const {
    int64_t matrices = 1 + (constant_b != 0) + (constant_c != 0);
    return (matrices * state * (complex ? 2 : 1) + 2) * channels;
  }
};

struct Gradients {
  View dy, du, ddelta;
  const float *dlast;  // as last, may be null
  float *db, *dc;      // (directions, batch, length, groups or 1, state)
  float *db_parts, *dc_parts;  // of a slab, or of a slab and a group
  float *sums;                 // (directions, groups, sums_size)
  float *sums_batch;  // (directions, batch, groups, sums_size): dA, constant
                      // dB, constant dC, dD, ddelta_bias
};

// ------------------------------------------------------------- inner loops

template <class V>
struct PerToken {  // B or C of a group: one number for all lanes
  const float *first;
  int64_t step;
  float operator()(int k, int n) const { return first[k * step + n]; }
};
template <>
struct PerToken<Complex> {
  const float *first;
  int64_t step;
  Pair<float> operator()(int k, int n) const {
    const float *at = first + k * step + 2 * n;
    return {at[0], at[1]};
  }
};

template <class V>
struct Constant {  // one number per lane, for all tokens
  const V *lanes;
  V operator()(int, int n) const { return lanes[n]; }
};

struct Tokens {  // of one block in one chunk, in walking order
  // x is dt u; dx, ddt and held collect gradients
  std::vector<vec> u, dt, slope, x, y, dy, dx, ddt, held;
  explicit Tokens(int64_t n)
      : u(n), dt(n), slope(n), x(n), y(n), dy(n), dx(n), ddt(n), held(n) {}
};

template <class V>
struct History {  // (chunk, N) of one strip; gains with hold only
  std::vector<V> decays, gains, states;
};

template <int N, class V, bool HOLD, class MatrixB, class MatrixC>
void advance(int count, Tokens &tokens, const Mode<V, HOLD> *modes,
             MatrixB b, MatrixC c, V *state) {
  const vec *dt = tokens.dt.data(), *u = tokens.u.data();
  const vec *x = tokens.x.data();
  vec *y = tokens.y.data();
  V h[N];
  for (int n = 0; n < N; n++) h[n] = state[n];
  for (int k = 0; k < count; k++) {
    vec read = y[k];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      if constexpr (HOLD) {
        Step<V> step = hold(modes[n], dt[k]);
        h[n] = step.decay * h[n] + step.gain * u[k] * b(k, n);
      } else {
        h[n] = decay(modes[n].a, dt[k]) * h[n] + x[k] * b(k, n);
      }
      read += real_of_product(h[n], c(k, n));
    }
    y[k] = read;
  }
  for (int n = 0; n < N; n++) state[n] = h[n];
}

template <int N, class V, bool HOLD, class MatrixB>
void record(int count, const Tokens &tokens, const Mode<V, HOLD> *modes,
            MatrixB b, const V *state, History<V> &history) {
  const vec *dt = tokens.dt.data(), *u = tokens.u.data();
  const vec *x = tokens.x.data();
  V *decays = history.decays.data(), *gains = history.gains.data();
  V *states = history.states.data();
  V h[N];
  for (int n = 0; n < N; n++) h[n] = state[n];
  for (int k = 0; k < count; k++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      if constexpr (HOLD) {
        Step<V> step = hold(modes[n], dt[k]);
        h[n] = step.decay * h[n] + step.gain * u[k] * b(k, n);
        decays[k * N + n] = step.decay;
        gains[k * N + n] = step.gain;
      } else {
        V factor = decay(modes[n].a, dt[k]);
        h[n] = factor * h[n] + x[k] * b(k, n);
        decays[k * N + n] = factor;
      }
      states[k * N + n] = h[n];
    }
}

// Where sums over channels (per token) or over tokens (constant) collect.
template <class V>
struct Collector {
  V *lanes;
  int64_t step;
};

template <int N, class V, bool HOLD, class MatrixB, class MatrixC>
void retreat(int count, Tokens &tokens, const Mode<V, HOLD> *modes,
             MatrixB b, MatrixC c, const V *entering,
             const History<V> &history, V *carry, V *da, Collector<V> db,
             Collector<V> dc) {
  const vec *dt = tokens.dt.data(), *u = tokens.u.data();
  const vec *x = tokens.x.data(), *dy = tokens.dy.data();
  const V *decays = history.decays.data(), *gains = history.gains.data();
  const V *states = history.states.data();
  vec *dx = tokens.dx.data(), *ddt = tokens.ddt.data();
  vec *held = tokens.held.data();
  V next[N], sum_a[N];  // conj(decay[t+1]) dL/dh[t+1], and dA
  for (int n = 0; n < N; n++) next[n] = carry[n], sum_a[n] = da[n];
  for (int k = count - 1; k >= 0; k--) {
    const V *before = k ? states + (k - 1) * N : entering;
    V *db_k = db.lanes + k * db.step, *dc_k = dc.lanes + k * dc.step;
    vec sum_x = dx[k], sum_dt = ddt[k], sum_held = held[k];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      V g = next[n] + times_conj(dy[k], c(k, n));
      dc_k[n] += times_conj(dy[k], states[k * N + n]);
      next[n] = times_conj(g, decays[k * N + n]);
      V q = times_conj(next[n], before[n]);
      sum_dt += dot(q, modes[n].a);
      if constexpr (HOLD) {
        V factor = decays[k * N + n], gain = gains[k * N + n];
        V g_gain = times_conj(g, gain), g_b = times_conj(g, b(k, n));
        db_k[n] += g_gain * u[k];
        sum_x += dot(g_gain, b(k, n));
        sum_held += dot(g_b, factor);
        sum_a[n] +=
            times_conj(g_b * u[k], lag(modes[n], dt[k], factor, gain));
      } else {
        db_k[n] += g * x[k];
        sum_x += dot(g, b(k, n));
      }
      sum_a[n] += q * dt[k];
    }
    dx[k] = sum_x, ddt[k] = sum_dt;
    if constexpr (HOLD) held[k] = sum_held;
  }
  for (int n = 0; n < N; n++) carry[n] = next[n], da[n] = sum_a[n];
}

// ------------------------------------------------------------------- tasks

template <int N>
using Width = std::integral_constant<int, N>;

// Split the states into strips whose values fit in the vector registers.
template <int STRIP, class Run>
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
Span chunk_span(const Scan &s, bool reverse, int64_t index) {
  int64_t start = (reverse ? s.chunks() - 1 - index : index) * s.chunk;
  int64_t stop = start + s.chunk < s.length ? start + s.chunk : s.length;
  if (reverse) return {stop - 1, -1, int(stop - start)};
  return {start, 1, int(stop - start)};
}

template <class V, bool HOLD>
struct Block {  // up to LANES channels of one group, and what they carry
  int64_t channel;
  int count;
  vec skip, bias, dskip, dbias;
  std::vector<Mode<V, HOLD>> modes;        // one per state
  std::vector<V> b, c, state, da, db, dc;  // one per state
};

template <class V, bool HOLD>
class Task {
 public:
  Task(const Scan &scan, int64_t index) : s(scan), tokens(scan.chunk) {
    slab = index % s.slabs;
    group = index / s.slabs % s.groups;
    sequence = index / s.slabs / s.groups % s.batch;
    direction = index / s.slabs / s.groups / s.batch;
    int64_t all = (s.channels + LANES - 1) / LANES;
    int64_t stop = all * (slab + 1) / s.slabs;
    for (int64_t i = all * slab / s.slabs; i < stop; i++)
      blocks.push_back(make_block(i * LANES));
  }

  void forward() {
    for (auto &block : blocks) block.state.assign(s.state, V{});
    for (int64_t i = 0; i < s.chunks(); i++)
      for (auto &block : blocks) forward_chunk(block, i);
    for (auto &block : blocks)
      write_states(block, s.last + last_offset(), block.state);
  }

  void backward(const Gradients &g) {
    history.decays.resize(s.chunk * STRIP);
    history.states.resize(s.chunk * STRIP);
    if (HOLD) history.gains.resize(s.chunk * STRIP);
    lanes_b.resize(s.chunk * s.state);
    lanes_c.resize(s.chunk * s.state);
    for (auto &block : blocks) {
      block.da = block.db = block.dc = std::vector<V>(s.state);
      block.state.assign(s.state, V{});
      if (g.dlast) read_states(block, g.dlast + last_offset(), block.state);
    }
    for (int64_t i = s.chunks() - 1; i >= 0; i--) backward_chunk(g, i);
    for (auto &block : blocks) write_sums(g, block);
  }

 private:
  using BlockT = Block<V, HOLD>;
  static constexpr bool COMPLEX = !std::is_same<V, vec>::value;
  static constexpr int FLOATS = COMPLEX ? 2 : 1;  // of one number
  static constexpr int STRIP = 4;
  // conjugate modes are not stored, but add to the output
  static constexpr float SIDES = COMPLEX ? 2.0f : 1.0f;

  const Scan &s;
  int64_t slab, group, sequence, direction;
  Tokens tokens;
  std::vector<BlockT> blocks;
  std::vector<V> entering;  // (state,) at a chunk's border
  History<V> history;
  std::vector<V> lanes_b, lanes_c;  // (chunk, state): dB, dC before the sum

  BlockT make_block(int64_t channel) {
    BlockT block{};
    int64_t left = s.channels - channel, row = direction * s.groups + group;
    block.channel = channel;
    block.count = left < LANES ? int(left) : LANES;
    int64_t dim = row * s.channels + channel;
    if (s.skip) load(s.skip + dim, block.count, block.skip);
    if (s.bias) load(s.bias + dim, block.count, block.bias);
    make_modes(block, row * s.state * s.channels + channel);
    if (s.constant_b)
      read_states(block, s.b.at(direction, 0, 0, group), block.b);
    if (s.constant_c)
      read_states(block, s.c.at(direction, 0, 0, group), block.c);
    return block;
  }

  void make_modes(BlockT &block, int64_t offset) const {
    block.modes.resize(s.state);
    for (auto &mode : block.modes) {
      load(s.a + offset * FLOATS, block.count, mode.a);
      if constexpr (HOLD) {
        load(s.inverse + offset * FLOATS, block.count, mode.inverse);
        load(s.flat + offset, block.count, mode.flat);
      }
      offset += s.channels;
    }
  }

  // Offsets into Scan::last and Scan::borders.
  int64_t last_offset() const { return state_offset(direction); }
  int64_t border_offset(int64_t chunk) const {
    return state_offset(direction * s.chunks() + chunk);
  }
  int64_t state_offset(int64_t row) const {
    return ((row * s.batch + sequence) * s.groups + group) * s.state *
           s.channels * FLOATS;
  }

  void read_states(const BlockT &block, const float *from,
                   std::vector<V> &to) const {
    to.resize(s.state);
    for (int64_t n = 0; n < s.state; n++)
      load(from + (n * s.channels + block.channel) * FLOATS, block.count,
           to[n]);
  }

  void write_states(const BlockT &block, float *to,
                    const std::vector<V> &from) const {
    for (int64_t n = 0; n < s.state; n++)
      store(to + (n * s.channels + block.channel) * FLOATS, from[n],
            block.count);
  }

  vec read_token(const View &view, const BlockT &block, int64_t t) const {
    vec x;
    load(view.at(direction, sequence, t, group) + block.channel, block.count,
         x);
    return x;
  }

  void write_token(const View &view, const BlockT &block, int64_t t,
                   vec x) const {
    store(view.at(direction, sequence, t, group) + block.channel, x,
          block.count);
  }

  Span span_of(int64_t index) const {
    return chunk_span(s, s.reverse[direction], index);
  }

  void read_tokens(const BlockT &block, Span span) {
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

  PerToken<V> per_token(const View &view, Span span, int n) const {
    const float *first = view.at(direction, sequence, span.first, group);
    return {first + n * FLOATS, view.token * span.step};
  }

  // Call run(width, n, B, C) for each strip; B and C in the form they have.
  template <class Run>
  void in_strips_with(const BlockT &block, Span span, Run run) const {
    bool constant = s.constant_b || s.constant_c;
    in_strips<STRIP>(s.state, constant, [&](auto width, int n) {
      PerToken<V> b = per_token(s.b, span, n), c = per_token(s.c, span, n);
      if constexpr (width == 1) {
        Constant<V> lane_b{block.b.data() + n}, lane_c{block.c.data() + n};
        if (s.constant_b && s.constant_c) return run(width, n, lane_b, lane_c);
        if (s.constant_b) return run(width, n, lane_b, c);
        if (s.constant_c) return run(width, n, b, lane_c);
      }
      run(width, n, b, c);
    });
  }

  void forward_chunk(BlockT &block, int64_t index) {
    Span span = span_of(index);
    if (s.borders)
      write_states(block, s.borders + border_offset(index), block.state);
    read_tokens(block, span);
    for (int i = 0; i < span.count; i++)
      tokens.y[i] = block.skip * (tokens.u[i] / SIDES);
    in_strips_with(block, span, [&](auto width, int n, auto b, auto c) {
      advance<width>(span.count, tokens, &block.modes[n], b, c,
                     &block.state[n]);
    });
    for (int i = 0; i < span.count; i++)
      write_token(s.y, block, span.first + i * span.step,
                  SIDES * tokens.y[i]);
  }

  void backward_chunk(const Gradients &g, int64_t index) {
    Span span = span_of(index);
    std::memset((void *)lanes_b.data(), 0, lanes_b.size() * sizeof(V));
    std::memset((void *)lanes_c.data(), 0, lanes_c.size() * sizeof(V));
    for (auto &block : blocks) backward_block(g, block, index, span);
    if (!s.constant_b) write_matrix(g.db_parts, s.shared_b, lanes_b, span);
    if (!s.constant_c) write_matrix(g.dc_parts, s.shared_c, lanes_c, span);
  }

  void backward_block(const Gradients &g, BlockT &block, int64_t index,
                      Span span) {
    read_tokens(block, span);
    for (int i = 0; i < span.count; i++) {
      vec dy = read_token(g.dy, block, span.first + i * span.step);
      tokens.dy[i] = SIDES * dy;
      tokens.dx[i] = tokens.ddt[i] = tokens.held[i] = vec{};
    }
    read_states(block, s.borders + border_offset(index), entering);
    in_strips_with(block, span, [&](auto width, int n, auto b, auto c) {
      record<width>(span.count, tokens, &block.modes[n], b, &entering[n],
                    history);
      retreat<width>(span.count, tokens, &block.modes[n], b, c, &entering[n],
                     history, &block.state[n], &block.da[n],
                     collector(s.constant_b, block.db, lanes_b, n),
                     collector(s.constant_c, block.dc, lanes_c, n));
    });
    write_token_gradients(g, block, span);
  }

  Collector<V> collector(bool constant, std::vector<V> &own,
                         std::vector<V> &shared, int n) const {
    if (constant) return {&own[n], 0};
    return {&shared[n], s.state};
  }

  void write_token_gradients(const Gradients &g, BlockT &block, Span span) {
    Tokens &k = tokens;
    for (int i = 0; i < span.count; i++) {
      int64_t t = span.first + i * span.step;
      vec dy = k.dy[i] / SIDES, du = HOLD ? k.dx[i] : k.dx[i] * k.dt[i];
      if (s.skip) du += block.skip * dy;
      vec ddt = COMPLEX ? k.ddt[i] : k.ddt[i] * LOG_2;  // see Mode
      ddt += (HOLD ? k.held[i] : k.dx[i]) * k.u[i];
      if (HOLD) ddt += 0.0f * k.dt[i];  // an infinite step stays visible
      ddt *= k.slope[i];
      write_token(g.du, block, t, du);
      write_token(g.ddelta, block, t, ddt);
      block.dskip += dy * k.u[i];
      block.dbias += ddt;
    }
  }

  // One sum over the lanes for each token of the chunk and each state.
  void write_matrix(float *to, bool shared, const std::vector<V> &lanes,
                    Span span) const {
    int64_t part = shared ? slab * s.groups + group : slab;
    int64_t groups = shared ? 1 : s.groups, at = shared ? 0 : group;
    int64_t row = (part * s.directions + direction) * s.batch + sequence;
    for (int k = 0; k < span.count; k++) {
      int64_t token = row * s.length + span.first + k * span.step;
      for (int64_t n = 0; n < s.state; n++)
        store_sum(to + ((token * groups + at) * s.state + n) * FLOATS,
                  lanes[k * s.state + n]);
    }
  }

  void write_sums(const Gradients &g, const BlockT &block) const {
    int64_t row = (direction * s.batch + sequence) * s.groups + group;
    float *to = g.sums_batch + row * s.sums_size();
    int64_t matrix = s.state * s.channels * FLOATS;
    write_states(block, to, block.da);
    to += matrix;
    if (s.constant_b) {
      write_states(block, to, block.db);
      to += matrix;
    }
    if (s.constant_c) {
      write_states(block, to, block.dc);
      to += matrix;
    }
    store(to + block.channel, block.dskip, block.count);
    store(to + s.channels + block.channel, block.dbias, block.count);
  }
};

template <class V, bool HOLD, class Run>
void run_tasks(const Scan &s, Run run) {
  int64_t tasks = s.directions * s.batch * s.groups * s.slabs;
#pragma omp parallel for schedule(dynamic) num_threads(s.threads) \
    if (s.threads > 1)
  for (int64_t i = 0; i < tasks; i++) {
    Task<V, HOLD> task(s, i);
    run(task);
  }
}

template <class Run>
void for_each_task(const Scan &s, Run run) {
  if (s.complex)
    s.hold ? run_tasks<Complex, true>(s, run)
           : run_tasks<Complex, false>(s, run);
  else
    s.hold ? run_tasks<vec, true>(s, run) : run_tasks<vec, false>(s, run);
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

void sum_parts(const Scan &s, const float *from, float *to, bool shared) {
  if (!from || from == to) return;
  int64_t groups = shared ? 1 : s.groups, floats = s.complex ? 2 : 1;
  int64_t size = s.directions * s.batch * s.length * groups * s.state;
  sum_rows(from, to, s.parts(shared), size * floats, s.threads);
}

}  // namespace

extern "C" void mmstabvim_scan_forward(const Scan *s) {
  for_each_task(*s, [](auto &task) { task.forward(); });
}

extern "C" void mmstabvim_scan_backward(const Scan *s, const Gradients *g) {
  for_each_task(*s, [&](auto &task) { task.backward(*g); });
  int64_t size = s->groups * s->sums_size();
  for (int64_t k = 0; k < s->directions; k++)
    sum_rows(g->sums_batch + k * s->batch * size, g->sums + k * size,
             s->batch, size, s->threads);
  sum_parts(*s, g->db_parts, g->db, s->shared_b);
  sum_parts(*s, g->dc_parts, g->dc, s->shared_c);
}
