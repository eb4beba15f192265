// What the library tells ops/library.py about itself, before MXNet sees it.
#include <oneapi/dnnl/dnnl.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifndef MXSIMMIM_SOURCES
#define MXSIMMIM_SOURCES ""
#endif

// The hash of the sources it was built from.
EXPORT const char* mxsimmim_sources() { return MXSIMMIM_SOURCES; }

// The best instructions that this CPU, its kernel and DNNL_MAX_CPU_ISA allow; empty where they do not reach AVX2.
EXPORT const char* mxsimmim_isa() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "";
  const unsigned isa = dnnl_get_effective_cpu_isa();  // a set of bits, each level with those below it
  const auto reaches = [isa](unsigned level) { return (isa & level) == level; };
  if (reaches(dnnl_cpu_isa_avx512_core_amx)) return "avx512_core_amx";
  if (reaches(dnnl_cpu_isa_avx512_core_bf16)) return "avx512_core_bf16";
  if (reaches(dnnl_cpu_isa_avx512_core)) return "avx512_core";
  return reaches(dnnl_cpu_isa_avx2) ? "avx2" : "";
}
