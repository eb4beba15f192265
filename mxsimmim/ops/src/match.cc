// Compares boxes with those that are known of an image: which object each overlaps most, and what crowds cover of it.
//
// Of the objects that an image may have only those that it has are looked at, usually few of a hundred.
#include <algorithm>
#include <cstring>

#include "abi.h"

namespace simmim {

namespace {

constexpr int64_t kBoxNumbers = 4, kResults = 4;
constexpr float kObject = 1, kCrowd = 2;  // kinds
constexpr float kSmall = 1e-9f;           // square pixels

struct Sizes {
  int64_t images, boxes, known;
  bool shared;  // one set of boxes for all images
};

int inputs(const Attributes&) { return 3; }
int outputs(const Attributes&) { return kResults; }

Sizes sizes_of(const Shape& boxes, const Shape& truth, const Shape& kind) {
  require(boxes.size() == 3 && truth.size() == 3 && boxes[2] == kBoxNumbers && truth[2] == kBoxNumbers &&
              (boxes[0] == 1 || boxes[0] == truth[0]),
          "boxes ", boxes, " are not (B, N, 4) or (1, N, 4) for truth ", truth);
  require(kind == Shape({truth[0], truth[1]}), "kind ", kind, " is not one number for each of truth ", truth);
  return {truth[0], boxes[1], truth[1], boxes[0] == 1};
}

void shapes(const Attributes&, std::vector<Shape>& in, std::vector<Shape>& out) {
  for (const Shape& shape : in)
    if (!known(shape)) return;
  Sizes s = sizes_of(in[0], in[1], in[2]);
  for (Shape& shape : out) shape = {s.images, s.boxes};
}

float area_of(const float* box) { return std::max(box[2] - box[0], 0.0f) * std::max(box[3] - box[1], 0.0f); }

float common_of(const float* a, const float* b) {
  float width = std::min(a[2], b[2]) - std::max(a[0], b[0]), height = std::min(a[3], b[3]) - std::max(a[1], b[1]);
  return std::max(width, 0.0f) * std::max(height, 0.0f);
}

// A known box, its area and its number among those of its image.
struct Known {
  const float* box;
  float area;
  int64_t number;
  float overlap(const float* other, float other_area) const {
    float common = common_of(other, box);
    return common / std::max(other_area + area - common, kSmall);
  }
};

std::vector<Known> of_kind(const float* truth, const float* kinds, int64_t count, float kind) {
  std::vector<Known> found;
  for (int64_t i = 0; i < count; ++i)
    if (kinds[i] == kind) found.push_back({truth + i * kBoxNumbers, area_of(truth + i * kBoxNumbers), i});
  return found;
}

void forward(const Attributes&, const Tensors& in, const Tensors& out) {
  Sizes s = sizes_of(in[0].shape, in[1].shape, in[2].shape);
  for (int64_t image = 0; image < s.images; ++image) {
    const float* boxes = in[0].as<float>() + (s.shared ? 0 : image * s.boxes * kBoxNumbers);
    const float *truth = in[1].as<float>() + image * s.known * kBoxNumbers,
                *kinds = in[2].as<float>() + image * s.known;
    std::vector<Known> objects = of_kind(truth, kinds, s.known, kObject),
                       crowds = of_kind(truth, kinds, s.known, kCrowd);
    float* results[kResults];
    for (int64_t i = 0; i < kResults; ++i) results[i] = out[size_t(i)].as<float>() + image * s.boxes;
    std::vector<float> largest(objects.size(), 0.0f);  // of each object, with any box
#pragma omp parallel
    {
      std::vector<float> own(objects.size(), 0.0f);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < s.boxes; ++n) {
        const float* box = boxes + n * kBoxNumbers;
        float area = area_of(box), best = 0, covered = 0;
        int64_t number = 0;
        for (size_t i = 0; i < objects.size(); ++i) {
          float overlap = objects[i].overlap(box, area);
          own[i] = std::max(own[i], overlap);
          if (overlap > best) best = overlap, number = objects[i].number;
        }
        for (const Known& crowd : crowds)
          covered = std::max(covered, common_of(box, crowd.box) / std::max(area, kSmall));
        results[0][n] = best, results[1][n] = float(number), results[3][n] = covered;
      }
#pragma omp critical
      for (size_t i = 0; i < objects.size(); ++i) largest[i] = std::max(largest[i], own[i]);
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t n = 0; n < s.boxes; ++n) {
        const float* box = boxes + n * kBoxNumbers;
        bool is_best = false;
        if (results[0][n] > 0) {
          float area = area_of(box);
          for (size_t i = 0; i < objects.size() && !is_best; ++i)
            is_best = largest[i] > 0 && objects[i].overlap(box, area) == largest[i];
        }
        results[2][n] = is_best;
      }
    }
  }
}

void backward(const Attributes&, const Tensors&, const Tensors& out) {
  for (const Tensor& tensor : out)
    if (tensor) std::memset(tensor.data, 0, size_t(tensor.size()) * sizeof(float));
}

Register match_boxes({"mxsimmim_match_boxes", inputs, outputs, shapes, all_float32, forward, backward, nullptr});

}  // namespace

}  // namespace simmim
