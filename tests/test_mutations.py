"""The list of faults that mutate_cuda.py tries: it keeps up with the kernels' files."""

import re

import pytest
from mutate_cuda import CUDA, FAMILIES, MUTATIONS, misplaced


def test_every_text_stands_once():
    assert not misplaced(MUTATIONS)


def test_every_kernel_file_is_run():
    assert {source for sources in FAMILIES.values() for source in sources} == {p.name for p in CUDA.glob("*.cu")}


@pytest.mark.parametrize("path", sorted(CUDA.glob("*.cu*")), ids=lambda path: path.name)
def test_every_file_has_faults(path):
    """A kernels' file has each kind; one that others include has at least one."""
    wanted = set()
    if path.suffix == ".cu":
        wanted = {"index", "mask", "tail", "arithmetic", "host"}
        if re.search(r"__syncthreads|warp_sum|_sync\(", path.read_text()):
            wanted.add("barrier")
    kinds = {m.kind for m in MUTATIONS if m.file == path.name}
    assert kinds
    assert wanted <= kinds
