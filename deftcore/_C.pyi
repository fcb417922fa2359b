"""The compiled module: addresses, sizes and a stream in. `deftcore.ops` is the interface for people."""

from types import ModuleType

version: str
max_sparse_tokens: int
cpu: ModuleType
cuda: ModuleType  # in a build with CUDA only

def isa_name() -> str: ...
def isa_available() -> str: ...
