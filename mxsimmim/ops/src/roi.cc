// Pools boxes from the maps of a feature pyramid, each from the one of its size: RoIAlign (He et al. 2017,
// arXiv:1703.06870) with the choice of a level of Lin et al. 2017 (arXiv:1612.03144).
//
// Neighbouring numbers of a map belong to neighbouring pixels, which boxes take here and there. So maps are first
// turned to (B, H, W, C): then all that a box takes lies in rows of C.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "abi.h"

namespace simmim {

namespace {

constexpr int64_t kBoxNumbers = 4, kCorners = 4;
constexpr int64_t kBlock = 32;  // channels of a map that a thread turns, or adds to, at a time

struct Sizes {
  int64_t images, boxes, channels, levels, side, samples;  // side: of what is pooled; samples: in a bin, each way
  int64_t bins() const { return side * side; }
};

int64_t levels_of(const Attributes& attrs) {
  int64_t levels = attrs.integer("levels");
  require(levels > 0, "levels=", levels, " must be the number of maps, at least 1");
  return levels;
}

int inputs(const Attributes& attrs) { return int(levels_of(attrs)) + 1; }
int outputs(const Attributes&) { return 1; }

Sizes sizes_of(const Attributes& attrs, const std::vector<Shape>& in) {
  Sizes s{};
  s.levels = levels_of(attrs), s.side = attrs.integer("side"), s.samples = attrs.integer("samples");
  const Shape &map = in[0], &boxes = in[size_t(s.levels)];
  require(boxes.size() == 3 && boxes[2] == kBoxNumbers && map.size() == 4 && boxes[0] == map[0], "boxes ", boxes,
          " are not (B, N, 4), of the images of map ", map);
  require(s.side > 0 && s.samples > 0, "side=", s.side, " and samples=", s.samples, " must be at least 1");
  for (int64_t level = 1; level < s.levels; ++level)
    require(in[size_t(level)].size() == 4 && in[size_t(level)][0] == map[0] && in[size_t(level)][1] == map[1], "map ",
            level, " ", in[size_t(level)], " has not the images and channels of map 0 ", map);
  s.images = boxes[0], s.boxes = boxes[1], s.channels = map[1];
  return s;
}

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  for (const Shape& shape : in)
    if (!known(shape)) return;
  Sizes s = sizes_of(attrs, in);
  out[0] = {s.images, s.boxes, s.channels, s.side, s.side};
}

// A pixel of a map and its weight in a bin.
struct Term {
  int64_t pixel;
  float weight;
};

// The level of a box, or -1 for one of no area, such as those that fill a batch up.
int64_t level_of(const Attributes& attrs, const Sizes& s, const float* box) {
  double width = double(box[2]) - box[0], height = double(box[3]) - box[1];
  if (!(width > 0 && height > 0)) return -1;
  double level = std::floor(std::log2(std::sqrt(width * height) / attrs.real("canonical", 224)) + 1e-6);
  return std::clamp(int64_t(level) + attrs.integer("level", 2), int64_t(0), s.levels - 1);
}

// What a coordinate takes of a row of n pixels: the two around it and their weights; none where it is beyond the edge.
struct Line {
  int64_t low, high;
  float low_weight, high_weight;
};

Line line_of(double at, int64_t n) {
  if (!(at >= -1 && at <= double(n))) return {0, 0, 0, 0};
  at = std::max(at, 0.0);
  int64_t low = std::min(int64_t(at), n - 1), high = std::min(low + 1, n - 1);
  float part = low == high ? 0 : float(at - double(low));
  return {low, high, 1 - part, part};
}

// The terms of all bins of a box, samples^2 * 4 for each.
void terms_of(const Sizes& s, const float* box, double scale, int64_t height, int64_t width, Term* terms) {
  double left = double(box[0]) * scale - 0.5, top = double(box[1]) * scale - 0.5;
  double dx = (double(box[2]) - box[0]) * scale / double(s.side * s.samples);
  double dy = (double(box[3]) - box[1]) * scale / double(s.side * s.samples);
  float share = 1 / float(s.samples * s.samples);
  for (int64_t bin = 0; bin < s.bins(); ++bin)
    for (int64_t sample = 0; sample < s.samples * s.samples; ++sample) {
      Line y = line_of(top + dy * (double(bin / s.side * s.samples + sample / s.samples) + 0.5), height);
      Line x = line_of(left + dx * (double(bin % s.side * s.samples + sample % s.samples) + 0.5), width);
      *terms++ = {y.low * width + x.low, share * y.low_weight * x.low_weight};
      *terms++ = {y.low * width + x.high, share * y.low_weight * x.high_weight};
      *terms++ = {y.high * width + x.low, share * y.high_weight * x.low_weight};
      *terms++ = {y.high * width + x.high, share * y.high_weight * x.high_weight};
    }
}

// (rows, columns) to (columns, rows), a block of columns at a time.
void turn(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t start = 0; start < columns; start += kBlock)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = start; column < std::min(columns, start + kBlock); ++column)
        to[column * rows + row] = from[row * columns + column];
}

