// A transformer's second half block: x + keep * gamma * fc2(gelu(fc1(norm(x)))), see mlp in ops/backend.py.
//
// Inputs: x, norm weight and bias, fc1 weight and bias, fc2 weight, then fc2 bias, gamma, keep, rows as the attributes
// of these names say. Outputs: the result and, unless `recompute`, what fc1 gave, h (B * L, hidden), see `kept`.
#include <cstring>

#include "branch.h"

namespace simmim {
namespace {

enum { X, NORM_WEIGHT, NORM_BIAS, FC1_WEIGHT, FC1_BIAS, FC2_WEIGHT, REQUIRED };

// Where the optional inputs are; -1 where they are not.
struct Places {
  int fc2_bias = -1, gamma = -1, keep = -1, rows = -1, count = REQUIRED;
  explicit Places(const Attributes& attrs) {
    if (attrs.flag("fc2_bias")) fc2_bias = count++;
    if (attrs.flag("gamma")) gamma = count++;
    if (attrs.flag("keep")) keep = count++;
    if (attrs.flag("rows")) rows = count++;
  }
};

int inputs(const Attributes& attrs) { return Places(attrs).count; }
int outputs(const Attributes& attrs) { return attrs.flag("recompute") ? 1 : 2; }

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  Places at(attrs);
  if (!known(in[X])) return;
  require(in[X].size() == 3, "x must be (images, tokens, channels), it has shape ", in[X]);
  int64_t width = in[X][2];
  Shape& fc1 = in[FC1_WEIGHT];
  if (fc1.size() == 2 && fc1[1] == 0) fc1[1] = width;
  require(known(fc1) && fc1.size() == 2 && fc1[1] == width, "fc1's weight of shape ", fc1, " does not fit x of shape ",
          in[X]);
  settle("norm's weight", in[NORM_WEIGHT], {width});
  settle("norm's bias", in[NORM_BIAS], {width});
  settle("fc1's bias", in[FC1_BIAS], {fc1[0]});
  settle("fc2's weight", in[FC2_WEIGHT], {width, fc1[0]});
  if (at.fc2_bias >= 0) settle("fc2's bias", in[size_t(at.fc2_bias)], {width});
  if (at.gamma >= 0) settle("gamma", in[size_t(at.gamma)], {width});
  if (at.keep >= 0) settle("keep", in[size_t(at.keep)], {in[X][0], 1});
  if (at.rows >= 0) settle("rows", in[size_t(at.rows)], {in[X][0], in[X][1]});
  out[0] = in[X];
  if (out.size() > 1) out[1] = kept(in[X][0] * in[X][1] * fc1[0], attrs.flag("bf16"));
}

struct Mlp : Branch {
  const float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  int64_t hidden;

  Mlp(const Attributes& attrs, const Tensor* in, Scratch& scratch) {
    Places at(attrs);
    auto optional = [&](int place) { return place < 0 ? nullptr : in[place].as<const float>(); };
    x = in[X].as<const float>();
    norm_weight = in[NORM_WEIGHT].as<const float>();
    norm_bias = in[NORM_BIAS].as<const float>();
    fc1_weight = in[FC1_WEIGHT].as<const float>();
    fc1_bias = in[FC1_BIAS].as<const float>();
    fc2_weight = in[FC2_WEIGHT].as<const float>();
    fc2_bias = optional(at.fc2_bias);
    gamma = optional(at.gamma);
    keep = optional(at.keep);
    partial = attrs.flag("partial");
    eps = float(attrs.real("eps"));
    tokens = in[X].shape[1];
    width = in[X].shape[2];
    hidden = in[FC1_WEIGHT].shape[0];
    total = rows = in[X].shape[0] * tokens;
    order = nullptr;
    if (const float* chosen = optional(at.rows)) {
      int32_t* list = scratch.take<int32_t>(total);
      rows = 0;
      for (int64_t r = 0; r < total; ++r)
        if (chosen[r] != 0) list[rows++] = int32_t(r);
      order = list;
    }
  }

