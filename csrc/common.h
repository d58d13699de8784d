// Shared by the op library and the build-info module: version and the instruction set in use.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace opd {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

// The best instruction set that this processor has and this build contains.
inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// OPD_OPS_ISA=portable|avx2|avx512 forces a lower one. Throws for a name that is not one of them
// and for an instruction set that this processor lacks.
inline Isa chosen_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("OPD_OPS_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (isa > best)
      throw std::runtime_error(std::string("OPD_OPS_ISA=") + forced + ": this processor has " +
                               isa_name(best) + " at most");
    return isa;
  }
  throw std::runtime_error(std::string("OPD_OPS_ISA: expected portable, avx2 or avx512, got ") +
                           forced);
}

}  // namespace opd
