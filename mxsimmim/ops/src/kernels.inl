// The loops of kernels.h, for whatever instruction set the including file is compiled for. Written for the compiler's
// vectoriser; nothing of the standard library may be instantiated here, or the linker could give code for one
// instruction set to callers that need another.
#include <stdint.h>

#include "kernels.h"

namespace simmim {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float load(float value) { return value; }
inline float load(Bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline void store(float& to, float value) { to = value; }
inline void store(Bf16& to, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet = (bits >> 16) | 0x40u;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// e^x by Cody and Waite's reduction and a polynomial of degree 6; relative error below 3e-7 for x in [-87, 88].
inline float exponential(float x) {
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  float whole = __builtin_floorf(__builtin_fmaf(x, 1.44269504f, 0.5f));
  float rest = __builtin_fmaf(whole, -0.693359375f, x);
  rest = __builtin_fmaf(whole, 2.12194440e-4f, rest);
  float value = 1.f / 720.f;
  value = __builtin_fmaf(value, rest, 1.f / 120.f);
  value = __builtin_fmaf(value, rest, 1.f / 24.f);
  value = __builtin_fmaf(value, rest, 1.f / 6.f);
  value = __builtin_fmaf(value, rest, 0.5f);
  value = __builtin_fmaf(value, rest, 1.f);
  value = __builtin_fmaf(value, rest, 1.f);
  return value * bits_to_float(uint32_t(int32_t(whole) + 127) << 23);
}

struct Normal {
  float below, density;  // of the standard normal distribution: P(X < x), and e^(-x^2/2)
};

inline Normal normal(float x) {
  float size = __builtin_fabsf(x) * 0.70710678f;
  float density = exponential(-size * size);
  float t = 1.f / __builtin_fmaf(0.3275911f, size, 1.f);
  float tail = 1.061405429f;
  tail = __builtin_fmaf(tail, t, -1.453152027f);
  tail = __builtin_fmaf(tail, t, 1.421413741f);
  tail = __builtin_fmaf(tail, t, -0.284496736f);
  tail = __builtin_fmaf(tail, t, 0.254829592f);
  tail *= 0.5f * t * density;
  return {x < 0 ? tail : 1.f - tail, density};
}

template <class T>
void normalise(const float* __restrict x, const float* __restrict weight, const float* __restrict bias, int64_t n,
               float eps, T* __restrict y, float* mean, float* rstd) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  float average = sum / float(n), squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - average) * (x[i] - average);
  float scale = 1.f / __builtin_sqrtf(squares / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) store(y[i], (x[i] - average) * scale * weight[i] + bias[i]);
  *mean = average;
  *rstd = scale;
}

template <class T> void gelu(const T* __restrict h, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float value = load(h[i]);
    store(y[i], value * normal(value).below);
  }
}

template <class T, bool forward>
void gelu_both(const T* __restrict h, T* __restrict gradient, T* __restrict y, float* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float value = load(h[i]);
    Normal at = normal(value);
    float change = load(gradient[i]) * (at.below + value * at.density * 0.39894228f);
    store(gradient[i], change);
    sums[i] += change;
    if (forward) store(y[i], value * at.below);
  }
}

template <class T> void gelu_backward(const T* h, T* gradient, T* y, float* sums, int64_t n) {
  if (y) gelu_both<T, true>(h, gradient, y, sums, n);
  else gelu_both<T, false>(h, gradient, y, sums, n);
}

