#include "product.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>

namespace simmim {

namespace {

using dnnl::memory;
using Dims = memory::dims;

dnnl::engine& cpu() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& stream() {
  static thread_local dnnl::stream own(cpu());
  return own;
}

memory::data_type number(Type type) { return type == Type::f32 ? memory::data_type::f32 : memory::data_type::bf16; }

dnnl::primitive_attr attributes(bool add = false) {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (add) {
    dnnl::post_ops after;
    after.append_sum();
    attr.set_post_ops(after);
  }
  return attr;
}

memory::desc plain(int64_t rows, int64_t cols, Type type, bool transposed) {
  return {{rows, cols}, number(type), transposed ? Dims{1, rows} : Dims{cols, 1}};
}

// A product's primitive, made once for its shapes, and the reorder of b where it is brought into another layout.
struct Plan {
  dnnl::matmul::primitive_desc description;
  dnnl::matmul primitive;
  memory::desc a, b, c, bias;  // b as it is given
  bool pack = false;
  dnnl::reorder reorder;
};

using Key = std::array<int64_t, 11>;

template <class Made> class Cache {
 public:
  // Made objects stay where they are until the cache is full, which thousands of different shapes would take.
  template <class Make> std::shared_ptr<const Made> get(const Key& key, Make make) {
    std::lock_guard<std::mutex> hold(lock_);
    auto found = made_.find(key);
    if (found != made_.end()) return found->second;
    if (made_.size() > 1000) made_.clear();
    return made_[key] = std::make_shared<const Made>(make());
  }

 private:
  std::mutex lock_;
  std::map<Key, std::shared_ptr<const Made>> made_;
};

// A weight read by columns, as forward, is brought into oneDNN's layout on the way anyway, a block at a time. Of few
// rows that is a tenth faster (394 of ViT-B, which are two images); of 788 both are the same. Read by rows, as for an
// input's gradient, it is not faster, and half as fast where rows are whole pages.
bool should_pack(const Matrix& a, const Matrix& b) { return a.rows >= 600 || !b.transposed || a.type != b.type; }

// The same sums in the same order, packed or not.
Plan make_plan(Type c_type, const Matrix& a, const Matrix& b, bool bias, bool add, bool pack) {
  Plan plan;
  plan.a = plain(a.rows, a.cols, a.type, a.transposed);
  plan.b = plain(b.rows, b.cols, b.type, b.transposed);
  plan.c = plain(a.rows, b.cols, c_type, false);
  plan.bias = memory::desc({1, b.cols}, memory::data_type::f32, memory::format_tag::ab);
  memory::desc used = pack ? memory::desc({b.rows, b.cols}, number(a.type), memory::format_tag::any) : plan.b;
  plan.description = bias ? dnnl::matmul::primitive_desc(cpu(), plan.a, used, plan.bias, plan.c, attributes(add))
                          : dnnl::matmul::primitive_desc(cpu(), plan.a, used, plan.c, attributes(add));
  plan.primitive = dnnl::matmul(plan.description);
  plan.pack = plan.description.weights_desc() != plan.b;
  if (plan.pack)
    plan.reorder = dnnl::reorder(
        dnnl::reorder::primitive_desc(cpu(), plan.b, cpu(), plan.description.weights_desc(), attributes()));
  return plan;
}

}  // namespace

void multiply(void* c, Type c_type, Matrix a, Matrix b, const float* bias, bool add) {
  static Cache<Plan> cache;
  if (!a.rows || !b.cols) return;
  Key key{a.rows,          a.cols,          b.cols, int64_t(a.type),      a.transposed, int64_t(b.type), b.transposed,
          int64_t(c_type), bias != nullptr, add,    omp_get_max_threads()};
  auto plan = cache.get(key, [&] { return make_plan(c_type, a, b, bias != nullptr, add, should_pack(a, b)); });
  Scratch scratch;
  auto at = [&](const memory::desc& desc, const void* data) { return memory(desc, cpu(), const_cast<void*>(data)); };
  memory weights = at(plan->b, b.data);
  if (plan->pack) {
    memory packed =
        at(plan->description.weights_desc(), scratch.take<char>(int64_t(plan->description.weights_desc().get_size())));
    dnnl::reorder(plan->reorder).execute(stream(), weights, packed);
    weights = packed;
  }
  memory::desc pad = plan->description.scratchpad_desc();
  memory own = at(pad, scratch.take<char>(int64_t(pad.get_size())));
  std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, at(plan->a, a.data)},
                                            {DNNL_ARG_WEIGHTS, weights},
                                            {DNNL_ARG_DST, at(plan->c, c)},
                                            {DNNL_ARG_SCRATCHPAD, own}};
  if (bias) arguments.emplace(DNNL_ARG_BIAS, at(plan->bias, bias));
  plan->primitive.execute(stream(), arguments);
  stream().wait();
}

