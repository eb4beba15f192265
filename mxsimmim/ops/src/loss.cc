// SimMIM's loss on masked cells: only these are decoded.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "abi.h"
#include "branch.h"
#include "kernels.h"
#include "product.h"

namespace simmim {

namespace {

constexpr int64_t kChannels = 3;
enum Input { kTokens, kWeight, kBias, kTarget, kMask, kInputs };
enum Kind { kAbsolute, kSquare };

int64_t root(int64_t square) { return std::llround(std::sqrt(double(square))); }

// What the shapes say: `cells` = n x n cells an image of cell x cell pixels, each of patches x patches patches.
struct Sizes {
  int64_t images, prefix, cells, width, pixels;  // pixels: values of a cell, 3 * cell^2
  int64_t n, cell, patches, patch;               // patch: the side of a patch in pixels

  int64_t all() const { return images * cells; }
  int64_t token(int64_t cell_number) const {  // where its token begins
    return ((cell_number / cells) * (prefix + cells) + prefix + cell_number % cells) * width;
  }
};

Sizes sizes_of(const Attributes& attrs, const Shape& tokens, const Shape& target, const Shape& mask) {
  Sizes s{};
  s.prefix = attrs.integer("prefix");
  require(tokens.size() == 3 && target.size() == 3 && tokens[0] == target[0] && tokens[1] - s.prefix == target[1] &&
              s.prefix >= 0,
          "tokens ", tokens, ", of which the first ", s.prefix, " are ignored, do not fit target ", target);
  s.images = tokens[0], s.cells = target[1], s.width = tokens[2], s.pixels = target[2];
  s.n = root(s.cells), s.cell = root(s.pixels / kChannels);
  require(s.n * s.n == s.cells && kChannels * s.cell * s.cell == s.pixels, "target ", target,
          " is not (B, n^2, 3 * cell^2)");
  require(mask.size() == 3 && mask[0] == s.images && mask[1] == mask[2] && mask[1] % s.n == 0 &&
              s.cell % (mask[1] / s.n) == 0,
          "mask ", mask, " is no grid of patches of target ", target);
  s.patches = mask[1] / s.n, s.patch = s.cell / s.patches;
  return s;
}

int inputs(const Attributes&) { return kInputs; }
int outputs(const Attributes&) { return 2; }

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  if (!known(in[kTokens]) || !known(in[kTarget]) || !known(in[kMask])) return;
  Sizes s = sizes_of(attrs, in[kTokens], in[kTarget], in[kMask]);
  settle("decoder's weight", in[kWeight], {s.pixels, s.width});
  settle("decoder's bias", in[kBias], {s.pixels});
  out = {{1}, {s.all(), s.pixels}};
}

// MXNet's numbers of the types a mask may have, beside those of Type.
enum { kFloat64 = 1, kInt8 = 5, kInt64 = 6, kBool = 7 };

// Calls body with a null pointer of the mask's type; false if it cannot be a mask's.
template <class Body> bool with_type(Type type, Body body) {
  switch (int(type)) {
    case int(Type::f32): return body(static_cast<float*>(nullptr)), true;
    case int(Type::u8):
    case kBool: return body(static_cast<uint8_t*>(nullptr)), true;
    case int(Type::i32): return body(static_cast<int32_t*>(nullptr)), true;
    case kFloat64: return body(static_cast<double*>(nullptr)), true;
    case kInt8: return body(static_cast<int8_t*>(nullptr)), true;
    case kInt64: return body(static_cast<int64_t*>(nullptr)), true;
    default: return false;
  }
}

void types(const Attributes& attrs, std::vector<Type>& in, std::vector<Type>& out) {
  for (int i = 0; i < kInputs; ++i)
    if (i == kMask)
      require(int(in[i]) < 0 || with_type(in[i], [](auto) {}), "mask cannot have MXNet's type number ", int(in[i]));
    else
      require(int(in[i]) < 0 || in[i] == Type::f32, "input ", i, " must be float32, not MXNet's type number ",
              int(in[i]));
  for (int i = 0; i < kMask; ++i) in[i] = Type::f32;
  out = {Type::f32, attrs.flag("bf16") ? Type::f16 : Type::f32};
}

// The cells that hold a masked patch, and what the loss is divided by.
struct Selection {
  std::vector<int64_t> cells;
  std::vector<float> weights;  // of each patch of each selected cell: the mask's value
  double divisor;