// Where each box takes what from.
struct Places {
  Places(const Attributes& attrs, const Sizes& s, const Tensors& maps, const float* boxes, Scratch& scratch)
      : count(s.bins() * s.samples * s.samples * kCorners),
        levels(scratch.take<int64_t>(s.images * s.boxes)),
        terms(scratch.take<Term>(s.images * s.boxes * count)) {
    std::vector<double> scales;
    for (int64_t level = 0; level < s.levels; ++level)
      scales.push_back(1 / attrs.real(("stride" + std::to_string(level)).c_str(), 1));
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < s.images * s.boxes; ++i) {
      const float* box = boxes + i * kBoxNumbers;
      int64_t level = levels[i] = level_of(attrs, s, box);
      if (level < 0) continue;
      const Shape& shape = maps[size_t(level)].shape;
      terms_of(s, box, scales[size_t(level)], shape[2], shape[3], terms + i * count);
    }
  }
  int64_t count;  // terms of a box
  int64_t* levels;
  Term* terms;
};

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  std::vector<Shape> given;
  for (const Tensor& tensor : in) given.push_back(tensor.shape);
  Sizes s = sizes_of(attrs, given);
  Scratch scratch;
  Places places(attrs, s, in, in[size_t(s.levels)].as<float>(), scratch);
  std::vector<const float*> maps;
  for (int64_t level = 0; level < s.levels; ++level) {
    const Tensor& map = in[size_t(level)];
    int64_t pixels = map.shape[2] * map.shape[3];
    float* turned = scratch.take<float>(map.size());
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < s.images; ++image)
      turn(map.as<float>() + image * s.channels * pixels, s.channels, pixels, turned + image * s.channels * pixels);
    maps.push_back(turned);
  }
  float* pooled = out[0].as<float>();
  int64_t terms = places.count / s.bins();
#pragma omp parallel
  {
    std::vector<float> sums(size_t(s.bins() * s.channels));
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < s.images * s.boxes; ++i) {
      float* to = pooled + i * s.channels * s.bins();
      int64_t level = places.levels[i];
      if (level < 0) {
        std::memset(to, 0, size_t(s.channels * s.bins()) * sizeof(float));
        continue;
      }
      const Shape& shape = in[size_t(level)].shape;
      const float* map = maps[size_t(level)] + i / s.boxes * s.channels * shape[2] * shape[3];
      std::fill(sums.begin(), sums.end(), 0.0f);
      const Term* term = places.terms + i * places.count;
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        float* sum = sums.data() + bin * s.channels;
        for (int64_t number = 0; number < terms; ++number, ++term) {
          if (term->weight == 0) continue;
          const float* from = map + term->pixel * s.channels;
          for (int64_t c = 0; c < s.channels; ++c) sum[c] += term->weight * from[c];
        }
      }
      turn(sums.data(), s.bins(), s.channels, to);
    }
  }
}

// in: gradient of what was pooled, the maps, the boxes, which have none.
void backward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  std::vector<Shape> given;
  for (size_t i = 1; i < in.size(); ++i) given.push_back(in[i].shape);
  Sizes s = sizes_of(attrs, given);
  Scratch scratch;
  Tensors maps(in.begin() + 1, in.begin() + 1 + s.levels);
  Places places(attrs, s, maps, in[size_t(s.levels) + 1].as<float>(), scratch);
  const Tensor& boxes = out[size_t(s.levels)];
  if (boxes) std::memset(boxes.data, 0, size_t(boxes.size()) * sizeof(float));
  const float* gradient = in[0].as<float>();
  float* turned = scratch.take<float>(s.images * s.boxes * s.channels * s.bins());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < s.images * s.boxes; ++i)
    turn(gradient + i * s.channels * s.bins(), s.channels, s.bins(), turned + i * s.channels * s.bins());
  std::vector<float*> sums;
  for (const Tensor& map : maps) {
    sums.push_back(scratch.take<float>(map.size()));
    std::memset(sums.back(), 0, size_t(map.size()) * sizeof(float));
  }
  // A thread adds to channels of its own, box by box: the order of sums does not depend on their number.
  int64_t blocks = (s.channels + kBlock - 1) / kBlock, terms = places.count / s.bins();
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < s.images * blocks; ++part) {
    int64_t image = part / blocks, first = part % blocks * kBlock, n = std::min(kBlock, s.channels - first);
    for (int64_t i = image * s.boxes; i < (image + 1) * s.boxes; ++i) {
      int64_t level = places.levels[i];
      if (level < 0) continue;
      const Shape& shape = maps[size_t(level)].shape;
      float* map = sums[size_t(level)] + image * s.channels * shape[2] * shape[3] + first;
      const Term* term = places.terms + i * places.count;
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        const float* from = turned + (i * s.bins() + bin) * s.channels + first;
        for (int64_t number = 0; number < terms; ++number, ++term) {
          if (term->weight == 0) continue;
          float* to = map + term->pixel * s.channels;
          for (int64_t c = 0; c < n; ++c) to[c] += term->weight * from[c];
        }
      }
    }
  }
  for (int64_t level = 0; level < s.levels; ++level) {
    const Tensor& map = out[size_t(level)];
    if (!map) continue;
    int64_t pixels = map.shape[2] * map.shape[3];
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < s.images; ++image)
      turn(sums[size_t(level)] + image * s.channels * pixels, pixels, s.channels,
           map.as<float>() + image * s.channels * pixels);
  }
}

Register pyramid_pool({"mxsimmim_pyramid_pool", inputs, outputs, shapes, all_float32, forward, backward, nullptr});

}  // namespace

}  // namespace simmim
