#include "branch.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

namespace simmim {

ColumnSums::ColumnSums(Scratch& scratch, int64_t n)
    : n_(n), stride_((n + 15) / 16 * 16), threads_(omp_get_max_threads()) {
  data_ = scratch.take<float>(stride_ * threads_);
  std::memset(data_, 0, size_t(stride_ * threads_) * sizeof(float));
}

float* ColumnSums::mine() { return data_ + stride_ * omp_get_thread_num(); }

void ColumnSums::finish(float* sums) const {
  if (!sums) return;
  for (int64_t i = 0; i < n_; ++i) {
    float sum = data_[i];
    for (int thread = 1; thread < threads_; ++thread) sum += data_[stride_ * thread + i];
    sums[i] = sum;
  }
}

void copy(const float* from, float* to, int64_t n) {
  constexpr int64_t chunk = 1 << 16;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i += chunk) std::memcpy(to + i, from + i, size_t(std::min(chunk, n - i)) * sizeof(float));
}

void clear(float* to, int64_t n) {
  constexpr int64_t chunk = 1 << 16;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i += chunk) std::memset(to + i, 0, size_t(std::min(chunk, n - i)) * sizeof(float));
}

void zero(const Tensor& gradient) {
  if (gradient) clear(gradient.as<float>(), gradient.size());
}

template <class T> void column_sums(const T* x, int64_t rows, int64_t n, float* sums) {
  Scratch scratch;
  ColumnSums columns(scratch, n);
#pragma omp parallel
  {
    float* mine = columns.mine();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) simmim::rows<T>().add(x + r * n, mine, n);
  }
  columns.finish(sums);
}

template <class T> void Branch::normalise(T* y, float* mean, float* rstd) const {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    if (source(r) == PADDING) std::memset(y + r * width, 0, size_t(width) * sizeof(T));
    else
      simmim::rows<T>().normalise(x + source(r) * width, norm_weight, norm_bias, width, eps, y + r * width, mean + r,
                                  rstd + r);
  }
}

void Branch::add(const float* y, float* out) const {
  if (rows < total) partial ? clear(out, total * width) : copy(x, out, total * width);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    if (source(r) == PADDING) continue;
    int64_t at = source(r) * width;
    if (!partial) kernels().residual(x + at, y + r * width, factor(r), gamma, out + at, width);
    else if (gamma) simmim::rows<float>().convert_scaled(y + r * width, factor(r), gamma, out + at, width);
    else simmim::rows<float>().convert(y + r * width, factor(r), out + at, width);
  }
}

template <class T> T* Branch::incoming(const float* dout, T* d, Scratch& scratch, float* sums) const {
  T* scaled = gamma ? scratch.take<T>(rows * width) : d;
  ColumnSums columns(scratch, width);
#pragma omp parallel
  {
    float* mine = columns.mine();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (source(r) == PADDING) {
        std::memset(d + r * width, 0, size_t(width) * sizeof(T));
        if (gamma) std::memset(scaled + r * width, 0, size_t(width) * sizeof(T));
        continue;
      }
      const float* from = dout + source(r) * width;
      simmim::rows<T>().convert(from, factor(r), d + r * width, width);
      simmim::rows<T>().add(d + r * width, mine, width);
      if (gamma) simmim::rows<T>().convert_scaled(from, factor(r), gamma, scaled + r * width, width);
    }
  }
  columns.finish(sums);
  return scaled;
}

void Branch::normalise_backward(const float* dn, const float* mean, const float* rstd, const float* dout, float* dx,
                                float* dweight, float* dbias) const {
  Scratch scratch;
  ColumnSums weights(scratch, width), biases(scratch, width);
  if (partial) dout = nullptr;
  if (dx && rows < total) dout ? copy(dout, dx, total * width) : clear(dx, total * width);
#pragma omp parallel
  {
    float *weight = dweight ? weights.mine() : nullptr, *bias = dbias ? biases.mine() : nullptr;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (source(r) == PADDING) continue;
      int64_t at = source(r) * width;
      kernels().normalise_backward(x + at, mean[r], rstd[r], norm_weight, dn + r * width, width,
                                   dout ? dout + at : nullptr, dx ? dx + at : nullptr, weight, bias);
    }
  }
  weights.finish(dweight);
  biases.finish(dbias);
}

template <class T>
void weight_gradient(const T* dy, int64_t rows, int64_t outputs, const T* z, int64_t inputs, const Tensor& dw) {
  if (!dw) return;
  if (rows)
    multiply(dw.data, Type::f32, transposed({dy, type_of<T>(), rows, outputs}), {z, type_of<T>(), rows, inputs},
             nullptr, dw.added);
  else if (!dw.added) clear(dw.as<float>(), outputs * inputs);
}

template <class T>
void Branch::projection_backward(const T* d, const float* sums, const T* z, int64_t inputs, const float* weight,
                                 const float* bias, const Tensor& dweight, float* dbias, float* dgamma) const {
  if (!gamma) {
    weight_gradient(d, rows, width, z, inputs, dweight);
    if (dbias) copy(sums, dbias, width);
    return;
  }
  Scratch scratch;
  Tensor t = dweight;
  if (dweight.added || (!dweight && dgamma)) t = {scratch.take<float>(width * inputs), {width, inputs}, Type::f32};
  weight_gradient(d, rows, width, z, inputs, t);
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < width; ++c) {
    if (dbias) dbias[c] = gamma[c] * sums[c];
    if (!t) continue;
    float* row = t.as<float>() + c * inputs;
    if (dgamma)
      dgamma[c] = float(dot(weight + c * inputs, row, inputs) + (bias ? double(bias[c]) * double(sums[c]) : 0.));
    kernels().scale(row, gamma[c], inputs);
    if (dweight.added) simmim::rows<float>().add(row, dweight.as<float>() + c * inputs, inputs);
  }
}

#define FOR_BOTH(T)                                                                                                   \
  template void Branch::normalise<T>(T*, float*, float*) const;                                                       \
  template T* Branch::incoming<T>(const float*, T*, Scratch&, float*) const;                                          \
  template void Branch::projection_backward<T>(const T*, const float*, const T*, int64_t, const float*, const float*, \
                                               const Tensor&, float*, float*) const;                                  \
  template void weight_gradient<T>(const T*, int64_t, int64_t, const T*, int64_t, const Tensor&);                     \
  template void column_sums<T>(const T*, int64_t, int64_t, float*);
FOR_BOTH(float)
FOR_BOTH(Bf16)

}  // namespace simmim