  int64_t rows() const { return int64_t(cells.size()); }
};

template <class T> Selection select(const Sizes& s, const T* mask) {
  Selection chosen;
  int64_t side = s.n * s.patches;
  double masked = 0;
  std::vector<float> weights(size_t(s.patches * s.patches));
  for (int64_t cell = 0; cell < s.all(); ++cell) {
    int64_t in_image = cell % s.cells;
    const T* corner = mask + (cell / s.cells * side + in_image / s.n * s.patches) * side + in_image % s.n * s.patches;
    bool any = false;
    for (int64_t i = 0; i < s.patches * s.patches; ++i) {
      weights[size_t(i)] = float(corner[i / s.patches * side + i % s.patches]);
      any = any || weights[size_t(i)] != 0;
      masked += weights[size_t(i)];
    }
    if (!any) continue;
    chosen.cells.push_back(cell);
    chosen.weights.insert(chosen.weights.end(), weights.begin(), weights.end());
  }
  chosen.divisor = (masked * double(s.patch * s.patch) + 1e-5) * kChannels;
  return chosen;
}

Selection select(const Sizes& s, const Tensor& mask) {
  Selection chosen;
  with_type(mask.type, [&](auto* type) { chosen = select(s, mask.as<std::remove_pointer_t<decltype(type)>>()); });
  return chosen;
}

// The selected tokens times `scale`, a row after the other.
template <class T> void gather(const Sizes& s, const Selection& chosen, const float* tokens, float scale, T* to) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < chosen.rows(); ++r)
    rows<T>().convert(tokens + s.token(chosen.cells[size_t(r)]), scale, to + r * s.width, s.width);
}

// One cell: the sum of its errors, and in `slope` their derivatives. weights: one a patch.
template <class T>
double cell_errors(const Sizes& s, const float* weights, bool square, const float* decoded, const float* target,
                   T* slope) {
  int64_t patches = s.patches * s.patches;
  if (std::count(weights, weights + patches, *weights) == patches)
    return rows<T>().errors(decoded, target, *weights, square, slope, s.pixels);
  double total = 0;
  for (int64_t line = 0; line < kChannels * s.cell; ++line)
    for (int64_t column = 0; column < s.patches; ++column) {
      int64_t at = line * s.cell + column * s.patch;
      float weight = weights[line % s.cell / s.patch * s.patches + column];
      total += rows<T>().errors(decoded + at, target + at, weight, square, slope + at, s.patch);
    }
  return total;
}

template <class T>
double all_errors(const Sizes& s, const Selection& chosen, bool square, const float* decoded, const float* target,
                  T* slopes) {
  std::vector<double> sums(chosen.cells.size());
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < chosen.rows(); ++r)
    sums[size_t(r)] = cell_errors(s, chosen.weights.data() + r * s.patches * s.patches, square, decoded + r * s.pixels,
                                  target + chosen.cells[size_t(r)] * s.pixels, slopes + r * s.pixels);
  return std::accumulate(sums.begin(), sums.end(), 0.0);  // in one order, whatever the number of threads
}

