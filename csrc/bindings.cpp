// The only file that knows Python. Arrays arrive as addresses (tensor.data_ptr(), array.ctypes.data); whoever calls has
// checked shapes, dtypes and devices. The GIL is released in every op.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

retro::Gather gather(uintptr_t tokens, int token_bytes, int64_t row_stride, int64_t num_chunks, int64_t chunk_size,
                     uintptr_t continuation, uintptr_t ids, int64_t n, int64_t pad_id, uintptr_t out, int out_bytes,
                     uintptr_t lengths) {
  return {at<void>(tokens),  token_bytes, row_stride, num_chunks,    chunk_size, at<uint8_t>(continuation),
          at<int64_t>(ids),  n,           pad_id,     at<void>(out), out_bytes,  at<int32_t>(lengths)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<retro::Gather>(m, "Gather")
      .def(py::init(&gather), py::kw_only(), "tokens"_a, "token_bytes"_a, "row_stride"_a, "num_chunks"_a,
           "chunk_size"_a, "continuation"_a, "ids"_a, "n"_a, "pad_id"_a, "out"_a, "out_bytes"_a, "lengths"_a);
  m.def(
      "gather_neighbours_cpu",
      [](const retro::Gather& g, int threads, int advise) {
        py::gil_scoped_release nogil;
        retro::gather_neighbours_cpu(g, threads, static_cast<retro::Advise>(advise));
      },
      "gather"_a, "threads"_a, "advise"_a);
#ifdef RETRO_WITH_CUDA
  m.attr("cuda") = true;
  m.def(
      "gather_neighbours_cuda",
      [](const retro::Gather& g, bool host_tokens, bool host_continuation, uintptr_t stream) {
        py::gil_scoped_release nogil;
        retro::gather_neighbours_cuda(g, host_tokens, host_continuation, stream);
      },
      "gather"_a, "host_tokens"_a, "host_continuation"_a, "stream"_a);
#else
  m.attr("cuda") = false;
#endif
}
