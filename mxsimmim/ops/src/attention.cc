// A transformer's first half block: x + keep * gamma * proj(attend(qkv(norm(x)))), see attention in ops/backend.py.
//
// H heads of size D make E = H D columns: C, or in a part of a half block fewer. Inputs: x, norm weight and bias, qkv
// weight and bias, proj weight, then proj bias, bias, mask, gamma, keep as the attributes of these names say. Outputs:
// the result and, unless `recompute`, qkv (R, 3E) and what attention gave, (R, E), whose rows are in the order of
// windows. Scores exist for one tile at a time: one sequence and a few heads.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "branch.h"

namespace simmim {
namespace {

enum { X, NORM_WEIGHT, NORM_BIAS, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, REQUIRED };

struct Places {
  int proj_bias = -1, bias = -1, mask = -1, gamma = -1, keep = -1, count = REQUIRED;
  explicit Places(const Attributes& attrs) {
    if (attrs.flag("proj_bias")) proj_bias = count++;
    if (attrs.flag("bias")) bias = count++;
    if (attrs.flag("mask")) mask = count++;
    if (attrs.flag("gamma")) gamma = count++;
    if (attrs.flag("keep")) keep = count++;
  }
};

// The tokens of an image in windows, see Windows in ops/layout.py; one of no side is the whole image.
struct Windows {
  int64_t height, width, side, shift, down = 1, across = 1;
  explicit Windows(const Attributes& attrs)
      : height(attrs.integer("height")),
        width(attrs.integer("width")),
        side(attrs.integer("window")),
        shift(attrs.integer("shift")) {
    if (!side) return;
    down = (height + side - 1) / side;
    across = (width + side - 1) / side;
  }
  int64_t count() const { return down * across; }
  // Tokens of an image of `tokens`, with padding.
  int64_t padded(int64_t tokens) const { return side ? count() * side * side : tokens; }
  // Which token of the image stands at `place` of the windows one after another, -1 for padding.
  int64_t token(int64_t place) const {
    int64_t window = place / (side * side), inside = place % (side * side);
    int64_t y = window / across * side + inside / side, x = window % across * side + inside % side;  // after the shift
    if (down > 1) y = (y + shift) % (down * side);
    if (across > 1) x = (x + shift) % (across * side);
    return y < height && x < width ? y * width + x : -1;
  }
};

int inputs(const Attributes& attrs) { return Places(attrs).count; }
int outputs(const Attributes& attrs) { return attrs.flag("recompute") ? 1 : 3; }

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  Places at(attrs);
  Windows windows(attrs);
  int64_t heads = attrs.integer("heads"), depth = attrs.integer("depth");
  if (!known(in[X])) return;
  require(in[X].size() == 3, "x must be (images, tokens, channels), it has shape ", in[X]);
  int64_t images = in[X][0], tokens = in[X][1], width = in[X][2];
  require(heads > 0 && (depth > 0 || width % heads == 0), "x of shape ", in[X], " has channels that ", heads,
          " heads do not divide");
  require(!windows.side || windows.height * windows.width == tokens, "x of shape ", in[X], " is not ", windows.height,
          " x ", windows.width, " tokens");
  int64_t padded = windows.padded(tokens), length = padded / windows.count();
  int64_t columns = depth ? heads * depth : width;
  settle("norm's weight", in[NORM_WEIGHT], {width});
  settle("norm's bias", in[NORM_BIAS], {width});
  settle("qkv's weight", in[QKV_WEIGHT], {3 * columns, width});
  settle("qkv's bias", in[QKV_BIAS], {3 * columns});
  settle("proj's weight", in[PROJ_WEIGHT], {width, columns});
  if (at.proj_bias >= 0) settle("proj's bias", in[size_t(at.proj_bias)], {width});
  if (at.bias >= 0) settle("the scores' bias", in[size_t(at.bias)], {1, heads, length, length});
  if (at.mask >= 0) settle("mask", in[size_t(at.mask)], {windows.count(), 1, length, length});
  if (at.gamma >= 0) settle("gamma", in[size_t(at.gamma)], {width});
  if (at.keep >= 0) settle("keep", in[size_t(at.keep)], {images, 1});
  out[0] = in[X];
  if (out.size() > 1) {
    out[1] = kept(images * padded * 3 * columns, attrs.flag("bf16"));
    out[2] = kept(images * padded * columns, attrs.flag("bf16"));
  }
}

struct Attention : Branch {
  const float *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;
  const float *bias, *mask;                              // (H, N, N) and (windows, N, N), or null
  int64_t heads, depth, length, sequences, windows = 1;  // H, D, N, B * windows
  int64_t columns;                                       // E
  int64_t group;                                         // heads of a tile
  float factor;                                          // of scores, D^-1/2

