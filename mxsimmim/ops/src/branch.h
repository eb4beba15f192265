// What the two halves of a transformer block have in common: x + keep * gamma * f(norm(x)), on the rows that take part.
// A half that is `partial` leaves x out: it is added to another part of the same half.
//
// B images, L tokens an image, C channels, R rows that take part, in the order in which f sees them.
#pragma once

#include "abi.h"
#include "kernels.h"
#include "product.h"

namespace simmim {

// Sums over rows of what each thread adds to a row of its own; the same for the same number of threads.
class ColumnSums {
 public:
  ColumnSums(Scratch& scratch, int64_t n);
  float* mine();                   // n sums of the calling thread, 0 at first
  void finish(float* sums) const;  // outside the parallel region; null: not wanted

 private:
  float* data_;
  int64_t n_, stride_;
  int threads_;
};

constexpr int32_t PADDING = -1;  // a row that is none of x: zeros after the norm, and dropped at the end

struct Branch {
  const float* x;
  const float *norm_weight, *norm_bias;
  const float *gamma, *keep;  // (C,) and (B,), or null
  float eps;
  int64_t tokens, width;  // L, C
  int64_t total, rows;    // B * L, R
  const int32_t* order;   // (R,): row of x that each row comes from, or PADDING; null: all in their order
  bool partial = false;

  int64_t source(int64_t row) const { return order ? order[row] : row; }
  float factor(int64_t row) const { return keep ? keep[source(row) / tokens] : 1.f; }

  // y (R, C) = norm(x); mean, rstd (R,).
  template <class T> void normalise(T* y, float* mean, float* rstd) const;
  // out (B*L, C) = x + keep * gamma * y; rows that take no part stay x. With 0 for x, if `partial`.
  void add(const float* y, float* out) const;
  // The gradient dout (B*L, C) of out, as that of y / gamma and of y: d = keep * dout, d_scaled = gamma * d (R, C), and
  // the sums of d over rows (C,). Where there is no gamma, d_scaled is d.
  template <class T> T* incoming(const float* dout, T* d, Scratch& scratch, float* sums) const;
  // dx (B*L, C) = dout + the gradient through norm of dn (R, C). Null results are not wanted. With 0 for dout, if
  // `partial`.
  void normalise_backward(const float* dn, const float* mean, const float* rstd, const float* dout, float* dx,
                          float* dweight, float* dbias) const;
  // The gradients of a projection y = z weight' + bias, weight (C, K), and of gamma, from d, its sums, and z (R, K).
  // With t = d' z: dweight = gamma t, and dgamma, the sum of d y over rows, is that of weight t over K plus bias sums:
  // y itself is not needed. bias may be null.
  template <class T>
  void projection_backward(const T* d, const float* sums, const T* z, int64_t inputs, const float* weight,
                           const float* bias, const Tensor& dweight, float* dbias, float* dgamma) const;
};

template <class T> constexpr Type type_of() { return sizeof(T) == 4 ? Type::f32 : Type::f16; }

// The gradient dw (N, K), unless null, of the weight of y = z weight' from dy (R, N) and z (R, K).
template <class T>
void weight_gradient(const T* dy, int64_t rows, int64_t outputs, const T* z, int64_t inputs, const Tensor& dw);

// sums (n,) of the columns of x (R, n).
template <class T> void column_sums(const T* x, int64_t rows, int64_t n, float* sums);

void zero(const Tensor& gradient);  // unless nobody wants it: there is no gradient of choices and masks
// The shape, in float32, of `count` numbers kept for the backward pass. There MXNet fills an array of this shape with
// zeros, the gradient that nobody sends, and it fills float32 many times as fast as float16.
inline Shape kept(int64_t count, bool bf16) { return {bf16 ? (count + 1) / 2 : count}; }

void copy(const float* from, float* to, int64_t n);  // all threads, as below
void clear(float* to, int64_t n);

}  // namespace simmim
