"""llama.cpp as a peer, through llama-cpp-python: whole models from GGUF files, and its scan alone.

`python -m bench.llama_cpp FILE` reads a few tokens, as a process of its own that may crash.
"""

import ctypes
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

from bench.harness import console, optional

INSTALL = 'llama_cpp is not installed: pip install "deftcore[bench]"'


def library():
    """The module llama_cpp, silenced; None where it is not installed or does not load."""
    if optional("llama_cpp", "__version__") is None:
        return None
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    return llama_cpp


def _silence(llama):
    if not hasattr(llama, "deftcore_silence"):  # the callback must outlive the call
        llama.deftcore_silence = llama.llama_log_callback(lambda level, text, data: None)
    return llama.deftcore_silence


class Model:
    """A GGUF file in llama.cpp, for one sequence; its weights `repacked` for the processor, as is its default."""

    def __init__(self, path, length, repacked=True):
        self.lib = library()
        options = self.lib.llama_model_default_params()
        options.use_extra_bufts = repacked
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        self.context = self.lib.llama_init_from_model(self.model, options)
        self.words = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def set_threads(self, threads):
        self.lib.llama_set_n_threads(self.context, threads, threads)

    def read(self, tokens):
        """Runs tokens behind what it has read; the last one's logits."""
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(held, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.words,))

    def start_anew(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def generate(self, prompt, new_tokens):
        """Greedy continuation."""
        self.start_anew()
        found = [int(self.read(prompt).argmax())]
        while len(found) < new_tokens:
            found.append(int(self.read(found[-1:]).argmax()))
        return found

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@cache
def runs_repacked(path):
    """Whether a file can be decoded from repacked weights: where a virtual machine hides AMX, that crashes."""
    command = [sys.executable, "-m", "bench.llama_cpp", str(path)]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        console.print(f"llama.cpp ends with {done.returncode} on repacked weights of {path.name}: taken as they are")
    return done.returncode == 0


# ---------------------------------------------------------------------------- the scan alone


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Scan:
    """ggml's graph of one `ggml_ssm_scan` as llama.cpp's Mamba asks for it: delta through softplus inside, no D, no z.

    Args: arrays as ggml has them, float32: x and delta [L, D], a [D, N], b and c [L, N].
    """

    def __init__(self, x, delta, a, b, c):
        folder = Path(library().__file__).parent / "lib"
        base, self._cpu = (ctypes.CDLL(str(folder / f"libggml-{part}.so")) for part in ("base", "cpu"))
        (length, width), states = x.shape, a.shape[1]
        base.ggml_init.argtypes, base.ggml_init.restype = [_InitParams], ctypes.c_void_p
        self._free = base.ggml_free
        self._free.argtypes = [ctypes.c_void_p]
        self._cpu.ggml_cpu_init()
        size = 4 * (3 * length * width + 4 * width * states + 2 * length * states) + (64 << 20)
        self._context = base.ggml_init(_InitParams(size, None, False))
        base.ggml_get_data.argtypes, base.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_void_p
        base.ggml_new_tensor.restype = ctypes.c_void_p
        base.ggml_new_tensor.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64),
        ]  # fmt: skip

        def tensor(values, *sizes):  # ggml's order of sizes, the fastest first
            kind = 26 if values.dtype == np.int32 else 0
            made = base.ggml_new_tensor(self._context, kind, len(sizes), (ctypes.c_int64 * len(sizes))(*sizes))
            ctypes.memmove(base.ggml_get_data(made), np.ascontiguousarray(values).ctypes.data, values.nbytes)
            return made

        inputs = [
            tensor(np.zeros((width, states), np.float32), states, 1, width, 1), tensor(x, 1, width, length, 1),
            tensor(delta, width, length, 1), tensor(a, states, width), tensor(b, states, 1, length, 1),
            tensor(c, states, 1, length, 1), tensor(np.zeros(1, np.int32), 1),
        ]  # fmt: skip
        base.ggml_ssm_scan.restype = ctypes.c_void_p
        base.ggml_ssm_scan.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64]  # the last is ignored by older releases
        self._result = base.ggml_ssm_scan(self._context, *inputs, 1)
        base.ggml_new_graph.argtypes, base.ggml_new_graph.restype = [ctypes.c_void_p], ctypes.c_void_p
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand.argtypes = [ctypes.c_void_p] * 2
        base.ggml_build_forward_expand(self._graph, self._result)
        run = self._cpu.ggml_graph_compute_with_ctx
        run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int], ctypes.c_int
        self._data, self._shape = base.ggml_get_data(self._result), (length, width)

    def run(self, threads):
        if self._cpu.ggml_graph_compute_with_ctx(self._context, self._graph, threads):
            raise RuntimeError("ggml's graph does not run")

    def output(self):
        """y [L, D] of the last run."""
        held = ctypes.cast(self._data, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(held, self._shape).copy()

    def close(self):
        self._free(self._context)


if __name__ == "__main__":
    Model(sys.argv[1], 64).generate(list(range(1, 9)), 2)
