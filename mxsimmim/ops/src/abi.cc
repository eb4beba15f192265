// The C functions that MXNet 1.9.1 looks up in a library of operators (lib_api.h, MX_LIBRARY_VERSION 11). Function
// pointers of MXNet's own types pass through them untouched, so they carry ours, and MXNet's header is not needed.
#include "abi.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace simmim {

namespace {

std::vector<Operator>& operators() {
  static std::vector<Operator> all;
  return all;
}

std::mutex message_lock;
std::string message;  // of the last error

// Runs `body`; 1 if it went well, as MXNet wants it. No exception may pass into MXNet, whose threads would not see it.
template <class Body> int guarded(const char* name, Body body) {
  try {
    body();
    return 1;
  } catch (const std::exception& error) {
    std::lock_guard<std::mutex> hold(message_lock);
    message = std::string(name ? name : "mxsimmim") + ": " + error.what();
    return 0;
  }
}

Attributes attributes(const char* const* keys, const char* const* values, int count) {
  std::map<std::string, std::string> all;
  for (int i = 0; i < count; ++i) all[keys[i]] = values[i];
  return Attributes(std::move(all));
}

std::vector<Shape> shapes_of(unsigned** shapes, const int* dims, int count) {
  std::vector<Shape> all(count);
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < dims[i]; ++d) all[i].push_back(int32_t(shapes[i][d]) < 0 ? 0 : shapes[i][d]);
  return all;
}

// Hands shapes over in memory that MXNet frees by _opCallFree.
void hand_over(const std::vector<Shape>& shapes, unsigned*** values, int** dims) {
  *values = static_cast<unsigned**>(std::malloc(shapes.size() * sizeof(unsigned*)));
  *dims = static_cast<int*>(std::malloc(shapes.size() * sizeof(int)));
  for (size_t i = 0; i < shapes.size(); ++i) {
    (*dims)[i] = int(shapes[i].size());
    (*values)[i] = static_cast<unsigned*>(std::malloc(shapes[i].size() * sizeof(unsigned) + 1));
    for (size_t d = 0; d < shapes[i].size(); ++d) (*values)[i][d] = unsigned(shapes[i][d]);
  }
}

Tensors tensors(void** data, const int64_t** shapes, const int* dims, const int* types, int count) {
  Tensors all(count);
  for (int i = 0; i < count; ++i)
    all[i] = {data[i], Shape(shapes[i], shapes[i] + (dims[i] < 0 ? 0 : dims[i])), Type(types[i])};
  return all;
}

}  // namespace

int64_t size_of(const Shape& shape) {
  int64_t size = 1;
  for (int64_t side : shape) size *= side;
  return size;
}

std::string to_text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

bool known(const Shape& shape) {
  for (int64_t side : shape)
    if (side <= 0) return false;
  return !shape.empty();
}

void settle(const char* what, Shape& shape, const Shape& expected) {
  bool fits = shape.empty() || shape.size() == expected.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == 0 || shape[i] == expected[i];
  require(fits, what, " has shape ", shape, " instead of ", expected);
  shape = expected;
}

void all_float32(const Attributes&, std::vector<Type>& in, std::vector<Type>& out) {
  for (Type& type : in) {
    require(type == Type::f32 || int(type) < 0, "inputs must be float32, not MXNet's type number ", int(type));
    type = Type::f32;
  }
  for (Type& type : out) type = Type::f32;
}

int64_t Attributes::integer(const char* key, int64_t otherwise) const { return int64_t(real(key, double(otherwise))); }

double Attributes::real(const char* key, double otherwise) const {
  auto found = values_.find(key);
  if (found == values_.end() || found->second == "None") return otherwise;
  if (found->second == "True") return 1;
  if (found->second == "False") return 0;
  char* end = nullptr;
  double value = std::strtod(found->second.c_str(), &end);
  require(end != found->second.c_str() && !*end, "attribute ", key, "='", found->second, "' is not a number");
  return value;
}

Register::Register(const Operator& op) { operators().push_back(op); }

// Operators of several contexts run one at a time, but on threads of their own: each thread has its own memory. It
// grows by chunks while pointers into it live, and becomes one chunk when the outermost Scratch ends.
namespace {
struct Chunk {
  char* data;
  size_t size, used;
};
struct Arena {
  std::vector<Chunk> chunks;
  int depth = 0;
  ~Arena() { release(); }
  void release() {
    for (Chunk& chunk : chunks) std::free(chunk.data);
    chunks.clear();
  }
  void add(size_t size) {
#ifdef __SANITIZE_ADDRESS__
    constexpr size_t page = 64;
#else
    constexpr size_t page = 2 << 20;  // in large pages, where the kernel has them: products miss their addresses less
#endif
    size = (size + page - 1) / page * page;
    void* data = std::aligned_alloc(page, size);
    if (!data) throw Error("out of memory: " + std::to_string(size) + " bytes of scratch space");
    madvise(data, size, MADV_HUGEPAGE);
    chunks.push_back({static_cast<char*>(data), size, 0});
  }
};
thread_local Arena arena;
}  // namespace

