// The only file that knows Python. Arrays arrive as addresses (tensor.data_ptr(), array.ctypes.data); whoever calls has
// checked shapes, dtypes and devices. The GIL is released in every op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

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
                     uintptr_t lengths, uintptr_t order) {
  return {at<void>(tokens),  token_bytes, row_stride, num_chunks,    chunk_size, at<uint8_t>(continuation),
          at<int64_t>(ids),  n,           pad_id,     at<void>(out), out_bytes,  at<int32_t>(lengths),
          at<int64_t>(order)};
}

retro::Attention attention(uintptr_t query, std::array<int64_t, 3> query_strides, uintptr_t key,
                           std::array<int64_t, 3> key_strides, uintptr_t value, std::array<int64_t, 3> value_strides,
                           uintptr_t table, int64_t columns, uintptr_t content_bias, uintptr_t position_bias,
                           uintptr_t rel_bias, uintptr_t lengths, uintptr_t out, std::array<int64_t, 4> query_shape,
                           std::array<int64_t, 4> key_shape, int64_t block, int64_t shift, int64_t repeat,
                           float scale, bool bf16) {
  const auto [seqs, rows, heads, dim] = query_shape;
  const auto [groups, neighbours, keys, kv_heads] = key_shape;
  return {at<void>(query), query_strides[0], query_strides[1], query_strides[2],
          at<void>(key), key_strides[0], key_strides[1], key_strides[2],
          at<void>(value), value_strides[0], value_strides[1], value_strides[2],
          at<float>(table), columns, at<float>(content_bias), at<float>(position_bias), at<float>(rel_bias),
          at<int64_t>(lengths), at<void>(out),
          seqs, rows, heads, kv_heads, dim, groups, neighbours, keys, block, shift, repeat, scale, bf16};
}

retro::Gradients gradients(uintptr_t grad_out, uintptr_t out, uintptr_t table_rows, uintptr_t grad_query,
                           uintptr_t grad_key, uintptr_t grad_value, uintptr_t grad_table, uintptr_t grad_bias,
                           uintptr_t grad_content, uintptr_t grad_position, int64_t parts, int64_t wide) {
  return {at<void>(grad_out), at<void>(out), at<float>(table_rows), at<void>(grad_query), at<void>(grad_key),
          at<void>(grad_value), at<float>(grad_table), at<float>(grad_bias), at<float>(grad_content),
          at<float>(grad_position), parts, wide};
}

#ifdef RETRO_WITH_CUDA
retro::AbsorbedDecode absorbed_decode(float scale_log2, int batch, int tokens, int heads, int width, int neighbours,
                                      int keys, int columns, int rel_stride, int splits, int row_bytes, int length_bytes,
                                      int bias_bytes, bool half) {
  retro::AbsorbedDecode d{};
  d.scale_log2 = scale_log2;
  d.batch = batch, d.tokens = tokens, d.heads = heads, d.width = width;
  d.neighbours = neighbours, d.keys = keys, d.columns = columns, d.rel_stride = rel_stride, d.splits = splits;
  d.row_bytes = row_bytes, d.length_bytes = length_bytes, d.bias_bytes = bias_bytes, d.half = half;
  return d;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<retro::Gather>(m, "Gather")
      .def(py::init(&gather), py::kw_only(), "tokens"_a, "token_bytes"_a, "row_stride"_a, "num_chunks"_a,
           "chunk_size"_a, "continuation"_a, "ids"_a, "n"_a, "pad_id"_a, "out"_a, "out_bytes"_a, "lengths"_a,
           "order"_a = 0);
  m.def(
      "gather_neighbours_cpu",
      [](const retro::Gather& g, int threads, int advise) {
        py::gil_scoped_release nogil;
        retro::gather_neighbours_cpu(g, threads, static_cast<retro::Advise>(advise));
      },
      "gather"_a, "threads"_a, "advise"_a);
  py::class_<retro::Attention>(m, "Attention")
      .def(py::init(&attention), py::kw_only(), "query"_a, "query_strides"_a, "key"_a, "key_strides"_a, "value"_a,
           "value_strides"_a, "table"_a, "columns"_a, "content_bias"_a, "position_bias"_a, "rel_bias"_a, "lengths"_a,
           "out"_a, "query_shape"_a, "key_shape"_a, "block"_a, "shift"_a, "repeat"_a, "scale"_a, "bf16"_a = false);
  m.attr("attend_cpu_takes_bf16") = true;
  m.def("attend_cpu_works", &retro::attend_cpu_works);
  m.def("limit_threads", &retro::limit_threads, "threads"_a);
  m.def(
      "attend_cpu",
      [](const retro::Attention& a, int threads) {
        py::gil_scoped_release nogil;
        retro::attend_cpu(a, threads);
      },
      "attention"_a, "threads"_a);
  py::class_<retro::Gradients>(m, "Gradients")
      .def(py::init(&gradients), py::kw_only(), "grad_out"_a, "out"_a, "table_rows"_a, "grad_query"_a, "grad_key"_a,
           "grad_value"_a, "grad_table"_a, "grad_bias"_a, "grad_content"_a, "grad_position"_a, "parts"_a, "wide"_a);
  m.def(
      "attend_backward_cpu",
      [](const retro::Attention& a, const retro::Gradients& g, int threads) {
        py::gil_scoped_release nogil;
        retro::attend_backward_cpu(a, g, threads);
      },
      "attention"_a, "gradients"_a, "threads"_a);
#ifdef RETRO_WITH_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_archs") = RETRO_CUDA_ARCHS;
  m.def(
      "gather_neighbours_cuda",
      [](const retro::Gather& g, bool host_tokens, bool host_continuation, uintptr_t stream) {
        py::gil_scoped_release nogil;
        retro::gather_neighbours_cuda(g, host_tokens, host_continuation, stream);
      },
      "gather"_a, "host_tokens"_a, "host_continuation"_a, "stream"_a);
  py::class_<retro::AbsorbedDecode>(m, "AbsorbedDecode")
      .def(py::init(&absorbed_decode), py::kw_only(), "scale_log2"_a, "batch"_a, "tokens"_a, "heads"_a, "width"_a,
           "neighbours"_a, "keys"_a, "columns"_a, "rel_stride"_a, "splits"_a, "row_bytes"_a, "length_bytes"_a, "bias_bytes"_a,
           "half"_a)
      .def_readwrite("cluster", &retro::AbsorbedDecode::cluster);
  m.attr("absorbed_decode_keys") = retro::kAbsorbedDecodeKeys;
  m.def("absorbed_decode_rows", &retro::absorbed_decode_rows, "of_sequence"_a);
  m.def("absorbed_decode_clusters", &retro::absorbed_decode_clusters, "decode"_a);
  m.def("absorbed_decode_takes", &retro::absorbed_decode_takes, "width"_a, "neighbours"_a, "keys"_a, "of_sequence"_a);
  m.def(
      "absorbed_decode_cuda",
      [](retro::AbsorbedDecode d, std::array<uintptr_t, 8> to, uintptr_t stream) {
        py::gil_scoped_release nogil;
        d.query = at<void>(to[0]), d.states = at<void>(to[1]), d.rows = at<void>(to[2]), d.rel = at<void>(to[3]);
        d.rel_bias = at<void>(to[4]), d.lengths = at<void>(to[5]), d.out = at<void>(to[6]), d.lse = at<float>(to[7]);
        retro::absorbed_decode_cuda(d, stream);
      },
      "decode"_a, "addresses"_a, "stream"_a);
#else
  m.attr("cuda") = false;
#endif
}
