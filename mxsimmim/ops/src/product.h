// Matrix products by oneDNN, in float32 or bf16 (sums in float32).
#pragma once

#include <memory>

#include "abi.h"

namespace simmim {

// rows x cols values, a row after the other; or, if transposed, a column after the other.
struct Matrix {
  const void* data;
  Type type;  // f32, or f16 for bf16
  int64_t rows, cols;
  bool transposed = false;
};

// The same values seen as cols x rows.
inline Matrix transposed(Matrix m) { return {m.data, m.type, m.cols, m.rows, !m.transposed}; }

// c (a.rows, b.cols) = a b + bias, or c += a b + bias if `add`, all threads. b is brought into oneDNN's own layout
// first where that pays; on the way a b of float32 is rounded to the type of a.
void multiply(void* c, Type c_type, Matrix a, Matrix b, const float* bias = nullptr, bool add = false);

// The same product of `count` pairs of small matrices lying one after another, by the calling thread alone. The shapes
// are set once; calls on several threads may overlap.
class SmallProduct {
 public:
  // (rows, depth) times (depth, cols); an operand is given transposed where its flag says so.
  SmallProduct(int64_t count, int64_t rows, int64_t depth, int64_t cols, Type type, bool a_transposed,
               bool b_transposed, Type c_type);
  int64_t scratch() const;  // bytes that `run` needs

  // A thread's operands: made once, run often.
  class Bound {
   public:
    Bound(const SmallProduct& product, const void* a, const void* b, void* c, void* scratch);
    ~Bound();
    void run() const;
    Bound(const Bound&) = delete;
    Bound& operator=(const Bound&) = delete;

   private:
    struct Parts;
    Parts* parts_;
  };

 private:
  friend class Bound;
  struct Plan;
  std::shared_ptr<const Plan> plan_;
};

}  // namespace simmim