Scratch::Scratch() : chunk_(arena.chunks.size()), used_(chunk_ ? arena.chunks.back().used : 0) { ++arena.depth; }

Scratch::~Scratch() {
  if (--arena.depth == 0 && arena.chunks.size() > 1) {
    size_t total = 0;
    for (Chunk& chunk : arena.chunks) total += chunk.used;
    arena.release();
    try {
      arena.add(total);
    } catch (const Error&) {
      return;  // the next operator will ask again, and say so
    }
  }
  for (size_t i = chunk_; i < arena.chunks.size(); ++i) arena.chunks[i].used = 0;
  if (chunk_) arena.chunks[chunk_ - 1].used = used_;
  else if (!arena.chunks.empty()) arena.chunks[0].used = 0;
}

void* Scratch::bytes(int64_t size) {
  size_t wanted = (size_t(size) + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
  arena.add(wanted);  // one block a request, so that its bounds are known
#else
  if (arena.chunks.empty() || arena.chunks.back().used + wanted > arena.chunks.back().size) arena.add(wanted);
#endif
  Chunk& chunk = arena.chunks.back();
  void* start = chunk.data + chunk.used;
  chunk.used += wanted;
  return start;
}

}  // namespace simmim

using namespace simmim;

namespace {

// What MXNet takes for function pointers is the address of the operator.
struct Entry {
  const char* context = "cpu";
  const void* forward;
  const void* backward;
};

const Operator& operator_of(const void* handle) { return *static_cast<const Operator*>(handle); }

// fcomp_t of the backward pass: the operator's address with its lowest bit set; operators are aligned.
const void* marked(const Operator& op) { return reinterpret_cast<const char*>(&op) + 1; }
bool is_marked(const void* handle) { return reinterpret_cast<uintptr_t>(handle) & 1; }
const void* unmarked(const void* handle) { return reinterpret_cast<const char*>(handle) - (is_marked(handle) ? 1 : 0); }

std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int initialize(int version) {
  return guarded("mxsimmim", [&] {
    require(version >= 10900 && version < 20000, "built for MXNet 1.9, this is version number ", version);
  });
}

EXPORT int _opVersion() { return 11; }
EXPORT int _opRegSize() { return int(operators().size()); }
EXPORT int _partRegSize() { return 0; }
EXPORT int _passRegSize() { return 0; }

EXPORT void _opRegGet(int index, const char** name, int* subgraph, const char*** forward_context, const void*** forward,
                      int* forwards, const char*** backward_context, const void*** backward, int* backwards,
                      const char*** create_context, const void*** create, int* creates, const void** parse,
                      const void** type, const void** stype, const void** shape, const void** mutate) {
  if (entries().size() != operators().size()) entries().resize(operators().size());
  const Operator& op = operators()[size_t(index)];
  Entry& entry = entries()[size_t(index)];
  entry.forward = &op;
  entry.backward = marked(op);
  *name = op.name;
  *subgraph = 0;
  *forward_context = *backward_context = &entry.context;
  *forward = &entry.forward;
  *backward = &entry.backward;
  *forwards = 1;
  *backwards = op.backward ? 1 : 0;
  *create_context = nullptr;
  *create = nullptr;
  *creates = 0;
  *parse = *type = *shape = &op;
  *stype = nullptr;
  *mutate = op.written ? &op : nullptr;
}

EXPORT void _opCallFree(void* memory) { std::free(memory); }

EXPORT int _opCallParseAttrs(const void* handle, const char* const* keys, const char* const* values, int count,
                             int* inputs, int* outputs) {
  const Operator& op = operator_of(handle);
  return guarded(op.name, [&] {
    Attributes attrs = attributes(keys, values, count);
    *inputs = op.inputs(attrs);
    *outputs = op.outputs(attrs);
  });
}

EXPORT int _opCallInferShape(const void* handle, const char* const* keys, const char* const* values, int count,
                             unsigned** in_shapes, int* in_dims, int inputs, unsigned*** new_in_shapes,
                             int** new_in_dims, unsigned*** out_shapes, int** out_dims, int outputs) {
  const Operator& op = operator_of(handle);
  return guarded(op.name, [&] {
    std::vector<Shape> in = shapes_of(in_shapes, in_dims, inputs), out(static_cast<size_t>(outputs));
    op.shapes(attributes(keys, values, count), in, out);
    hand_over(in, new_in_shapes, new_in_dims);
    hand_over(out, out_shapes, out_dims);
  });
}

EXPORT int _opCallInferType(const void* handle, const char* const* keys, const char* const* values, int count,
                            int* in_types, int inputs, int* out_types, int outputs) {
  const Operator& op = operator_of(handle);
  return guarded(op.name, [&] {
    std::vector<Type> in(static_cast<size_t>(inputs)), out(static_cast<size_t>(outputs));
    for (int i = 0; i < inputs; ++i) in[size_t(i)] = Type(in_types[i]);
    op.types(attributes(keys, values, count), in, out);
    for (int i = 0; i < inputs; ++i) in_types[i] = int(in[size_t(i)]);
    for (int i = 0; i < outputs; ++i) out_types[i] = int(out[size_t(i)]);
  });
}

EXPORT int _opCallInferSType(const void*, const char* const*, const char* const*, int, int*, int, int*, int) {
  return 0;  // dense arrays only: no operator asks for this
}

namespace {

// Where attribute `add` has bit i, the gradient of input i is added to what is there: its parameter has grad_req='add',
// and MXNet does not say so. Operators add to matrices themselves, as they multiply; what else they compute is small.
void run_backward(const Operator& op, const Attributes& attrs, const Tensors& in, const Tensors& out) {
  int64_t added = attrs.integer("add");
  Scratch scratch;
  Tensors own = out;
  for (size_t i = 0; i < out.size(); ++i) {
    if (!(added >> i & 1) || !out[i]) continue;
    if (out[i].shape.size() == 2) own[i].added = true;
    else own[i].data = scratch.take<float>(out[i].size());
  }
  op.backward(attrs, in, own);
  for (size_t i = 0; i < out.size(); ++i) {
    if (own[i].data == out[i].data) continue;
    const float* gradient = own[i].as<const float>();
    float* sum = out[i].as<float>();
    int64_t size = out[i].size();
#pragma omp parallel for simd schedule(static)
    for (int64_t n = 0; n < size; ++n) sum[n] += gradient[n];
  }
}

}  // namespace

EXPORT int _opCallFCompute(const void* handle, const char* const* keys, const char* const* values, int count,
                           const int64_t** in_shapes, int* in_dims, void** in_data, int* in_types, size_t*,
                           const char**, int*, int inputs, const int64_t** out_shapes, int* out_dims, void** out_data,
                           int* out_types, size_t*, const char**, int*, int outputs) {
  // MXNet passes more, after these, that no operator needs.
  const Operator& op = operator_of(unmarked(handle));
  return guarded(op.name, [&] {
    Attributes attrs = attributes(keys, values, count);
    Tensors in = tensors(in_data, in_shapes, in_dims, in_types, inputs);
    Tensors out = tensors(out_data, out_shapes, out_dims, out_types, outputs);
    is_marked(handle) ? run_backward(op, attrs, in, out) : op.forward(attrs, in, out);
  });
}

EXPORT int _opCallMutateInputs(const void* handle, const char* const* keys, const char* const* values, int count,
                               int** indices, int* size) {
  const Operator& op = operator_of(handle);
  return guarded(op.name, [&] {
    static thread_local std::vector<int> written;  // ours: MXNet copies it at once and never calls _opCallFree
    written = op.written(attributes(keys, values, count));
    *size = int(written.size());
    *indices = written.data();
  });
}

EXPORT int _opCallCreateOpState(const void*, const char* const*, const char* const*, int, const char*, int, unsigned**,
                                int*, int, const int*, void**) {
  return 0;  // no operator has a state
}
EXPORT void _opCallDestroyOpState(void*) {}
EXPORT int _opCallFStatefulCompute() { return 0; }

// MXNet looks these up too, and calls them for subgraph partitioners and graph passes only: there are none.
EXPORT int _partRegGetCount(int, const char**) { return 0; }
EXPORT void _partRegGet(int, int, const char**, void*, void*, void*, const char**) {}
EXPORT int _partCallSupportedOps() { return 0; }
EXPORT int _partCallCreateSelector() { return 0; }
EXPORT void _partCallSelect(void*, int, int*) {}
EXPORT void _partCallSelectInput(void*, int, int, int*) {}
EXPORT void _partCallSelectOutput(void*, int, int, int*) {}
EXPORT void _partCallFilter(void*, int*, int, int**, int*) {}
EXPORT void _partCallReset(void*) {}
EXPORT int _partCallReviewSubgraph() { return 0; }
EXPORT void _passRegGet(int, void*, const char**) {}
EXPORT int _passCallGraphPass() { return 0; }

EXPORT int _msgSize() {
  std::lock_guard<std::mutex> hold(message_lock);
  return message.empty() ? 0 : 1;
}
EXPORT void _msgGet(int, const char** text) {
  static thread_local std::string kept;
  std::lock_guard<std::mutex> hold(message_lock);
  kept.swap(message);
  message.clear();
  *text = kept.c_str();
}
