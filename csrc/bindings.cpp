// The only file that knows Python. Arrays arrive as addresses (tensor.data_ptr(), array.ctypes.data).
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
#ifdef RETRO_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
