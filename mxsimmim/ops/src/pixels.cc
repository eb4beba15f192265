// Images to cells of pixels, normalised on the way where they come as bytes.
#include <cstring>
#include <type_traits>

#include "abi.h"

namespace simmim {

namespace {

constexpr int64_t kChannels = 3;

// Images of side x side pixels, in n x n cells of cell x cell.
struct Grid {
  int64_t images, side, cell, n;
};

bool planar(const Shape& image) { return image.size() == 4 && image[1] == kChannels && image[2] == image[3]; }
bool interleaved(const Shape& image) { return image.size() == 4 && image[3] == kChannels && image[1] == image[2]; }

Grid grid_of(const Attributes& attrs, const Shape& image) {
  int64_t cell = attrs.integer("cell");
  require(planar(image) || interleaved(image), "image has shape ", image, " instead of (B, 3, S, S) or (B, S, S, 3)");
  require(cell > 0 && image[2] % cell == 0, "image ", image, " cannot be divided into cells of ", Shape{cell, cell});
  return {image[0], image[2], cell, image[2] / cell};
}

// Calls body with the side of a cell, as a constant of the compiler where it is a usual one.
template <class Body> void with_cell(int64_t cell, Body body) {
  switch (cell) {
    case 4: return body(std::integral_constant<int64_t, 4>());
    case 16: return body(std::integral_constant<int64_t, 16>());
    case 32: return body(std::integral_constant<int64_t, 32>());
    default: return body(cell);
  }
}

// Calls line(image, y, row): for each row of pixels, on all threads; row counts the rows of cells of all images.
template <class Line> void each_line(const Grid& grid, Line line) {
  int64_t rows = grid.images * grid.n;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t y = 0; y < grid.cell; ++y) line(row / grid.n, row % grid.n * grid.cell + y, row, y);
}

// Copies between an image (B, 3, S, S) and its cells (B, n^2, 3 * cell^2), in the direction that `move` does:
// move(cell pixels, image pixels, count).
template <class Move> void exchange(const Grid& grid, Move move) {
  with_cell(grid.cell, [&](auto cell) {
    each_line(grid, [&](int64_t image, int64_t line, int64_t row, int64_t y) {
      for (int64_t c = 0; c < kChannels; ++c) {
        int64_t pixels = ((image * kChannels + c) * grid.side + line) * grid.side;
        int64_t cells = row * grid.n * kChannels * cell * cell + (c * cell + y) * cell;
        for (int64_t j = 0; j < grid.n; ++j) move(cells + j * kChannels * cell * cell, pixels + j * cell, cell);
      }
    });
  });
}

void from_bytes(const Attributes& attrs, const Grid& grid, const uint8_t* image, float* out) {
  // What each of the 256 values becomes, with the roundings of mx.nd.image.to_tensor and normalize.
  static const char* const means[] = {"mean0", "mean1", "mean2"};
  static const char* const deviations[] = {"std0", "std1", "std2"};
  float values[kChannels][256];
  for (int64_t c = 0; c < kChannels; ++c) {
    float mean = float(attrs.real(means[c], 0)), deviation = float(attrs.real(deviations[c], 1));
    for (int v = 0; v < 256; ++v) values[c][v] = (float(v) / 255.0f - mean) / deviation;
  }
  with_cell(grid.cell, [&](auto cell) {
    each_line(grid, [&](int64_t number, int64_t line, int64_t row, int64_t y) {
      const uint8_t* pixels = image + (number * grid.side + line) * grid.side * kChannels;
      float* cells = out + row * grid.n * kChannels * cell * cell + y * cell;
      for (int64_t j = 0; j < grid.n; ++j)
        for (int64_t c = 0; c < kChannels; ++c) {
          float* to = cells + (j * kChannels + c) * cell * cell;
          const uint8_t* from = pixels + j * cell * kChannels + c;
          for (int64_t x = 0; x < cell; ++x) to[x] = values[c][from[x * kChannels]];
        }
    });
  });
}

int one(const Attributes&) { return 1; }

void shapes(const Attributes& attrs, std::vector<Shape>& in, std::vector<Shape>& out) {
  if (!known(in[0])) return;
  Grid grid = grid_of(attrs, in[0]);
  out[0] = {grid.images, grid.n * grid.n, kChannels * grid.cell * grid.cell};
}

void types(const Attributes&, std::vector<Type>& in, std::vector<Type>& out) {
  require(int(in[0]) < 0 || in[0] == Type::f32 || in[0] == Type::u8,
          "image must be float32 or uint8, not MXNet's type number ", int(in[0]));
  out[0] = Type::f32;
}

// Bytes lie with their channels together, float32 images in three planes.
void check_layout(const Tensor& image) {
  bool bytes = image.type == Type::u8;
  require(bytes ? interleaved(image.shape) : planar(image.shape), bytes ? "a uint8" : "a float32", " image has shape ",
          image.shape, " instead of ", bytes ? "(B, S, S, 3)" : "(B, 3, S, S)");
}

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  const Tensor& image = in[0];
  check_layout(image);
  Grid grid = grid_of(attrs, image.shape);
  float* cells = out[0].as<float>();
  if (image.type == Type::u8) return from_bytes(attrs, grid, image.as<uint8_t>(), cells);
  const float* pixels = image.as<float>();
  exchange(grid, [=](int64_t to, int64_t from, auto count) {
    std::memcpy(cells + to, pixels + from, size_t(count) * sizeof(float));
  });
}

// in: gradient of the cells, image, cells.
void backward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  const Tensor& gradient = out[0];
  if (!gradient) return;
  if (gradient.type == Type::u8) {  // bytes have none
    std::memset(gradient.data, 0, size_t(gradient.size()));
    return;
  }
  Grid grid = grid_of(attrs, gradient.shape);
  const float* cells = in[0].as<float>();
  float* pixels = gradient.as<float>();
  exchange(grid, [=](int64_t from, int64_t to, auto count) {
    std::memcpy(pixels + to, cells + from, size_t(count) * sizeof(float));
  });
}

Register patchify({"mxsimmim_patchify", one, one, shapes, types, forward, backward, nullptr});

}  // namespace

}  // namespace simmim
