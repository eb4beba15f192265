// What an operator of this library sees of MXNet, and how it makes itself known.
//
// MXNet 1.9.1 finds the operators of a loaded library through a few C functions (lib_api version 11), which abi.cc
// defines. Two things it does not tell an operator: whether a result replaces what its buffer holds or is added to it
// (grad_req='add'; see ops/native.py), and bf16, which has no type number there: it travels as float16.
#pragma once

#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace simmim {

enum class Type : int { f32 = 0, f16 = 2, u8 = 3, i32 = 4 };  // MXNet's numbers; f16 means the storage of bf16

using Shape = std::vector<int64_t>;

int64_t size_of(const Shape& shape);      // number of elements
std::string to_text(const Shape& shape);  // "(2, 3)"

struct Tensor {
  void* data;  // null: nobody wants this result
  Shape shape;
  Type type;
  bool added = false;  // a weight's gradient, which is added to what is there

  explicit operator bool() const { return data != nullptr; }
  template <class T> T* as() const { return static_cast<T*>(data); }
  int64_t size() const { return size_of(shape); }
};

using Tensors = std::vector<Tensor>;

class Attributes {
 public:
  explicit Attributes(std::map<std::string, std::string> values) : values_(std::move(values)) {}
  // The value of a key, or `otherwise` where the call does not give it.
  int64_t integer(const char* key, int64_t otherwise = 0) const;
  double real(const char* key, double otherwise = 0) const;
  bool flag(const char* key) const { return integer(key) != 0; }

 private:
  std::map<std::string, std::string> values_;
};

// What is wrong with a call; reaches Python as the text of an MXNetError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// require(a == b, "linear: data ", a_shape, " does not fit weight ", b_shape)
inline void describe(std::ostringstream&) {}
template <class... Rest> void describe(std::ostringstream& text, const Shape& shape, const Rest&... rest);
template <class First, class... Rest>
void describe(std::ostringstream& text, const First& first, const Rest&... rest) {
  text << first;
  describe(text, rest...);
}
template <class... Rest>
void describe(std::ostringstream& text, const Shape& shape, const Rest&... rest) {
  text << to_text(shape);
  describe(text, rest...);
}
template <class... Parts> void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  describe(text, parts...);
  throw Error(text.str());
}

// An operator. `backward` gets the gradients of all outputs, then the inputs, then the outputs, and fills the gradients
// of the inputs; a result with null data is not wanted, and a matrix may be `added`. MXNet never calls two operators of
// one context at a time.
struct Operator {
  const char* name;
  int (*inputs)(const Attributes&);
  int (*outputs)(const Attributes&);
  // Fills in what is missing (dimension 0, or no dimensions at all) of `in` where it follows from the rest, and `out`.
  // Throws Error where shapes contradict each other. A shape that is not known yet leaves `out` empty.
  void (*shapes)(const Attributes&, std::vector<Shape>& in, std::vector<Shape>& out);
  void (*types)(const Attributes&, std::vector<Type>& in, std::vector<Type>& out);
  void (*forward)(const Attributes&, const Tensors& in, const Tensors& out);
  void (*backward)(const Attributes&, const Tensors& in, const Tensors& out);  // null: no gradient
  std::vector<int> (*written)(const Attributes&);                              // inputs that change, or null
};

// Static objects of this type make operators known:  static Register layer_norm_op({"mxsimmim_layer_norm", ...});
struct Register {
  explicit Register(const Operator& op);
};

bool known(const Shape& shape);  // no dimension is 0 or missing
// Sets `shape` if it is unknown; throws, naming both, if it is known and another.
void settle(const char* what, Shape& shape, const Shape& expected);
void all_float32(const Attributes&, std::vector<Type>& in, std::vector<Type>& out);  // for Operator::types

// Scratch memory, 64-byte aligned, that belongs to the running operator and is taken back when it ends. It is kept
// for the next one: MXNet's own temporary space is limited to 2 GiB, and malloc would return pages every time.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  template <class T> T* take(int64_t count) { return static_cast<T*>(bytes(count * int64_t(sizeof(T)))); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  void* bytes(int64_t size);
  size_t chunk_, used_;  // where its memory begins
};

}  // namespace simmim