  Attention(const Attributes& attrs, const Tensor* in, Scratch& scratch) {
    Places at(attrs);
    auto input = [&](int place) { return place < 0 ? nullptr : in[place].as<const float>(); };
    x = input(X);
    norm_weight = input(NORM_WEIGHT);
    norm_bias = input(NORM_BIAS);
    qkv_weight = input(QKV_WEIGHT);
    qkv_bias = input(QKV_BIAS);
    proj_weight = input(PROJ_WEIGHT);
    proj_bias = input(at.proj_bias);
    bias = input(at.bias);
    mask = input(at.mask);
    gamma = input(at.gamma);
    keep = input(at.keep);
    partial = attrs.flag("partial");
    eps = float(attrs.real("eps"));
    tokens = length = in[X].shape[1];
    width = in[X].shape[2];
    heads = attrs.integer("heads");
    depth = attrs.integer("depth", width / heads);
    columns = heads * depth;
    factor = 1.f / __builtin_sqrtf(float(depth));
    total = rows = in[X].shape[0] * tokens;
    order = nullptr;
    if (Windows given(attrs); given.side) {
      windows = given.count();
      length = given.side * given.side;
      rows = in[X].shape[0] * windows * length;
      arrange(given, scratch);
    }
    sequences = rows / length;
    // A tile's matrices should stay in the second-level cache.
    constexpr int64_t cache = 256 << 10;
    group = std::max<int64_t>(1, std::min(heads, cache / (12 * length * length)));
    while (heads % group) --group;
  }

  // Rows in the order of windows after the shift.
  void arrange(const Windows& given, Scratch& scratch) {
    int32_t* list = scratch.take<int32_t>(rows);
    int64_t padded = windows * length;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      int64_t token = given.token(row % padded);
      list[row] = token < 0 ? PADDING : int32_t(row / padded * tokens + token);
    }
    order = list;
  }

  template <class T> void project(T* n, float* mean, float* rstd, T* qkv) const {
    normalise(n, mean, rstd);
    multiply(qkv, type_of<T>(), {n, type_of<T>(), rows, width}, transposed({qkv_weight, Type::f32, 3 * columns, width}),
             qkv_bias);
  }
};

// One thread's work on tiles: queries, keys and values are gathered into small matrices (group, N, D), multiplied
// there, and scattered back. A group's scores are (group, N, N).
template <class T> struct Tile {
  const Attention& is;
  int64_t elements, scores;  // of a matrix (group, N, D), of one (group, N, N)
  size_t bytes;              // of one head of one token
  T *q, *k, *v, *p;
  float* s;

  Tile(const Attention& attention, Scratch& scratch)
      : is(attention),
        elements(is.group * is.length * is.depth),
        scores(is.group * is.length * is.length),
        bytes(size_t(is.depth) * sizeof(T)),
        q(scratch.take<T>(elements)),
        k(scratch.take<T>(elements)),
        v(scratch.take<T>(elements)),
        p(scratch.take<T>(scores)),
        s(scratch.take<float>(scores)) {}

  // A head's columns of a matrix with `stride` columns.
  void gather(const T* from, int64_t stride, T* to) const {
    for (int64_t g = 0; g < is.group; ++g)
      for (int64_t i = 0; i < is.length; ++i)
        std::memcpy(to + (g * is.length + i) * is.depth, from + i * stride + g * is.depth, bytes);
  }
  void scatter(const T* from, T* to, int64_t stride) const {
    for (int64_t g = 0; g < is.group; ++g)
      for (int64_t i = 0; i < is.length; ++i)
        std::memcpy(to + i * stride + g * is.depth, from + (g * is.length + i) * is.depth, bytes);
  }
  void load(const T* qkv, int64_t sequence, int64_t head) const {
    const T* from = qkv + sequence * is.length * 3 * is.columns + head * is.depth;
    gather(from, 3 * is.columns, q);
    gather(from + is.columns, 3 * is.columns, k);
    gather(from + 2 * is.columns, 3 * is.columns, v);
  }
  void softmax(int64_t sequence, int64_t head) const {
    int64_t pairs = is.length * is.length;
    const float* mask = is.mask ? is.mask + sequence % is.windows * pairs : nullptr;
    const float* bias = is.bias ? is.bias + head * pairs : nullptr;
    for (int64_t row = 0; row < is.group * is.length; ++row) {
      int64_t at = row * is.length;
      rows<T>().softmax(s + at, is.factor, bias ? bias + at : nullptr, mask ? mask + at % pairs : nullptr, is.length,
                        p + at);
    }
  }
};

