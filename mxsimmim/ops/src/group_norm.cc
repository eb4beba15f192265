// Group normalisation (Wu and He 2018, arXiv:1803.08494): each image's groups of channels with zero mean and unit
// variance, then each channel scaled and shifted. MXNet's takes ten times as long.
#include <algorithm>
#include <cmath>
#include <vector>

#include "abi.h"

namespace simmim {

namespace {

enum { X, WEIGHT, BIAS };
constexpr int64_t kLanes = 16;  // partial sums, so that loops become vectors; always the same, as is their order

int inputs(const Attributes&) { return 3; }
int outputs(const Attributes&) { return 1; }

struct Sizes {
  int64_t images, channels, pixels, groups;
  int64_t of_group() const { return channels / groups; }
};

Sizes sizes_of(const Attributes& attrs, const Shape& x) {
  require(x.size() == 4, "x of shape ", x, " is not (B, C, H, W)");
  Sizes s{x[0], x[1], x[2] * x[3], attrs.integer("groups")};
  require(s.groups > 0 && s.channels % s.groups == 0, "the channels of x ", x, " are no multiple of groups=", s.groups);
  return s;
}

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  if (!known(in[X])) return;
  Sizes s = sizes_of(attrs, in[X]);
  settle("weight", in[WEIGHT], {s.channels});
  settle("bias", in[BIAS], {s.channels});
  out[0] = in[X];
}

// The sum of value(i) over i < n.
template <class Value> double sum(int64_t n, Value value) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
  double total = 0;
  for (float lane : lanes) total += double(lane);
  for (int64_t i = whole; i < n; ++i) total += double(value(i));
  return total;
}

struct Statistics {
  float mean, scale;  // scale: 1 / deviation
};

Statistics statistics(const float* x, int64_t rows, int64_t n, double eps) {
  double total = 0, squares = 0;
  for (int64_t row = 0; row < rows; ++row) total += sum(n, [&](int64_t i) { return x[row * n + i]; });
  auto mean = float(total / double(rows * n));
  for (int64_t row = 0; row < rows; ++row)
    squares += sum(n, [&](int64_t i) { return (x[row * n + i] - mean) * (x[row * n + i] - mean); });
  return {mean, float(1 / std::sqrt(squares / double(rows * n) + eps))};
}

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Sizes s = sizes_of(attrs, in[X].shape);
  const float *all = in[X].as<float>(), *weight = in[WEIGHT].as<float>(), *bias = in[BIAS].as<float>();
  double eps = attrs.real("eps");
  int64_t rows = s.of_group(), size = rows * s.pixels;
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < s.images * s.groups; ++group) {
    const float* x = all + group * size;
    float* y = out[0].as<float>() + group * size;
    Statistics found = statistics(x, rows, s.pixels, eps);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t channel = group % s.groups * rows + row;
      float factor = found.scale * weight[channel], offset = bias[channel] - found.mean * factor;
      for (int64_t i = row * s.pixels; i < (row + 1) * s.pixels; ++i) y[i] = x[i] * factor + offset;
    }
  }
}

// in: gradient of y, x, weight, bias, y. With z = (x - mean) * scale and d = weight * dy, dx is scale * (d - mean(d) -
// z * mean(d * z)), the means over a group.
void backward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  const Tensor *given = &in[1], *y_gradient = &in[0];
  Sizes s = sizes_of(attrs, given[X].shape);
  const float* weight = given[WEIGHT].as<float>();
  double eps = attrs.real("eps");
  int64_t rows = s.of_group(), size = rows * s.pixels;
  Scratch scratch;
  double* shifts = scratch.take<double>(s.images * s.channels);  // of each image: sums of dy, and of dy * z
  double* scales = scratch.take<double>(s.images * s.channels);
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < s.images * s.groups; ++group) {
    const float *x = given[X].as<float>() + group * size, *dy = y_gradient->as<float>() + group * size;
    Statistics found = statistics(x, rows, s.pixels, eps);
    double first = 0, second = 0;  // sums of d, and of d * z
    for (int64_t row = 0; row < rows; ++row) {
      const float *from = x + row * s.pixels, *gradient = dy + row * s.pixels;
      int64_t place = group * rows + row;
      shifts[place] = sum(s.pixels, [&](int64_t i) { return gradient[i]; });
      scales[place] = sum(s.pixels, [&](int64_t i) { return gradient[i] * (from[i] - found.mean); }) * found.scale;
      first += shifts[place] * weight[place % s.channels], second += scales[place] * weight[place % s.channels];
    }
    if (!out[X]) continue;
    float* dx = out[X].as<float>() + group * size;
    // dx = a * dy + b * x + c
    auto b = float(-second / double(size) * found.scale * found.scale);
    float c = float(-first / double(size)) * found.scale - b * found.mean;
    for (int64_t row = 0; row < rows; ++row) {
      float a = found.scale * weight[(group * rows + row) % s.channels];
      for (int64_t i = row * s.pixels; i < (row + 1) * s.pixels; ++i) dx[i] = a * dy[i] + b * x[i] + c;
    }
  }
  for (int64_t channel = 0; channel < s.channels; ++channel) {
    double shift = 0, scale = 0;
    for (int64_t image = 0; image < s.images; ++image)
      shift += shifts[image * s.channels + channel], scale += scales[image * s.channels + channel];
    if (out[BIAS]) out[BIAS].as<float>()[channel] = float(shift);
    if (out[WEIGHT]) out[WEIGHT].as<float>()[channel] = float(scale);
  }
}

Register op({"mxsimmim_group_norm", inputs, outputs, shapes, all_float32, forward, backward, nullptr});

}  // namespace

}  // namespace simmim
