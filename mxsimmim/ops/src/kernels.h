// Loops over rows of numbers, compiled once for each instruction set and chosen when the library is loaded.
//
// T is float or Bf16; a row has n or `width` elements. None of these starts threads.
#pragma once

#include <cstdint>

namespace simmim {

struct Bf16 {
  uint16_t bits;
};

// For each of the two element types.
template <class T> struct RowKernels {
  // y = (x - mean) * rstd * weight + bias, and its two statistics.
  void (*normalise)(const float* x, const float* weight, const float* bias, int64_t n, float eps, T* y, float* mean,
                    float* rstd);
  // h to gelu(h); erf after Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
  void (*gelu)(const T* h, T* y, int64_t n);
  // gradient *= gelu'(h), y = gelu(h) unless null, and sums += gradient.
  void (*gelu_backward)(const T* h, T* gradient, T* y, float* sums, int64_t n);
  // p = softmax(factor * s + bias + mask), the last two of which may be null. s is overwritten.
  void (*softmax)(float* s, float factor, const float* bias, const float* mask, int64_t n, T* p);
  // The gradient of s / factor, d = p * (gradient - sum(p * gradient)): ds = factor * d, and sums += d unless null.
  void (*softmax_backward)(const T* p, float* gradient, float factor, T* ds, float* sums, int64_t n);
  void (*convert)(const float* x, float factor, T* y, int64_t n);                             // y = factor * x
  void (*convert_scaled)(const float* x, float factor, const float* gamma, T* y, int64_t n);  // y = factor * gamma * x
  void (*widen)(const T* x, float* y, int64_t n);                                             // y = x
  void (*add)(const T* x, float* sums, int64_t n);                                            // sums += x
  // The sum of weight * |d|, or of weight * d^2 if `square`, d = x - target; slope, which may lie where x does, is its
  // derivative. There is none at d = 0, where that of |d| is 0.
  float (*errors)(const float* x, const float* target, float weight, bool square, T* slope, int64_t n);
};

struct AdamW {
  float rate, kept;  // learning rate, with the bias correction in it; what decay leaves of a weight, of 1
  float scale;       // of gradients
  float beta1, beta2, rest1, rest2, epsilon;  // rest = 1 - beta
};

constexpr int64_t LANES = 16;

struct Kernels {
  RowKernels<float> f32;
  RowKernels<Bf16> bf16;
  // dx = base + the gradient through normalisation of dy; dweight, dbias += (all may be null but dy).
  void (*normalise_backward)(const float* x, float mean, float rstd, const float* weight, const float* dy, int64_t n,
                             const float* base, float* dx, float* dweight, float* dbias);
  void (*scale)(float* x, float factor, int64_t n);  // x *= factor
  void (*residual)(const float* x, const float* branch, float factor, const float* gamma, float* y, int64_t n);
  // Element i of both is multiplied and added to lanes[i % LANES].
  void (*dot)(const float* a, const float* b, int64_t n, double* lanes);
  // Whole numbers, so that all instruction sets give the same: sums += weight * row, and their 22 bits after the point
  // cut off, as bytes.
  void (*add_row)(const uint8_t* row, int32_t weight, int32_t* sums, int64_t n);
  void (*to_bytes)(const int32_t* sums, uint8_t* out, int64_t n);
  // One update; copy is the new weight, or null.
  void (*adamw)(const AdamW& a, const float* grad, float* weight, float* mean, float* var, Bf16* copy, int64_t n);
};

// For this CPU: AVX-512, or AVX2.
const Kernels& kernels();

// The same bits with all instruction sets: workers of one job may have different CPUs.
double dot(const float* a, const float* b, int64_t n);

template <class T> const RowKernels<T>& rows();
template <> inline const RowKernels<float>& rows<float>() { return kernels().f32; }
template <> inline const RowKernels<Bf16>& rows<Bf16>() { return kernels().bf16; }

}  // namespace simmim
