// lumina_rt._C: the only file that includes pybind11.
#include <pybind11/pybind11.h>

#include "cpu.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ ops for the CPU; not linked to torch.";
    m.def("isa", &lumina::isa, "Name the widest instruction set found: 'avx512', 'avx2' or 'portable'.");
}
