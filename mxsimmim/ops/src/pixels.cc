// Images to cells of pixels, normalised on the way where they come as bytes.
#include <cstring>
#include <type_traits>

#include "abi.h"

namespace simmim {

namespace {

constexpr int64_t kChannels = 3;

// Images of height x width pixels, in down x across cells of cell x cell.
struct Grid {
  int64_t images, height, width, cell, down, across;
};

bool planar(const Shape& image) { return image.size() == 4 && image[1] == kChannels; }
bool interleaved(const Shape& image) { return image.size() == 4 && image[3] == kChannels; }

// Of an image that is both planar and interleaved, which has as many cells either way, if nobody says `bytes`.
Grid grid_of(const Attributes& attrs, const Shape& image, bool bytes = false) {
  int64_t cell = attrs.integer("cell");
  require(planar(image) || interleaved(image), "image has shape ", image, " instead of (B, 3, H, W) or (B, H, W, 3)");
  size_t first = planar(image) && !bytes ? 2 : 1;
  int64_t height = image[first], width = image[first + 1];
  require(cell > 0 && height % cell == 0 && width % cell == 0, "image ", image, " cannot be divided into cells of ",
          Shape{cell, cell});
  return {image[0], height, width, cell, height / cell, width / cell};
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
  int64_t rows = grid.images * grid.down;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t y = 0; y < grid.cell; ++y) line(row / grid.down, row % grid.down * grid.cell + y, row, y);
}

// Copies between an image (B, 3, H, W) and its cells (B, cells, 3 * cell^2), in the direction that `move` does:
// move(cell pixels, image pixels, count).
template <class Move> void exchange(const Grid& grid, Move move) {
  with_cell(grid.cell, [&](auto cell) {
    each_line(grid, [&](int64_t image, int64_t line, int64_t row, int64_t y) {
      for (int64_t c = 0; c < kChannels; ++c) {
        int64_t pixels = ((image * kChannels + c) * grid.height + line) * grid.width;
        int64_t cells = row * grid.across * kChannels * cell * cell + (c * cell + y) * cell;
        for (int64_t j = 0; j < grid.across; ++j) move(cells + j * kChannels * cell * cell, pixels + j * cell, cell);
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
      const uint8_t* pixels = image + (number * grid.height + line) * grid.width * kChannels;
      float* cells = out + row * grid.across * kChannels * cell * cell + y * cell;
      for (int64_t j = 0; j < grid.across; ++j)
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
  out[0] = {grid.images, grid.down * grid.across, kChannels * grid.cell * grid.cell};
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
          image.shape, " instead of ", bytes ? "(B, H, W, 3)" : "(B, 3, H, W)");
}

void forward(const Attributes& attrs, const Tensors& in, const Tensors& out) {
  const Tensor& image = in[0];
  check_layout(image);
  Grid grid = grid_of(attrs, image.shape, image.type == Type::u8);
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
