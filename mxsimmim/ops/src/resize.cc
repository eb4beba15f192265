// One pass of Pillow's resize; data/resize.py says what it computes and has the same in Python, bit for bit.
//
// Weights are computed here, for any x86-64: what the kernels' compilation may reorder would change their last bits.
#include <algorithm>
#include <cmath>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simmim {
namespace {

double weight_at(double x, bool bicubic) {
  if (!bicubic) return std::max(0.0, 1.0 - x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;  // Keys (1981) with a = -0.5
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

}  // namespace
}  // namespace simmim

// `rows` are those from `base` on, of n; of the `size` rows that these become, `out` gets `count` from `start` on. A
// row has `length` bytes. `sums` has as many elements, and `weights` as a row of `out` is made of.
EXPORT void mxsimmim_resize_rows(const uint8_t* rows, uint8_t* out, int64_t length, int64_t count, int64_t n,
                                 int64_t base, int64_t size, int64_t start, int32_t backwards, int32_t bicubic,
                                 double* weights, int32_t* sums) {
  const simmim::Kernels& loops = simmim::kernels();
  const double scale = double(n) / double(size), wide = std::max(scale, 1.0);
  const double inverse = 1.0 / wide, support = wide * (bicubic ? 2 : 1);
  for (int64_t y = 0; y < count; ++y) {
    const double centre = (double(start + y) + 0.5) * scale;
    const int64_t first = std::max(int64_t(centre - support + 0.5), int64_t(0));
    const int64_t taps = std::min(int64_t(centre + support + 0.5), n) - first;
    double total = 0;
    for (int64_t k = 0; k < taps; ++k) {
      weights[k] = simmim::weight_at(std::fabs((double(k + first) - centre + 0.5) * inverse), bicubic != 0);
      total += weights[k];
    }
    std::fill_n(sums, length, int32_t(1) << 21);  // rounds to nearest
    for (int64_t k = 0; k < taps; ++k) {
      const double exact = weights[k] / total * (1 << 22);
      loops.add_row(rows + (first + k - base) * length, int32_t(exact >= 0 ? exact + 0.5 : exact - 0.5), sums, length);
    }
    loops.to_bytes(sums, out + (backwards ? count - 1 - y : y) * length, length);
  }
}
