// opd_ops._build_info: what is not a tensor op.
#include <pybind11/pybind11.h>

#include "common.h"

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled ops were built, and which instruction set they use.";
  m.attr("compiler") = OPD_COMPILER;
  m.attr("flags") = OPD_FLAGS;
  m.attr("built_with_torch") = OPD_TORCH;
  m.attr("cuda_targets") = OPD_CUDA_TARGETS;
  m.def("best_isa", [] { return opd::isa_name(opd::best_isa()); },
        "The best instruction set of this processor among portable, avx2 and avx512.");
  m.def("isa", [] { return opd::isa_name(opd::chosen_isa()); },
        "The instruction set in use; OPD_OPS_ISA forces a lower one.");
}
