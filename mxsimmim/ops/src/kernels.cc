#include "kernels.h"

#include <oneapi/dnnl/dnnl.h>

namespace simmim {

const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

const Kernels& kernels() {
  // As oneDNN sees it, which DNNL_MAX_CPU_ISA can limit.
  static const bool wide = (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core;
  return wide ? avx512_kernels() : avx2_kernels();
}

double dot(const float* a, const float* b, int64_t n) {
  double lanes[LANES] = {};
  kernels().dot(a, b, n, lanes);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace simmim