struct SmallProduct::Plan {
  dnnl::matmul::primitive_desc description;
  dnnl::matmul primitive;
};

SmallProduct::SmallProduct(int64_t count, int64_t rows, int64_t depth, int64_t cols, Type type, bool a_transposed,
                           bool b_transposed, Type c_type) {
  static Cache<Plan> cache;
  Key key{count, rows, depth, cols, int64_t(type), a_transposed, b_transposed, int64_t(c_type)};
  auto strides = [](int64_t rows, int64_t cols, bool transposed) {
    return transposed ? Dims{rows * cols, 1, rows} : Dims{rows * cols, cols, 1};
  };
  plan_ = cache.get(key, [&] {
    // A primitive divides its work among the threads it is made for.
    struct Alone {
      int before = omp_get_max_threads();
      Alone() { omp_set_num_threads(1); }
      ~Alone() { omp_set_num_threads(before); }
    } alone;
    Plan plan;
    plan.description = dnnl::matmul::primitive_desc(
        cpu(), memory::desc({count, rows, depth}, number(type), strides(rows, depth, a_transposed)),
        memory::desc({count, depth, cols}, number(type), strides(depth, cols, b_transposed)),
        memory::desc({count, rows, cols}, number(c_type), strides(rows, cols, false)), attributes());
    plan.primitive = dnnl::matmul(plan.description);
    return plan;
  });
}

int64_t SmallProduct::scratch() const { return int64_t(plan_->description.scratchpad_desc().get_size()); }

struct SmallProduct::Bound::Parts {
  dnnl::matmul primitive;
  std::unordered_map<int, memory> arguments;
};

SmallProduct::Bound::Bound(const SmallProduct& product, const void* a, const void* b, void* c, void* scratch) {
  const auto& is = product.plan_->description;
  parts_ = new Parts{product.plan_->primitive,
                     {{DNNL_ARG_SRC, memory(is.src_desc(), cpu(), const_cast<void*>(a))},
                      {DNNL_ARG_WEIGHTS, memory(is.weights_desc(), cpu(), const_cast<void*>(b))},
                      {DNNL_ARG_DST, memory(is.dst_desc(), cpu(), c)},
                      {DNNL_ARG_SCRATCHPAD, memory(is.scratchpad_desc(), cpu(), scratch)}}};
}

SmallProduct::Bound::~Bound() { delete parts_; }

void SmallProduct::Bound::run() const { parts_->primitive.execute(stream(), parts_->arguments); }

}  // namespace simmim

// For benchmarks: the median GFLOP/s of (m, k) times (k, n), whose right side is packed once; all threads.
extern "C" __attribute__((visibility("default"))) double mxsimmim_product_rate(int64_t m, int64_t k, int64_t n,
                                                                               int bf16, int repeats) {
  using namespace simmim;
  try {
    Type type = bf16 ? Type::f16 : Type::f32;
    Plan plan = make_plan(type, {nullptr, type, m, k}, {nullptr, type, k, n}, false, false, true);
    memory a(plan.a, cpu()), b(plan.description.weights_desc(), cpu()), c(plan.c, cpu());
    memory pad(plan.description.scratchpad_desc(), cpu());
    // Numbers of all sizes and signs: a CPU is faster with zeros, which need less power.
    auto fill = [&](const memory& to) {
      uint32_t state = 1;
      int64_t size = int64_t(to.get_desc().get_size()) / (bf16 ? 2 : 4);
      for (int64_t i = 0; i < size; ++i) {
        state = state * 1664525u + 1013904223u;
        uint32_t bits = 0x3f000000u | (state >> 9 & 0x7fffffu) | (state & 0x80000000u);  // 0.5 to 1, either sign
        if (bf16) static_cast<uint16_t*>(to.get_data_handle())[i] = uint16_t(bits >> 16);
        else static_cast<uint32_t*>(to.get_data_handle())[i] = bits;
      }
    };
    fill(a);
    fill(b);
    std::vector<double> rates;
    for (int i = 0; i <= repeats; ++i) {
      auto began = std::chrono::steady_clock::now();
      plan.primitive.execute(stream(),
                             {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}, {DNNL_ARG_SCRATCHPAD, pad}});
      stream().wait();
      std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
      if (i) rates.push_back(2e-9 * double(m) * double(k) * double(n) / seconds.count());
    }
    std::sort(rates.begin(), rates.end());
    return rates[rates.size() / 2];
  } catch (const std::exception&) {
    return 0;
  }
}