  template <class T> void first_layer(T* h, T* n, float* mean, float* rstd) const {
    normalise(n, mean, rstd);
    multiply(h, type_of<T>(), {n, type_of<T>(), rows, width}, transposed({fc1_weight, Type::f32, hidden, width}),
             fc1_bias);
  }
};

template <class T> void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Scratch scratch;
  Mlp mlp(attrs, in.data(), scratch);
  T* h = out.size() > 1 ? out[1].as<T>() : scratch.take<T>(mlp.rows * mlp.hidden);
  float* y = scratch.take<float>(mlp.rows * mlp.width);
  {
    Scratch inner;
    T* n = inner.take<T>(mlp.rows * mlp.width);
    float* statistics = inner.take<float>(2 * mlp.rows);
    mlp.first_layer(h, n, statistics, statistics + mlp.rows);
  }
  T* g = scratch.take<T>(mlp.rows * mlp.hidden);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < mlp.rows; ++r) rows<T>().gelu(h + r * mlp.hidden, g + r * mlp.hidden, mlp.hidden);
  multiply(y, Type::f32, {g, type_of<T>(), mlp.rows, mlp.hidden},
           transposed({mlp.fc2_weight, Type::f32, mlp.width, mlp.hidden}), mlp.fc2_bias);
  mlp.add(y, out[0].as<float>());
}

template <class T> void backward(const Attributes& attrs, const Tensors& all, const Tensors& out) {
  int given = outputs(attrs);
  const Tensor* in = all.data() + given;
  const float* dout = all[0].as<const float>();
  auto wanted = [&](int place) { return place < 0 ? nullptr : out[size_t(place)].as<float>(); };
  Scratch scratch;
  Mlp mlp(attrs, in, scratch);
  Places at(attrs);
  int64_t rows = mlp.rows, width = mlp.width, hidden = mlp.hidden;
  T* n = scratch.take<T>(rows * width);
  float *mean = scratch.take<float>(rows), *rstd = scratch.take<float>(rows);
  const T* h;
  if (given > 1) {
    h = in[inputs(attrs) + 1].as<const T>();
    mlp.normalise(n, mean, rstd);
  } else {
    T* again = scratch.take<T>(rows * hidden);
    mlp.first_layer(again, n, mean, rstd);
    h = again;
  }
  T* dh = scratch.take<T>(rows * hidden);
  float* sums = scratch.take<float>(hidden);
  {
    Scratch inner;
    T *d = inner.take<T>(rows * width), *g = inner.take<T>(rows * hidden);
    float* sums_d = inner.take<float>(width);
    T* scaled = mlp.incoming(dout, d, inner, sums_d);
    multiply(dh, type_of<T>(), {scaled, type_of<T>(), rows, width}, {mlp.fc2_weight, Type::f32, width, hidden});
    ColumnSums columns(inner, hidden);
#pragma omp parallel
    {
      float* mine = columns.mine();
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        simmim::rows<T>().gelu_backward(h + r * hidden, dh + r * hidden, g + r * hidden, mine, hidden);
    }
    columns.finish(sums);
    mlp.projection_backward(d, sums_d, g, hidden, mlp.fc2_weight, mlp.fc2_bias, out[FC2_WEIGHT], wanted(at.fc2_bias),
                            wanted(at.gamma));
  }
  if (wanted(FC1_BIAS)) copy(sums, wanted(FC1_BIAS), hidden);
  weight_gradient(dh, rows, hidden, n, width, out[FC1_WEIGHT]);
  if (!wanted(X) && !wanted(NORM_WEIGHT) && !wanted(NORM_BIAS)) return;
  float* dn = scratch.take<float>(rows * width);
  multiply(dn, Type::f32, {dh, type_of<T>(), rows, hidden}, {mlp.fc1_weight, Type::f32, hidden, width});
  mlp.normalise_backward(dn, mean, rstd, dout, wanted(X), wanted(NORM_WEIGHT), wanted(NORM_BIAS));
}

void forward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  attrs.flag("bf16") ? forward<Bf16>(attrs, in, out) : forward<float>(attrs, in, out);
}
void backward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  for (int place : {Places(attrs).keep, Places(attrs).rows})
    if (place >= 0) zero(out[size_t(place)]);
  attrs.flag("bf16") ? backward<Bf16>(attrs, in, out) : backward<float>(attrs, in, out);
}

Register mlp_operator({"mxsimmim_mlp", inputs, outputs, shapes, all_float32, forward_either, backward_either, nullptr});

}  // namespace
}  // namespace simmim
