// x weight' + bias, and GELU where asked; and layer normalisation by itself. See linear and layer_norm in
// ops/__init__.py.
#include <cstring>

#include "branch.h"

namespace simmim {
namespace {

namespace linear {

enum { X, WEIGHT, BIAS };

int inputs(const Attributes& attrs) { return attrs.flag("bias") ? 3 : 2; }
int outputs(const Attributes& attrs) { return attrs.flag("gelu") ? 2 : 1; }  // the second: what GELU is given

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  if (!known(in[X])) return;
  Shape& weight = in[WEIGHT];
  int64_t width = in[X].back();
  if (weight.size() == 2 && weight[1] == 0) weight[1] = width;
  require(known(weight) && weight.size() == 2 && weight[1] == width, "weight of shape ", weight,
          " does not fit x of shape ", in[X]);
  if (attrs.flag("bias")) settle("bias", in[BIAS], {weight[0]});
  out[0] = in[X];
  out[0].back() = weight[0];
  if (out.size() > 1) out[1] = kept(size_of(out[0]), attrs.flag("bf16"));
}

// x (n,) as T: itself, or rounded into scratch memory.
const float* as(const float* x, int64_t, Scratch&, float) { return x; }
const Bf16* as(const float* x, int64_t n, Scratch& scratch, Bf16) {
  Bf16* rounded = scratch.take<Bf16>(n);
  constexpr int64_t chunk = 1 << 14;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i += chunk) rows<Bf16>().convert(x + i, 1.f, rounded + i, n - i < chunk ? n - i : chunk);
  return rounded;
}

template <class T> void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Scratch scratch;
  int64_t width = in[WEIGHT].shape[1], outputs = in[WEIGHT].shape[0], count = in[X].size() / width;
  const T* x = as(in[X].as<const float>(), count * width, scratch, T());
  bool gelu = out.size() > 1;
  T* h = gelu ? out[1].as<T>() : nullptr;
  float* y = out[0].as<float>();
  multiply(gelu ? static_cast<void*>(h) : y, gelu ? type_of<T>() : Type::f32, {x, type_of<T>(), count, width},
           transposed({in[WEIGHT].data, Type::f32, outputs, width}),
           attrs.flag("bias") ? in[BIAS].as<const float>() : nullptr);
  if (!gelu) return;
#pragma omp parallel
  {
    Scratch own;
    T* row = own.take<T>(outputs);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; ++r) {
      rows<T>().gelu(h + r * outputs, row, outputs);
      rows<T>().widen(row, y + r * outputs, outputs);
    }
  }
}

template <class T> void backward(const Attributes& attrs, const Tensors& all, const Tensors& out) {
  Scratch scratch;
  int given = linear::outputs(attrs);
  const Tensor* in = all.data() + given;
  int64_t width = in[WEIGHT].shape[1], outputs = in[WEIGHT].shape[0], count = in[X].size() / width;
  const T* dy = as(all[0].as<const float>(), count * outputs, scratch, T());
  float* sums = scratch.take<float>(outputs);
  if (given > 1) {
    const T* h = in[inputs(attrs) + 1].as<const T>();
    T* dh = scratch.take<T>(count * outputs);
    ColumnSums columns(scratch, outputs);
#pragma omp parallel
    {
      float* mine = columns.mine();
#pragma omp for schedule(static)
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(dh + r * outputs, dy + r * outputs, size_t(outputs) * sizeof(T));
        rows<T>().gelu_backward(h + r * outputs, dh + r * outputs, nullptr, mine, outputs);
      }
    }
    columns.finish(sums);
    dy = dh;
  } else if (attrs.flag("bias") && out[BIAS]) {
    column_sums(dy, count, outputs, sums);
  }
  if (attrs.flag("bias") && out[BIAS]) copy(sums, out[BIAS].as<float>(), outputs);
  if (out[X])
    multiply(out[X].data, Type::f32, {dy, type_of<T>(), count, outputs}, {in[WEIGHT].data, Type::f32, outputs, width});
  if (out[WEIGHT])
    weight_gradient(dy, count, outputs, as(in[X].as<const float>(), count * width, scratch, T()), width, out[WEIGHT]);
}

void forward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  attrs.flag("bf16") ? forward<Bf16>(attrs, in, out) : forward<float>(attrs, in, out);
}
void backward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  attrs.flag("bf16") ? backward<Bf16>(attrs, in, out) : backward<float>(attrs, in, out);
}

Register op({"mxsimmim_linear", inputs, outputs, shapes, all_float32, forward_either, backward_either, nullptr});

}  // namespace linear

namespace layer_norm {

enum { X, WEIGHT, BIAS };

int inputs(const Attributes&) { return 3; }
int outputs(const Attributes&) { return 1; }

void shapes(const Attributes&, std::vector<Shape>& in, std::vector<Shape>& out) {
  if (!known(in[X])) return;
  settle("weight", in[WEIGHT], {in[X].back()});
  settle("bias", in[BIAS], {in[X].back()});
  out[0] = in[X];
}

// The rows of x as those of a branch, of which only the normalisation is used.
Branch branch(const Attributes& attrs, const Tensor* in) {
  int64_t width = in[X].shape.back(), count = in[X].size() / width;
  return {in[X].as<const float>(),
          in[WEIGHT].as<const float>(),
          in[BIAS].as<const float>(),
          nullptr,
          nullptr,
          float(attrs.real("eps")),
          count,
          width,
          count,
          count,
          nullptr};
}

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Scratch scratch;
  Branch rows = branch(attrs, in.data());
  float* statistics = scratch.take<float>(2 * rows.rows);
  rows.normalise(out[0].as<float>(), statistics, statistics + rows.rows);
}

void backward(const Attributes& attrs, const Tensors& all, const Tensors& out) {
  Scratch scratch;
  Branch rows = branch(attrs, all.data() + 1);
  float *mean = scratch.take<float>(rows.rows), *rstd = scratch.take<float>(rows.rows);
  rows.normalise(scratch.take<float>(rows.rows * rows.width), mean, rstd);
  rows.normalise_backward(all[0].as<const float>(), mean, rstd, nullptr, out[X].as<float>(), out[WEIGHT].as<float>(),
                          out[BIAS].as<float>());
}

Register op({"mxsimmim_layer_norm", inputs, outputs, shapes, all_float32, forward, backward, nullptr});

}  // namespace layer_norm
}  // namespace
}  // namespace simmim
