// AdamW over all parameters in one call, and the sum of squares that clipping needs.
#include <algorithm>
#include <cmath>

#include "abi.h"
#include "kernels.h"

namespace simmim {

namespace {

constexpr int64_t kPiece = 16384;  // elements of an array that a thread takes at a time

// Part of one of several arrays. Arrays are cut alike whatever the number of threads.
struct Piece {
  size_t array;
  int64_t start, size;
};

std::vector<Piece> cut(const Tensor* arrays, size_t count) {
  std::vector<Piece> pieces;
  for (size_t array = 0; array < count; ++array)
    for (int64_t start = 0, size = arrays[array].size(); start < size; start += kPiece)
      pieces.push_back({array, start, std::min(kPiece, size - start)});
  return pieces;
}

size_t count_of(const Attributes& attrs) {
  int64_t count = attrs.integer("count");
  require(count > 0, "count=", count, " must be the number of arrays, at least 1");
  return size_t(count);
}

int one(const Attributes&) { return 1; }

// Inputs: `count` weights, gradients, means and variances; with copies=1 as many copies; rates (count, 2), scale (1,).
struct Arguments {
  explicit Arguments(const Attributes& attrs) : count(count_of(attrs)), copies(attrs.flag("copies")) {}
  size_t count;
  bool copies;
  size_t kinds() const { return copies ? 5 : 4; }
  size_t rates() const { return kinds() * count; }
  size_t scale() const { return rates() + 1; }
};

enum Kind : size_t { kWeight, kGrad, kMean, kVar, kCopy };
const char* const kKinds[] = {"weight", "gradient", "mean", "variance", "copy"};

int adamw_inputs(const Attributes& attrs) { return int(Arguments(attrs).scale() + 1); }

void adamw_shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  Arguments arguments(attrs);
  for (size_t i = 0; i < arguments.count; ++i) {
    if (!known(in[i])) continue;
    for (size_t kind = kGrad; kind < arguments.kinds(); ++kind)
      settle((std::string(kKinds[kind]) + " " + std::to_string(i)).c_str(), in[kind * arguments.count + i], in[i]);
  }
  settle("rates", in[arguments.rates()], {int64_t(arguments.count), 2});
  settle("scale", in[arguments.scale()], {1});
  out[0] = {1};
}

void adamw_types(const Attributes& attrs, std::vector<Type>& in, std::vector<Type>& out) {
  Arguments arguments(attrs);
  std::vector<Type> floats;
  for (size_t i = 0; i < in.size(); ++i) {
    if (arguments.copies && i / arguments.count == kCopy) {
      require(in[i] == Type::f16 || int(in[i]) < 0,
              "copies must be float16, the storage of bf16, not MXNet's type number ", int(in[i]));
      in[i] = Type::f16;
    } else {
      floats.push_back(in[i]);
      in[i] = Type::f32;
    }
  }
  all_float32(attrs, floats, out);
}

std::vector<int> adamw_written(const Attributes& attrs) {
  Arguments arguments(attrs);
  std::vector<int> written;
  for (size_t kind = 0; kind < arguments.kinds(); ++kind)
    for (size_t i = 0; kind != kGrad && i < arguments.count; ++i) written.push_back(int(kind * arguments.count + i));
  return written;
}

void adamw_forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Arguments arguments(attrs);
  if (out[0]) *out[0].as<float>() = 0;
  float scale = *in[arguments.scale()].as<float>();
  if (scale == 0 || !std::isfinite(scale)) return;
  float beta1 = float(attrs.real("beta1")), beta2 = float(attrs.real("beta2"));
  float epsilon = float(attrs.real("epsilon"));
  const float* rates = in[arguments.rates()].as<float>();
  std::vector<Piece> pieces = cut(in.data(), arguments.count);
#pragma omp parallel for schedule(static)
  for (size_t k = 0; k < pieces.size(); ++k) {
    const Piece& piece = pieces[k];
    auto part = [&](Kind kind) { return in[kind * arguments.count + piece.array].as<float>() + piece.start; };
    Bf16* copy = arguments.copies ? in[kCopy * arguments.count + piece.array].as<Bf16>() + piece.start : nullptr;
    const float* rate = rates + 2 * piece.array;
    AdamW update{rate[0], 1 - rate[1], scale, beta1, beta2, 1 - beta1, 1 - beta2, epsilon};
    kernels().adamw(update, part(kGrad), part(kWeight), part(kMean), part(kVar), copy, piece.size);
  }
}

int square_sum_inputs(const Attributes& attrs) { return int(count_of(attrs)); }

void square_sum_shapes(const Attributes&, std::vector<Shape>&, std::vector<Shape>& out) { out[0] = {1}; }

void square_sum_forward(const Attributes&, const Tensors& in, const Tensors& out) {
  if (!out[0]) return;
  std::vector<Piece> pieces = cut(in.data(), in.size());
  std::vector<double> sums(pieces.size());
#pragma omp parallel for schedule(static)
  for (size_t k = 0; k < pieces.size(); ++k) {
    const float* start = in[pieces[k].array].as<float>() + pieces[k].start;
    sums[k] = dot(start, start, pieces[k].size);
  }
  double sum = 0;
  for (double piece : sums) sum += piece;
  *out[0].as<float>() = float(sum);
}

Register adamw_op({"mxsimmim_adamw", adamw_inputs, one, adamw_shapes, adamw_types, adamw_forward, nullptr,
                   adamw_written});
Register square_sum_op({"mxsimmim_square_sum", square_sum_inputs, one, square_sum_shapes, all_float32,
                        square_sum_forward, nullptr, nullptr});

}  // namespace

}  // namespace simmim
