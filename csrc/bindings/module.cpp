// deftcore._C: addresses, sizes and a stream in; exceptions out. Shapes and dtypes are checked in deftcore.ops.
// Submodules `cpu` and `cuda` have the same functions; `cuda` exists only in a build with CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "deftcore/density.h"
#include "deftcore/partial_linear.h"
#include "deftcore/quant4.h"
#include "deftcore/sparse_mlp.h"
#include "deftcore/ssm.h"

namespace deftcore::cpu {
const char* isa_name();
std::string isa_available();
}  // namespace deftcore::cpu

namespace {

namespace py = pybind11;
using namespace deftcore;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Address and strides over batch, time and channel; over batch, head and channel.
using Strides = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

ScanTensor strided(const Strides& x) {
  return {pointer<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

HeadTensor by_head(const Strides& x) {
  return {pointer<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// The back end's functions, as one type, so that both devices are bound by the same text.
struct Backend {
  void (*act_density)(const ActDensityArgs&, Stream);
  void (*act_density_backward)(const ActDensityBackwardArgs&, Stream);
  void (*density)(const DensityArgs&, Stream);
  size_t (*sparse_down_workspace)(const SparseDownArgs&);
  void (*sparse_down)(const SparseDownArgs&, Stream);
  size_t (*sparse_mlp_workspace)(const SparseMlpArgs&);
  void (*sparse_mlp)(const SparseMlpArgs&, Stream);
  size_t (*sparse_mlp_4bit_workspace)(const SparseMlp4bitArgs&);
  void (*sparse_mlp_4bit)(const SparseMlp4bitArgs&, Stream);
  void (*quantize_4bit)(const Quantize4bitArgs&, Stream);
  void (*dequantize_4bit)(const Dequantize4bitArgs&, Stream);
  size_t (*linear_4bit_workspace)(const Linear4bitArgs&);
  int64_t (*linear_4bit_tokens)(const Quant4&, DType, bool);
  void (*linear_4bit)(const Linear4bitArgs&, Stream);
  void (*linear_4bit_backward)(const Linear4bitArgs&, Stream);
  void (*gated_act)(const GatedActArgs&, Stream);
  void (*gated_act_backward)(const GatedActBackwardArgs&, Stream);
  size_t (*grouped_delta_workspace)(const GroupedDeltaArgs&);
  void (*grouped_delta)(const GroupedDeltaArgs&, Stream);
  void (*selective_scan)(const SelectiveScanArgs&, Stream);
  size_t (*selective_scan_workspace)(const SelectiveScanArgs&);
  void (*selective_scan_backward)(const SelectiveScanBackwardArgs&, Stream);
  void (*selective_state_update)(const StateUpdateArgs&, Stream);
  void (*causal_conv1d)(const CausalConv1dArgs&, Stream);
  void (*causal_conv1d_backward)(const CausalConv1dBackwardArgs&, Stream);
  void (*causal_conv1d_update)(const CausalConv1dUpdateArgs&, Stream);
  void (*ssd)(const SsdArgs&, Stream);
  size_t (*ssd_workspace)(const SsdArgs&);
  void (*ssd_backward)(const SsdBackwardArgs&, Stream);
};

void bind(py::module_ m, Backend backend) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def(
      "act_density",
      [backend](uintptr_t z, uintptr_t mask, uintptr_t a, uintptr_t sum, uintptr_t count, int64_t rows, int64_t width,
                int dtype, int activation, int surrogate, float param, float tau, uintptr_t stream) {
        backend.act_density({pointer<const void>(z), pointer<const uint8_t>(mask), pointer<void>(a),
                             pointer<float>(sum), pointer<int64_t>(count), rows, width, static_cast<DType>(dtype),
                             static_cast<Activation>(activation), static_cast<Surrogate>(surrogate), param, tau},
                            pointer<void>(stream));
      },
      release);
  m.def(
      "act_density_backward",
      [backend](uintptr_t z, uintptr_t grad_a, uintptr_t grad_sum, uintptr_t mask, uintptr_t grad_z, int64_t rows,
                int64_t width, int dtype, int activation, int surrogate, float param, uintptr_t stream) {
        backend.act_density_backward(
            {pointer<const void>(z), pointer<const void>(grad_a), pointer<const float>(grad_sum),
             pointer<const uint8_t>(mask), pointer<void>(grad_z), rows, width, static_cast<DType>(dtype),
             static_cast<Activation>(activation), static_cast<Surrogate>(surrogate), param},
            pointer<void>(stream));
      },
      release);
  m.def(
      "density",
      [backend](uintptr_t a, uintptr_t mask, uintptr_t count, int64_t rows, int64_t width, int dtype, float tau,
                uintptr_t stream) {
        backend.density({pointer<const void>(a), pointer<const uint8_t>(mask), pointer<int64_t>(count), rows, width,
                         static_cast<DType>(dtype), tau},
                        pointer<void>(stream));
      },
      release);

  m.def("sparse_down_workspace", [backend](int64_t tokens, int64_t neurons, int64_t width) {
    SparseDownArgs args{};
    args.tokens = tokens;
    args.neurons = neurons;
    args.width = width;
    return backend.sparse_down_workspace(args);
  });
  m.def(
      "sparse_down",
      [backend](uintptr_t a, uintptr_t w_down_t, uintptr_t bias, uintptr_t y, uintptr_t workspace, uintptr_t rows_read,
                int64_t tokens, int64_t neurons, int64_t width, int64_t w_stride, int64_t capacity, int dtype,
                float tau, uintptr_t stream) {
        backend.sparse_down({pointer<const void>(a), pointer<const void>(w_down_t), pointer<const void>(bias),
                             pointer<void>(y), pointer<void>(workspace), pointer<int64_t>(rows_read), tokens, neurons,
                             width, w_stride, capacity, static_cast<DType>(dtype), tau},
                            pointer<void>(stream));
      },
      release);

  m.def("sparse_mlp_workspace", [backend](int64_t tokens, int64_t neurons, int64_t width) {
    SparseMlpArgs args{};
    args.tokens = tokens;
    args.neurons = neurons;
    args.width = width;
    return backend.sparse_mlp_workspace(args);
  });
  m.def(
      "sparse_mlp",
      [backend](uintptr_t x, uintptr_t z, uintptr_t w_gate, uintptr_t w_up, uintptr_t w_down_t, uintptr_t b_up,
                uintptr_t b_down, uintptr_t y, uintptr_t workspace, uintptr_t rows_read, int64_t tokens,
                int64_t neurons, int64_t width, int64_t gate_stride, int64_t up_stride, int64_t down_stride,
                int64_t capacity, int dtype, int activation, float tau, uintptr_t stream) {
        backend.sparse_mlp({pointer<const void>(x),
                            pointer<const void>(z),
                            pointer<const void>(w_gate),
                            pointer<const void>(w_up),
                            pointer<const void>(w_down_t),
                            pointer<const void>(b_up),
                            pointer<const void>(b_down),
                            pointer<void>(y),
                            pointer<void>(workspace),
                            pointer<int64_t>(rows_read),
                            tokens,
                            neurons,
                            width,
                            gate_stride,
                            up_stride,
                            down_stride,
                            capacity,
                            static_cast<DType>(dtype),
                            static_cast<Activation>(activation),
                            tau},
                           pointer<void>(stream));
      },
      release);

  m.def("sparse_mlp_4bit_workspace", [backend](int64_t tokens, int64_t neurons, int64_t width, int64_t down_rank) {
    SparseMlp4bitArgs args{};
    args.tokens = tokens;
    args.neurons = neurons;
    args.width = width;
    args.down_rank = down_rank;
    return backend.sparse_mlp_4bit_workspace(args);
  });
  m.def(
      "sparse_mlp_4bit",
      [backend](uintptr_t x, uintptr_t z, const Quant4* w_up, const Quant4& w_down_t, uintptr_t up_low,
                uintptr_t up_lora, uintptr_t down_lora, uintptr_t down_low, uintptr_t b_down, uintptr_t y,
                uintptr_t workspace, uintptr_t rows_read, int64_t tokens, int64_t up_rank, int64_t down_rank,
                int64_t capacity, int dtype, int activation, float tau, uintptr_t stream) {
        backend.sparse_mlp_4bit({pointer<const void>(x),
                                 pointer<const void>(z),
                                 w_up == nullptr ? Quant4{} : *w_up,
                                 w_down_t,
                                 pointer<const void>(up_low),
                                 pointer<const void>(up_lora),
                                 pointer<const void>(down_lora),
                                 pointer<void>(down_low),
                                 pointer<const void>(b_down),
                                 pointer<void>(y),
                                 pointer<void>(workspace),
                                 pointer<int64_t>(rows_read),
                                 tokens,
                                 w_down_t.rows,
                                 w_down_t.cols,
                                 up_rank,
                                 down_rank,
                                 capacity,
                                 static_cast<DType>(dtype),
                                 static_cast<Activation>(activation < 0 ? 0 : activation),
                                 activation < 0,
                                 tau},
                                pointer<void>(stream));
      },
      release);

  m.def(
      "quantize_4bit",
      [backend](uintptr_t w, uintptr_t packed, uintptr_t absmax, int64_t count, int64_t block_size, int dtype, int type,
                uintptr_t stream) {
        backend.quantize_4bit({pointer<const void>(w), pointer<uint8_t>(packed), pointer<float>(absmax), count,
                               block_size, static_cast<DType>(dtype), static_cast<QuantType>(type)},
                              pointer<void>(stream));
      },
      release);
  m.def(
      "dequantize_4bit",
      [backend](const Quant4& w, uintptr_t out, int dtype, uintptr_t stream) {
        backend.dequantize_4bit({w, pointer<void>(out), static_cast<DType>(dtype)}, pointer<void>(stream));
      },
      release);
  m.def("linear_4bit_workspace", [backend](const Quant4& w, int64_t tokens, int64_t rank, int dtype) {
    Linear4bitArgs args{};
    args.w = w;
    args.tokens = tokens;
    args.rank = rank;
    args.dtype = static_cast<DType>(dtype);
    return backend.linear_4bit_workspace(args);
  });
  const auto linear = [&](const char* name, void (*run)(const Linear4bitArgs&, Stream)) {
    m.def(
        name,
        [run](const Quant4& w, uintptr_t x, uintptr_t bias, uintptr_t low, uintptr_t lora, uintptr_t y,
              uintptr_t workspace, int64_t tokens, int64_t rank, int dtype, uintptr_t stream) {
          run({w, pointer<const void>(x), pointer<const void>(bias), pointer<const void>(low),
               pointer<const void>(lora), pointer<void>(y), pointer<void>(workspace), tokens, rank,
               static_cast<DType>(dtype)},
              pointer<void>(stream));
        },
        release);
  };
  linear("linear_4bit", backend.linear_4bit);
  if (backend.linear_4bit_backward != nullptr) linear("linear_4bit_backward", backend.linear_4bit_backward);
  m.def("linear_4bit_tokens", [backend](const Quant4& w, int dtype, bool backward) {
    return backend.linear_4bit_tokens(w, static_cast<DType>(dtype), backward);
  });

  m.def(
      "gated_act",
      [backend](uintptr_t gate, uintptr_t up, uintptr_t a, int64_t rows, int64_t width, int64_t gate_stride,
                int64_t up_stride, int dtype, int activation, uintptr_t stream) {
        backend.gated_act({pointer<const void>(gate), pointer<const void>(up), pointer<void>(a), rows, width,
                           gate_stride, up_stride, static_cast<DType>(dtype), static_cast<Activation>(activation)},
                          pointer<void>(stream));
      },
      release);
  m.def(
      "gated_act_backward",
      [backend](uintptr_t gate, uintptr_t up, uintptr_t grad, uintptr_t grad_gate, uintptr_t grad_up, int64_t rows,
                int64_t width, int64_t gate_stride, int64_t up_stride, int dtype, int activation, uintptr_t stream) {
        backend.gated_act_backward({pointer<const void>(gate), pointer<const void>(up), pointer<const void>(grad),
                                    pointer<void>(grad_gate), pointer<void>(grad_up), rows, width, gate_stride,
                                    up_stride, static_cast<DType>(dtype), static_cast<Activation>(activation)},
                                   pointer<void>(stream));
      },
      release);
  m.def("grouped_delta_workspace", [backend](int64_t tokens, int64_t most) {
    GroupedDeltaArgs args{};
    args.tokens = tokens;
    args.most = most;
    return backend.grouped_delta_workspace(args);
  });
  m.def(
      "grouped_delta",
      [backend](const DeltaBank& bank, uintptr_t x, uintptr_t adapter, uintptr_t y, uintptr_t workspace, int64_t tokens,
                int64_t most, int dtype, uintptr_t stream) {
        backend.grouped_delta({bank, pointer<const void>(x), pointer<const int64_t>(adapter), pointer<void>(y),
                               pointer<void>(workspace), tokens, most, static_cast<DType>(dtype)},
                              pointer<void>(stream));
      },
      release);

  m.def(
      "selective_scan",
      [backend](const SelectiveScanArgs& args, uintptr_t stream) {
        backend.selective_scan(args, pointer<void>(stream));
      },
      release);
  m.def("selective_scan_workspace", backend.selective_scan_workspace);
  m.def(
      "selective_scan_backward",
      [backend](const SelectiveScanArgs& forward, const Strides& grad_u, const Strides& grad_delta,
                const Strides& grad_z, const Strides& out_again, uintptr_t grad_a, uintptr_t grad_b, uintptr_t grad_c,
                uintptr_t grad_d, uintptr_t grad_delta_bias, uintptr_t grad_first, uintptr_t workspace,
                uintptr_t stream) {
        backend.selective_scan_backward(
            {forward, strided(grad_u), strided(grad_delta), strided(grad_z), strided(out_again), pointer<float>(grad_a),
             pointer<float>(grad_b), pointer<float>(grad_c), pointer<float>(grad_d), pointer<float>(grad_delta_bias),
             pointer<float>(grad_first), pointer<void>(workspace)},
            pointer<void>(stream));
      },
      release);
  m.def("ssd", [backend](const SsdArgs& args, uintptr_t stream) { backend.ssd(args, pointer<void>(stream)); }, release);
  m.def("ssd_workspace", backend.ssd_workspace);
  m.def(
      "ssd_backward",
      [backend](const SsdArgs& forward, const Strides& grad_x, uintptr_t grad_step, uintptr_t grad_log_decay,
                uintptr_t grad_b, uintptr_t grad_c, uintptr_t grad_d, uintptr_t grad_first, uintptr_t workspace,
                uintptr_t stream) {
        backend.ssd_backward({forward, strided(grad_x), pointer<float>(grad_step), pointer<float>(grad_log_decay),
                              pointer<float>(grad_b), pointer<float>(grad_c), pointer<float>(grad_d),
                              pointer<float>(grad_first), pointer<void>(workspace)},
                             pointer<void>(stream));
      },
      release);
  m.def(
      "causal_conv1d",
      [backend](const CausalConv1dArgs& args, uintptr_t stream) { backend.causal_conv1d(args, pointer<void>(stream)); },
      release);
  m.def(
      "causal_conv1d_backward",
      [backend](const CausalConv1dArgs& forward, const Strides& grad_x, const Strides& grad_first,
                uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t stream) {
        backend.causal_conv1d_backward(
            {forward, strided(grad_x), strided(grad_first), pointer<float>(grad_weight), pointer<float>(grad_bias)},
            pointer<void>(stream));
      },
      release);
  m.def(
      "causal_conv1d_update",
      [backend](const Strides& x, const Strides& out, uintptr_t state, uintptr_t slots, uintptr_t weight,
                uintptr_t bias, int64_t batch, int64_t length, int64_t channels, int64_t width, int64_t window,
                int dtype, bool silu, uintptr_t stream) {
        backend.causal_conv1d_update({strided(x), strided(out), pointer<void>(state), pointer<const int64_t>(slots),
                                      pointer<const float>(weight), pointer<const float>(bias), batch, length, channels,
                                      width, window, static_cast<DType>(dtype), silu},
                                     pointer<void>(stream));
      },
      release);
  m.def(
      "selective_state_update",
      [backend](uintptr_t state, uintptr_t slots, const Strides& x, const Strides& dt, const Strides& z, uintptr_t out,
                const Strides& a, int64_t a_state, uintptr_t b, uintptr_t c, const Strides& d, const Strides& bias,
                int64_t batch, int64_t heads, int64_t head_dim, int64_t states, int64_t groups, int dtype,
                int state_dtype, bool softplus, uintptr_t stream) {
        backend.selective_state_update({pointer<void>(state),
                                        pointer<const int64_t>(slots),
                                        by_head(x),
                                        by_head(dt),
                                        by_head(z),
                                        pointer<void>(out),
                                        by_head(a),
                                        a_state,
                                        pointer<const void>(b),
                                        pointer<const void>(c),
                                        by_head(d),
                                        by_head(bias),
                                        batch,
                                        heads,
                                        head_dim,
                                        states,
                                        groups,
                                        static_cast<DType>(dtype),
                                        static_cast<DType>(state_dtype),
                                        softplus},
                                       pointer<void>(stream));
      },
      release);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = DEFTCORE_VERSION;
  m.attr("max_sparse_tokens") = kMaxSparseTokens;
  m.def("isa_name", &cpu::isa_name);
  m.def("isa_available", &cpu::isa_available);
  py::class_<Quant4>(m, "Quant4")
      .def(py::init([](uintptr_t packed, uintptr_t code, uintptr_t absmax, uintptr_t nested_absmax,
                       uintptr_t nested_code, float nested_offset, int64_t rows, int64_t cols, int64_t block_size,
                       bool column_blocks) {
        return Quant4{pointer<const uint8_t>(packed),
                      pointer<const float>(code),
                      pointer<const void>(absmax),
                      pointer<const float>(nested_absmax),
                      pointer<const float>(nested_code),
                      nested_offset,
                      rows,
                      cols,
                      block_size,
                      column_blocks};
      }));
  py::class_<DeltaBank>(m, "DeltaBank")
      .def(py::init([](uintptr_t gather_start, uintptr_t gather_index, uintptr_t gather_rows, uintptr_t scatter_start,
                       uintptr_t scatter_index, uintptr_t scatter_rows, uintptr_t low_start, uintptr_t low_in,
                       uintptr_t low_out, int64_t count, int64_t inputs, int64_t outputs) {
        return DeltaBank{pointer<const int64_t>(gather_start),
                         pointer<const int32_t>(gather_index),
                         pointer<const void>(gather_rows),
                         pointer<const int64_t>(scatter_start),
                         pointer<const int32_t>(scatter_index),
                         pointer<const void>(scatter_rows),
                         pointer<const int64_t>(low_start),
                         pointer<const void>(low_in),
                         pointer<const void>(low_out),
                         count,
                         inputs,
                         outputs};
      }));
  m.def("code_book", [](int type) {
    const float* book = code_book(static_cast<QuantType>(type));
    return std::vector<float>(book, book + 16);
  });
  m.attr("nested_block") = kNestedBlock;
  py::class_<SelectiveScanArgs>(m, "SelectiveScan")
      .def(py::init([](const Strides& u, const Strides& delta, const Strides& z, const Strides& out, uintptr_t a,
                       uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t delta_bias, uintptr_t first, uintptr_t last,
                       uintptr_t chunks, int64_t batch, int64_t length, int64_t channels, int64_t states,
                       int64_t groups, int dtype, bool softplus, bool fixed_b, bool fixed_c) {
        return SelectiveScanArgs{strided(u),
                                 strided(delta),
                                 strided(z),
                                 strided(out),
                                 pointer<const float>(a),
                                 pointer<const float>(b),
                                 pointer<const float>(c),
                                 pointer<const float>(d),
                                 pointer<const float>(delta_bias),
                                 pointer<const float>(first),
                                 pointer<float>(last),
                                 pointer<float>(chunks),
                                 batch,
                                 length,
                                 channels,
                                 states,
                                 groups,
                                 static_cast<DType>(dtype),
                                 softplus,
                                 fixed_b,
                                 fixed_c};
      }));
  m.attr("scan_chunk") = kScanChunk;
  m.attr("max_conv_width") = kMaxConvWidth;
  py::class_<SsdArgs>(m, "Ssd").def(
      py::init([](const Strides& x, const Strides& out, uintptr_t step, uintptr_t log_decay, uintptr_t b, uintptr_t c,
                  uintptr_t d, uintptr_t first, uintptr_t last, int64_t batch, int64_t length, int64_t heads,
                  int64_t head_dim, int64_t states, int64_t groups, int dtype) {
        return SsdArgs{strided(x),
                       strided(out),
                       pointer<const float>(step),
                       pointer<const float>(log_decay),
                       pointer<const float>(b),
                       pointer<const float>(c),
                       pointer<const float>(d),
                       pointer<const float>(first),
                       pointer<float>(last),
                       batch,
                       length,
                       heads,
                       head_dim,
                       states,
                       groups,
                       static_cast<DType>(dtype)};
      }));
  py::class_<CausalConv1dArgs>(m, "CausalConv1d")
      .def(py::init([](const Strides& x, const Strides& out, const Strides& first, uintptr_t weight, uintptr_t bias,
                       uintptr_t sequence, int64_t batch, int64_t length, int64_t channels, int64_t width, int dtype,
                       bool silu) {
        return CausalConv1dArgs{strided(x),
                                strided(out),
                                strided(first),
                                pointer<const float>(weight),
                                pointer<const float>(bias),
                                pointer<const int32_t>(sequence),
                                batch,
                                length,
                                channels,
                                width,
                                static_cast<DType>(dtype),
                                silu};
      }));
  bind(m.def_submodule("cpu"), {cpu::act_density,
                                cpu::act_density_backward,
                                cpu::density,
                                cpu::sparse_down_workspace,
                                cpu::sparse_down,
                                cpu::sparse_mlp_workspace,
                                cpu::sparse_mlp,
                                cpu::sparse_mlp_4bit_workspace,
                                cpu::sparse_mlp_4bit,
                                cpu::quantize_4bit,
                                cpu::dequantize_4bit,
                                cpu::linear_4bit_workspace,
                                cpu::linear_4bit_tokens,
                                cpu::linear_4bit,
                                cpu::linear_4bit_backward,
                                cpu::gated_act,
                                cpu::gated_act_backward,
                                cpu::grouped_delta_workspace,
                                cpu::grouped_delta,
                                cpu::selective_scan,
                                cpu::selective_scan_workspace,
                                cpu::selective_scan_backward,
                                cpu::selective_state_update,
                                cpu::causal_conv1d,
                                cpu::causal_conv1d_backward,
                                cpu::causal_conv1d_update,
                                cpu::ssd,
                                cpu::ssd_workspace,
                                cpu::ssd_backward});
#if defined(DEFTCORE_WITH_CUDA)
  bind(m.def_submodule("cuda"), {cuda::act_density,
                                 cuda::act_density_backward,
                                 cuda::density,
                                 cuda::sparse_down_workspace,
                                 cuda::sparse_down,
                                 cuda::sparse_mlp_workspace,
                                 cuda::sparse_mlp,
                                 cuda::sparse_mlp_4bit_workspace,
                                 cuda::sparse_mlp_4bit,
                                 cuda::quantize_4bit,
                                 cuda::dequantize_4bit,
                                 cuda::linear_4bit_workspace,
                                 cuda::linear_4bit_tokens,
                                 cuda::linear_4bit,
                                 nullptr,  // linear_4bit_backward: decode and a library's product
                                 cuda::gated_act,
                                 cuda::gated_act_backward,
                                 cuda::grouped_delta_workspace,
                                 cuda::grouped_delta,
                                 cuda::selective_scan,
                                 cuda::selective_scan_workspace,
                                 cuda::selective_scan_backward,
                                 cuda::selective_state_update,
                                 cuda::causal_conv1d,
                                 cuda::causal_conv1d_backward,
                                 cuda::causal_conv1d_update,
                                 cuda::ssd,
                                 cuda::ssd_workspace,
                                 cuda::ssd_backward});
#endif
}
