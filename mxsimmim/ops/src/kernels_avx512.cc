#include "kernels.inl"

namespace simmim {
const Kernels& avx512_kernels() { return table; }
}  // namespace simmim