// T: what is multiplied and saved. The saved rows are the loss's derivatives without its divisor, which leaves the
// signs of l1 exact in bf16.
template <class T> double run(bool square, const Sizes& s, const Selection& chosen, const Tensors& in,
                              const Tensor& saved) {
  Scratch scratch;
  int64_t values = chosen.rows() * s.pixels;
  T* slopes = saved ? saved.as<T>() : scratch.take<T>(values);
  float* decoded = nullptr;
  if constexpr (std::is_same_v<T, float>) decoded = slopes;
  else decoded = scratch.take<float>(values);
  T* tokens = scratch.take<T>(chosen.rows() * s.width);
  gather(s, chosen, in[kTokens].as<float>(), 1, tokens);
  multiply(decoded, Type::f32, {tokens, type_of<T>(), chosen.rows(), s.width},
           transposed({in[kWeight].data, Type::f32, s.pixels, s.width}), in[kBias].as<float>());
  return all_errors(s, chosen, square, decoded, in[kTarget].as<float>(), slopes);
}

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Sizes s = sizes_of(attrs, in[kTokens].shape, in[kTarget].shape, in[kMask].shape);
  Selection chosen = select(s, in[kMask]);
  bool square = attrs.integer("kind") == kSquare;
  double sum = 0;
  if (chosen.rows())
    sum = attrs.flag("bf16") ? run<Bf16>(square, s, chosen, in, out[1]) : run<float>(square, s, chosen, in, out[1]);
  if (out[0]) *out[0].as<float>() = float(sum / chosen.divisor);
}

// Tokens' gradients from those of the selected rows, times `scale`; the others' are zero.
void scatter(const Sizes& s, const Selection& chosen, const float* gradients, float scale, float* tokens) {
  std::vector<int64_t> row_of(size_t(s.all()), -1);
  for (int64_t r = 0; r < chosen.rows(); ++r) row_of[size_t(chosen.cells[size_t(r)])] = r;
  int64_t length = s.prefix + s.cells;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < s.images * length; ++i) {
    int64_t cell = i % length - s.prefix;
    int64_t row = cell < 0 ? -1 : row_of[size_t(i / length * s.cells + cell)];
    if (row < 0) std::memset(tokens + i * s.width, 0, size_t(s.width) * sizeof(float));
    else rows<float>().convert(gradients + row * s.width, scale, tokens + i * s.width, s.width);
  }
}

template <class T>
void gradients(const Sizes& s, const Selection& chosen, float scale, const Tensors& in, const T* slopes,
               const Tensors& out) {
  Scratch scratch;
  int64_t count = chosen.rows();
  if (out[kTokens]) {
    float* changes = scratch.take<float>(count * s.width);
    multiply(changes, Type::f32, {slopes, type_of<T>(), count, s.pixels},
             {in[kWeight].data, Type::f32, s.pixels, s.width});
    scatter(s, chosen, changes, scale, out[kTokens].as<float>());
  }
  if (out[kWeight]) {
    T* tokens = scratch.take<T>(count * s.width);
    gather(s, chosen, in[kTokens].as<float>(), scale, tokens);
    weight_gradient(slopes, count, s.pixels, tokens, s.width, out[kWeight]);
  }
  if (out[kBias]) {
    float* sums = out[kBias].as<float>();
    column_sums(slopes, count, s.pixels, sums);
    kernels().scale(sums, scale, s.pixels);
  }
}

// in: gradients of the loss and, without a meaning, of the saved rows; the inputs; the loss and the saved rows.
void backward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Tensors inputs(in.begin() + 2, in.begin() + 2 + kInputs);
  const Tensor& saved = in[2 + kInputs + 1];
  Sizes s = sizes_of(attrs, inputs[kTokens].shape, inputs[kTarget].shape, inputs[kMask].shape);
  Selection chosen = select(s, inputs[kMask]);
  float scale = float(*in[0].as<float>() / chosen.divisor);
  auto clear = [&](int i, size_t item) {
    const Tensor& gradient = out[size_t(i)];
    if (gradient && !gradient.added) std::memset(gradient.data, 0, size_t(gradient.size()) * item);
  };
  clear(kTarget, sizeof(float));
  with_type(inputs[kMask].type, [&](auto* type) { clear(kMask, sizeof *type); });
  if (!chosen.rows())
    for (int i : {kTokens, kWeight, kBias}) clear(i, sizeof(float));
  else if (attrs.flag("bf16")) gradients(s, chosen, scale, inputs, saved.as<Bf16>(), out);
  else gradients(s, chosen, scale, inputs, saved.as<float>(), out);
}

Register masked_loss({"mxsimmim_masked_loss", inputs, outputs, shapes, types, forward, backward, nullptr});

}  // namespace

}  // namespace simmim
