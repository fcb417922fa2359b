// deftcore._C: addresses, sizes and a stream in; exceptions out. Shapes and dtypes are checked in deftcore.ops.
// Submodules `cpu` and `cuda` have the same functions, made from the list of ops; `cuda` exists only in a build with
// CUDA, and lacks what the list says.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "record.h"

namespace deftcore::cpu {
const char* isa_name();
std::string isa_available();
}  // namespace deftcore::cpu

namespace {

namespace py = pybind11;
using namespace deftcore;
using bindings::Record;

// `Linear4bit` for Linear4bitArgs.
template <class Args>
void add_record(py::module_ m, const std::string& args) {
  Record<Args>::add(m, args.substr(0, args.find("Args")));
}

template <class Args>
void bind_op(py::module_ m, const char* name, void (*run)(const Args&, Stream)) {
  m.def(
      name, [run](const Args& args, uintptr_t stream) { run(args, reinterpret_cast<Stream>(stream)); },
      py::call_guard<py::gil_scoped_release>());
}

// The one question that is no op.
void bind_tokens(py::module_ m, int64_t (*tokens)(const Quant4&, DType)) {
  m.def("linear_4bit_tokens", [tokens](const Quant4& w, int dtype) { return tokens(w, static_cast<DType>(dtype)); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = DEFTCORE_VERSION;
  m.attr("max_sparse_tokens") = kMaxSparseTokens;
  m.attr("nested_block") = kNestedBlock;
  m.attr("scan_chunk") = kScanChunk;
  m.attr("max_conv_width") = kMaxConvWidth;
  m.def("isa_name", &cpu::isa_name);
  m.def("isa_available", &cpu::isa_available);
  m.def("code_book", [](int type) {
    const float* book = code_book(static_cast<QuantType>(type));
    return std::vector<float>(book, book + 16);
  });

  m.attr("galore_matrix") = GaloreMatrix::kFields;
  m.attr("decoder_matrix") = DecoderMatrix::kFields;

  add_record<Quant4>(m, "Quant4");
  add_record<DeltaBank>(m, "DeltaBank");
#define DEFTCORE_RECORD(op, Args, room, devices, where) add_record<Args>(m, #Args);
  DEFTCORE_OPS(DEFTCORE_RECORD, )
#define DEFTCORE_BIND(op, Args, room, devices, device)                                                      \
  DEFTCORE_IF_##devices##_##device(bind_op<Args>(device, #op, &::deftcore::device::op); DEFTCORE_IF_##room( \
                                       device.def(#op "_workspace", &::deftcore::device::op##_workspace);))
  {
    py::module_ cpu = m.def_submodule("cpu");
    DEFTCORE_OPS(DEFTCORE_BIND, cpu)
    bind_tokens(cpu, &::deftcore::cpu::linear_4bit_tokens);
  }
#if defined(DEFTCORE_EMULATED)
  m.attr("emulated") = true;  // `cuda` takes CPU addresses
#endif
#if defined(DEFTCORE_WITH_CUDA)
  {
    py::module_ cuda = m.def_submodule("cuda");
    DEFTCORE_OPS(DEFTCORE_BIND, cuda)
    bind_tokens(cuda, &::deftcore::cuda::linear_4bit_tokens);
  }
#endif
}