// In lanes, because the order of comparisons, which decides about NaN, is not the compiler's to change.
inline float greatest(const float* s, int64_t n) {
  constexpr int64_t width = 16;
  float lanes[width], top = s[0];
  for (int64_t j = 0; j < width; ++j) lanes[j] = top;
  int64_t i = 0;
  for (; i + width <= n; i += width)
    for (int64_t j = 0; j < width; ++j) lanes[j] = s[i + j] > lanes[j] ? s[i + j] : lanes[j];
  for (; i < n; ++i) top = s[i] > top ? s[i] : top;
  for (int64_t j = 0; j < width; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

template <class T>
void softmax(float* __restrict s, float factor, const float* __restrict bias, const float* __restrict mask, int64_t n,
             T* __restrict p) {
  if (bias)
    for (int64_t i = 0; i < n; ++i) s[i] = factor * s[i] + bias[i];
  else
    for (int64_t i = 0; i < n; ++i) s[i] *= factor;
  if (mask)
    for (int64_t i = 0; i < n; ++i) s[i] += mask[i];
  float top = greatest(s, n), sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    s[i] = exponential(s[i] - top);
    sum += s[i];
  }
  float scale = 1.f / sum;
  for (int64_t i = 0; i < n; ++i) store(p[i], s[i] * scale);
}

template <class T>
void softmax_backward(const T* __restrict p, float* __restrict gradient, float factor, T* __restrict ds,
                      float* __restrict sums, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += load(p[i]) * gradient[i];
  for (int64_t i = 0; i < n; ++i) {
    float value = load(p[i]) * (gradient[i] - sum);
    gradient[i] = value;
    store(ds[i], factor * value);
  }
  if (sums)
    for (int64_t i = 0; i < n; ++i) sums[i] += gradient[i];
}

template <class T> void convert(const float* __restrict x, float factor, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(y[i], factor * x[i]);
}

template <class T>
void convert_scaled(const float* __restrict x, float factor, const float* __restrict gamma, T* __restrict y,
                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(y[i], factor * gamma[i] * x[i]);
}

template <class T> void widen(const T* __restrict x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = load(x[i]);
}

template <class T> void add(const T* __restrict x, float* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += load(x[i]);
}

template <class T>
float errors(const float* x, const float* __restrict target, float weight, bool square, T* slope, int64_t n) {
  float sum = 0;
  if (square) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float d = x[i] - target[i];
      sum += d * d;
      store(slope[i], 2.f * weight * d);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      float d = x[i] - target[i];
      sum += __builtin_fabsf(d);
      store(slope[i], d > 0.f ? weight : d < 0.f ? -weight : 0.f);
    }
  }
  return weight * sum;
}

void normalise_backward(const float* __restrict x, float mean, float rstd, const float* __restrict weight,
                        const float* __restrict dy, int64_t n, const float* __restrict base, float* __restrict dx,
                        float* __restrict dweight, float* __restrict dbias) {
  float sum = 0, product = 0;
  for (int64_t i = 0; i < n; ++i) {
    float change = dy[i] * weight[i];
    sum += change;
    product += change * (x[i] - mean);
  }
  sum /= float(n);
  product *= rstd * rstd / float(n);
  if (dx && base)
    for (int64_t i = 0; i < n; ++i) dx[i] = base[i] + rstd * (dy[i] * weight[i] - sum - (x[i] - mean) * product);
  else if (dx)
    for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (dy[i] * weight[i] - sum - (x[i] - mean) * product);
  if (dweight)
    for (int64_t i = 0; i < n; ++i) dweight[i] += dy[i] * (x[i] - mean) * rstd;
  if (dbias)
    for (int64_t i = 0; i < n; ++i) dbias[i] += dy[i];
}

void scale(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void residual(const float* __restrict x, const float* __restrict branch, float factor, const float* __restrict gamma,
              float* __restrict y, int64_t n) {
  if (gamma)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] + branch[i] * gamma[i] * factor;
  else
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] + branch[i] * factor;
}

void dot(const float* __restrict a, const float* __restrict b, int64_t n, double* __restrict lanes) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += double(a[i + j]) * double(b[i + j]);
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += double(a[i + j]) * double(b[i + j]);
}

void add_row(const uint8_t* __restrict row, int32_t weight, int32_t* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += weight * int32_t(row[i]);
}

void to_bytes(const int32_t* __restrict sums, uint8_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t value = sums[i] >> 22;
    out[i] = uint8_t(value < 0 ? 0 : value > 255 ? 255 : value);
  }
}

void adamw(const AdamW& given, const float* __restrict grad, float* __restrict weight, float* __restrict mean,
           float* __restrict var, Bf16* __restrict copy, int64_t n) {
  constexpr int64_t block = 1024;  // its arrays stay in the innermost cache from loop to loop
  const AdamW a = given;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = start + block < n ? start + block : n;
    // A loop of its own, lest decay and step become one fma: PyTorch rounds between them, which tells after ten steps.
    if (a.kept != 1)
      for (int64_t i = start; i < end; ++i) weight[i] *= a.kept;
    for (int64_t i = start; i < end; ++i) {
      float g = grad[i] * a.scale;
      float m = a.beta1 * mean[i] + a.rest1 * g;
      float v = a.beta2 * var[i] + a.rest2 * (g * g);
      mean[i] = m;
      var[i] = v;
      weight[i] -= a.rate * m / (__builtin_sqrtf(v) + a.epsilon);
    }
    if (copy)
      for (int64_t i = start; i < end; ++i) store(copy[i], weight[i]);
  }
}

template <class T> constexpr RowKernels<T> row_kernels() {
  return {normalise<T>, gelu<T>,           gelu_backward<T>, softmax<T>, softmax_backward<T>,
          convert<T>,   convert_scaled<T>, widen<T>,         add<T>,     errors<T>};
}

constexpr Kernels table{
    row_kernels<float>(), row_kernels<Bf16>(), normalise_backward, scale, residual, dot, add_row, to_bytes, adamw};

}  // namespace
}  // namespace simmim