// o (R, E) from qkv (R, 3E).
template <class T> void attend(const Attention& is, const T* qkv, T* o) {
  constexpr Type type = type_of<T>();
  SmallProduct score(is.group, is.length, is.depth, is.length, type, false, true, Type::f32);
  SmallProduct mix(is.group, is.length, is.length, is.depth, type, false, false, type);
  int64_t tiles = is.sequences * (is.heads / is.group);
#pragma omp parallel
  {
    Scratch scratch;
    Tile<T> tile(is, scratch);
    T* mixed = scratch.take<T>(tile.elements);
    char* pad = scratch.take<char>(std::max(score.scratch(), mix.scratch()));
    SmallProduct::Bound scoring(score, tile.q, tile.k, tile.s, pad), mixing(mix, tile.p, tile.v, mixed, pad);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t sequence = t % is.sequences, head = t / is.sequences * is.group;
      tile.load(qkv, sequence, head);
      scoring.run();
      tile.softmax(sequence, head);
      mixing.run();
      tile.scatter(mixed, o + sequence * is.length * is.columns + head * is.depth, is.columns);
    }
  }
}

// dqkv (R, 3E) and dbias (H, N, N), unless null, from do (R, E).
template <class T> void attend_backward(const Attention& is, const T* qkv, const T* dout, T* dqkv, float* dbias) {
  constexpr Type type = type_of<T>();
  int64_t n = is.length, d = is.depth, g = is.group;
  SmallProduct score(g, n, d, n, type, false, true, Type::f32), mix_left(g, n, d, n, type, false, true, Type::f32);
  SmallProduct mix_right(g, n, n, d, type, true, false, type), score_left(g, n, n, d, type, false, false, type);
  int64_t tiles = is.sequences * (is.heads / g), pairs = is.heads * n * n;
  Scratch outer;
  // Tiles are in the order of their heads, so that a thread adds to the biases of few.
  float* partial = dbias ? outer.take<float>(pairs * omp_get_max_threads()) : nullptr;
#pragma omp parallel
  {
    Scratch scratch;
    Tile<T> tile(is, scratch);
    T *upper = scratch.take<T>(tile.elements), *ds = scratch.take<T>(tile.scores);
    T *dq = scratch.take<T>(tile.elements), *dk = scratch.take<T>(tile.elements), *dv = scratch.take<T>(tile.elements);
    float* dp = scratch.take<float>(tile.scores);
    char* pad =
        scratch.take<char>(std::max({score.scratch(), mix_left.scratch(), mix_right.scratch(), score_left.scratch()}));
    SmallProduct::Bound scoring(score, tile.q, tile.k, tile.s, pad), to_p(mix_left, upper, tile.v, dp, pad),
        to_v(mix_right, tile.p, upper, dv, pad), to_q(score_left, ds, tile.k, dq, pad),
        to_k(mix_right, ds, tile.q, dk, pad);
    float* mine = nullptr;
    if (dbias) {
      mine = partial + pairs * omp_get_thread_num();
      std::memset(mine, 0, size_t(pairs) * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t sequence = t % is.sequences, head = t / is.sequences * g;
      tile.load(qkv, sequence, head);
      scoring.run();
      tile.softmax(sequence, head);
      tile.gather(dout + sequence * n * is.columns + head * d, is.columns, upper);
      to_p.run();
      to_v.run();
      for (int64_t row = 0; row < g * n; ++row)
        rows<T>().softmax_backward(tile.p + row * n, dp + row * n, is.factor, ds + row * n,
                                   mine ? mine + (head * n + row) * n : nullptr, n);
      to_q.run();
      to_k.run();
      T* to = dqkv + sequence * n * 3 * is.columns + head * d;
      tile.scatter(dq, to, 3 * is.columns);
      tile.scatter(dk, to + is.columns, 3 * is.columns);
      tile.scatter(dv, to + 2 * is.columns, 3 * is.columns);
    }
    if (dbias) {
      int threads = omp_get_num_threads();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pairs; ++i) {
        float sum = partial[i];
        for (int thread = 1; thread < threads; ++thread) sum += partial[pairs * thread + i];
        dbias[i] = sum;
      }
    }
  }
}

