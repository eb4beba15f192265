#include "kernels.inl"

namespace simmim {
const Kernels& avx2_kernels() { return table; }
}  // namespace simmim
