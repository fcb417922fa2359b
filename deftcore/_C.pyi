"""The compiled module: addresses, sizes and a stream in. `deftcore.ops` is the interface for people."""

from types import ModuleType

version: str
max_sparse_tokens: int
nested_block: int
cpu: ModuleType
cuda: ModuleType  # in a build with CUDA only

class Quant4:
    """A packed matrix: addresses and sizes."""

    def __init__(
        self, packed: int, code: int, absmax: int, nested_absmax: int, nested_code: int, nested_offset: float,
        rows: int, cols: int, block_size: int, column_blocks: bool,
    ) -> None: ...  # fmt: skip

class DeltaBank:
    """Several deltas of one weight: addresses and sizes."""

    def __init__(
        self, gather_start: int, gather_index: int, gather_rows: int, scatter_start: int, scatter_index: int,
        scatter_rows: int, low_start: int, low_in: int, low_out: int, count: int, inputs: int, outputs: int,
    ) -> None: ...  # fmt: skip

class SelectiveScan:
    """Tensors as (address, strides of batch, time and channel), addresses, sizes and flags of a scan."""

    def __init__(self, *args: object) -> None: ...

scan_chunk: int

def code_book(quant_type: int) -> list[float]: ...
def isa_name() -> str: ...
def isa_available() -> str: ...