template <class T> void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  Scratch scratch;
  Attention is(attrs, in.data(), scratch);
  bool kept = out.size() > 1;
  T* qkv = kept ? out[1].as<T>() : scratch.take<T>(is.rows * 3 * is.columns);
  T* o = kept ? out[2].as<T>() : scratch.take<T>(is.rows * is.columns);
  {
    Scratch inner;
    float* statistics = inner.take<float>(2 * is.rows);
    is.project(inner.take<T>(is.rows * is.width), statistics, statistics + is.rows, qkv);
  }
  attend(is, qkv, o);
  float* y = scratch.take<float>(is.rows * is.width);
  multiply(y, Type::f32, {o, type_of<T>(), is.rows, is.columns},
           transposed({is.proj_weight, Type::f32, is.width, is.columns}), is.proj_bias);
  is.add(y, out[0].as<float>());
}

template <class T> void backward(const Attributes& attrs, const Tensors& all, const Tensors& out) {
  int given = outputs(attrs);
  const Tensor *in = all.data() + given, *results = in + inputs(attrs);
  const float* dout = all[0].as<const float>();
  auto wanted = [&](int place) { return place < 0 ? nullptr : out[size_t(place)].as<float>(); };
  Places at(attrs);
  Scratch scratch;
  Attention is(attrs, in, scratch);
  int64_t rows = is.rows, width = is.width, columns = is.columns;
  T* n = scratch.take<T>(rows * width);
  float *mean = scratch.take<float>(rows), *rstd = scratch.take<float>(rows);
  const T *qkv, *o;
  if (given > 1) {
    qkv = results[1].as<const T>();
    o = results[2].as<const T>();
    is.normalise(n, mean, rstd);
  } else {
    T *again = scratch.take<T>(rows * 3 * columns), *mixed = scratch.take<T>(rows * columns);
    is.project(n, mean, rstd, again);
    attend(is, again, mixed);
    qkv = again;
    o = mixed;
  }
  T* dqkv = scratch.take<T>(rows * 3 * columns);
  {
    Scratch inner;
    T *d = inner.take<T>(rows * width), *d_o = inner.take<T>(rows * columns);
    float* sums = inner.take<float>(width);
    T* scaled = is.incoming(dout, d, inner, sums);
    multiply(d_o, type_of<T>(), {scaled, type_of<T>(), rows, width}, {is.proj_weight, Type::f32, width, columns});
    is.projection_backward(d, sums, o, columns, is.proj_weight, is.proj_bias, out[PROJ_WEIGHT], wanted(at.proj_bias),
                           wanted(at.gamma));
    attend_backward(is, qkv, d_o, dqkv, wanted(at.bias));
  }
  if (wanted(QKV_BIAS)) column_sums(dqkv, rows, 3 * columns, wanted(QKV_BIAS));
  weight_gradient(dqkv, rows, 3 * columns, n, width, out[QKV_WEIGHT]);
  if (!wanted(X) && !wanted(NORM_WEIGHT) && !wanted(NORM_BIAS)) return;
  float* dn = scratch.take<float>(rows * width);
  multiply(dn, Type::f32, {dqkv, type_of<T>(), rows, 3 * columns}, {is.qkv_weight, Type::f32, 3 * columns, width});
  is.normalise_backward(dn, mean, rstd, dout, wanted(X), wanted(NORM_WEIGHT), wanted(NORM_BIAS));
}

void forward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  attrs.flag("bf16") ? forward<Bf16>(attrs, in, out) : forward<float>(attrs, in, out);
}
void backward_either(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  for (int place : {Places(attrs).keep, Places(attrs).mask})
    if (place >= 0) zero(out[size_t(place)]);
  attrs.flag("bf16") ? backward<Bf16>(attrs, in, out) : backward<float>(attrs, in, out);
}

Register attention_operator({"mxsimmim_attention", inputs, outputs, shapes, all_float32, forward_either,
                             backward_either, nullptr});

}  // namespace
}  // namespace simmim
