"""What the compiler made of the CUDA kernels, read from the objects of a build: registers, local and shared memory,
barriers, occupancy, width of global accesses, and the PTX that GPUs of later architectures run.

    python -m bench.cuda_static BUILD [--all] [--json FILE]

Prints a table per architecture with a line per kernel template, that of the instance with most local memory, then least
occupancy, then most registers. Ends with 1 where a kernel has local memory (spilled registers, or an array that it
indexes at run time) beyond ALLOWED_LOCAL, or no block of it fits a multiprocessor, or there is no PTX for later GPUs.
Needs cuobjdump, nvdisasm (CUDA's, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm) and c++filt.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.markdown import table
from deftcore._files import write_json

# Bytes of local memory of a thread that a kernel has by design: arrays that it indexes at run time.
ALLOWED_LOCAL = {
    "quant4 quantize_kernel": 80,  # the code book and its bounds, searched by halving
    "ssd backward_kernel": 2112,  # 33 steps of 16 states, computed once more for the way back
    "ssm backward_kernel": 1056,  # likewise, of 8 states
}

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # by an instruction's suffix; without one 4 bytes
WARP = 32
RESERVED = 1024  # bytes of shared memory that the driver takes of every block


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor: "Technical specifications per compute capability" of the CUDA programming guide.

    Registers are given to a warp by 256, from the quarter of the register file that its scheduler has; shared memory by
    128 bytes (cuda_occupancy.h of the toolkit).
    """

    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536

    def blocks_of(self, threads, registers, shared):
        """Blocks that are resident at once: each with so many threads, registers a thread, bytes of shared memory."""
        warps = -(-threads // WARP)
        per_warp = -(-registers * WARP // 256) * 256
        by_registers = 4 * (self.registers // 4 // per_warp) // warps
        by_shared = self.shared // (-(-(shared + RESERVED) // 128) * 128)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)

    def occupancy(self, threads, registers, shared):
        return self.blocks_of(threads, registers, shared) * -(-threads // WARP) / self.warps


MULTIPROCESSORS = {"sm_80": Multiprocessor(shared=164 << 10), "sm_90": Multiprocessor(shared=228 << 10)}


@dataclass
class Kernel:
    file: str  # without .cu
    name: str  # with its template's arguments
    arch: str
    registers: int  # of a thread
    local: int  # bytes of a thread
    shared: int  # bytes of a block, without what a launch adds
    threads: int = 1024  # of a block, at most; what the kernel names
    loads: Counter = field(default_factory=Counter)  # instructions that read global memory, by bytes
    stores: Counter = field(default_factory=Counter)
    local_accesses: int = 0  # instructions
    barriers: set = field(default_factory=set)

    @property
    def template(self):
        return f"{self.file} {self.name.split('<')[0]}"

    @property
    def occupancy(self):
        return MULTIPROCESSORS[self.arch].occupancy(self.threads, self.registers, self.shared)


# ---------------------------------------------------------------------------- what cuobjdump says


def plain_arch(arch):
    return arch.rstrip("af")  # an architecture's own features do not change its limits


def parse_resources(text, file):
    """{(architecture, mangled name): Kernel} of `cuobjdump --dump-resource-usage`."""
    kernels, arch = {}, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = plain_arch(match[1])
        elif match := re.match(r" *Function (\S+):$", line):
            name = match[1]
        elif "REG:" in line:
            use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            # From sm_90 on the figure has what the driver takes.
            shared = use["SHARED"] if arch < "sm_90" else max(0, use["SHARED"] - RESERVED)
            kernels[arch, name] = Kernel(file, name, arch, use["REG"], use["STACK"] + use["LOCAL"], shared)
    return kernels


def add_threads(text, kernels):
    """Reads the largest blocks from `cuobjdump --dump-elf`."""
    pattern = r"^arch = (\w+)|^\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)"
    for arch, name, *threads in re.findall(pattern, text, re.M):
        if arch:
            here = plain_arch(arch)
        elif name:
            mangled = name
        else:
            x, y, z = (int(size, 16) for size in threads)
            kernels[here, mangled].threads = x * y * z


def add_instructions(text, kernels):
    """Counts accesses and barriers in `cuobjdump --dump-sass`."""
    access = r"(LDG|STG|LD|ST|LDL|STL)(\.\S+)"
    pattern = rf"^\s+Function : (\S+)|^\s+code for (\w+)|^\s+/\*\w+\*/\s+(?:@\S+\s+)?(?:{access}|BAR\.\S+\s+(\w+))"
    for match in re.finditer(pattern, text, re.M):
        function, arch, kind, suffixes, barrier = match.groups()
        if arch:
            here = plain_arch(arch)
        elif function:
            kernel = kernels[here, function]
        elif barrier:
            kernel.barriers.add(barrier)
        elif kind in ("LDL", "STL"):
            kernel.local_accesses += 1
        else:
            width = next((WIDTHS[s] for s in suffixes.split(".") if s in WIDTHS), 4)
            (kernel.loads if kind.startswith("LD") else kernel.stores)[width] += 1


def readable(demangled):
    """A kernel's name without result, namespaces and parameters."""
    short = re.sub(r"\bdeftcore::(cuda::)?(\(anonymous namespace\)::)?", "", demangled)
    name, depth = short.removeprefix("void "), 0
    for i, character in enumerate(name):  # the first parenthesis outside of template arguments
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def tool(name):
    """CUDA's program of this name: on the PATH, beside nvcc, or of its Python package."""
    nvcc, package = shutil.which("nvcc"), importlib.util.find_spec("nvidia")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [
        found for root in (package and package.submodule_search_locations) or () for found in Path(root).glob("*/bin")
    ]
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))
    if found is None:
        sys.exit(
            f"{name} was not found: it comes with CUDA, or with pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return found


def run(*command, text=None):
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])  # cuobjdump calls it
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def read(build):
    """Kernels, and architectures of the PTX, of a build folder's objects."""
    objects = sorted(build.glob("**/*.cu.o"))
    if not objects:
        sys.exit(f"{build}: no .cu.o file in it; build with DEFTCORE_CUDA=on")
    kernels, ptx = [], set()
    for path in objects:
        ask = partial(run, tool("cuobjdump"), path)
        found = parse_resources(ask("--dump-resource-usage"), path.name.removesuffix(".cu.o"))
        add_threads(ask("--dump-elf"), found)
        add_instructions(ask("--dump-sass"), found)
        names = run("c++filt", text="\n".join(name for _, name in found)).splitlines()
        for kernel, name in zip(found.values(), names, strict=True):
            kernel.name = readable(name)
        kernels += found.values()
        ptx.add(frozenset(re.findall(r"\.(sm_\w+)\.ptx", ask("--list-ptx"))))
    return kernels, sorted(set.intersection(*map(set, ptx)))


# ---------------------------------------------------------------------------- tables


def worst(kernels):
    """The instance of each template that counts; how many instances there are, and how many load 16 bytes at once."""
    groups = {}
    for kernel in kernels:
        groups.setdefault(kernel.template, []).append(kernel)
    return [
        (
            max(group, key=lambda k: (k.local, -k.occupancy, k.registers)),
            len(group),
            sum(k.loads[16] > 0 for k in group),
        )
        for _, group in sorted(groups.items())
    ]


def widths(accesses):
    return ", ".join(f"{count} x {width}" for width, count in sorted(accesses.items(), reverse=True))


def cells(kernel):
    return [kernel.threads, kernel.registers, kernel.local, kernel.shared, len(kernel.barriers),
            f"{kernel.occupancy:.0%}", widths(kernel.loads), widths(kernel.stores)]  # fmt: skip


COLUMNS = ["threads", "registers", "local", "shared", "barriers", "occupancy", "loads", "stores"]


def table_of(kernels, every):
    if every:
        return table(["kernel", *COLUMNS], ([f"{k.file} `{k.name}`", *cells(k)] for k in kernels))
    return table(["kernel", "instances", "16-byte loads in", *COLUMNS],
                 ([k.template, count, wide, *cells(k)] for k, count, wide in worst(kernels)))  # fmt: skip


def faults(kernels, ptx):
    """Sentences on what must not be."""
    found = []
    for k in kernels:
        allowed = ALLOWED_LOCAL.get(k.template, 0)
        if k.local > allowed or (k.local_accesses and not allowed):
            found.append(f"{k.arch} {k.file} {k.name}: {k.local} bytes of local memory a thread, {allowed} are allowed")
        if k.occupancy == 0:
            found.append(
                f"{k.arch} {k.file} {k.name}: no multiprocessor has room for {k.threads} threads of {k.registers} "
                f"registers and {k.shared} bytes of shared memory"
            )
    for template in ALLOWED_LOCAL.keys() - {k.template for k in kernels if k.local}:
        found.append(f"{template}: local memory is allowed, but it has none")
    if not any(re.fullmatch(r"sm_\d+", arch) for arch in ptx):
        found.append("no PTX that later GPUs can run is in every object")
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static")
    parser.add_argument("build", type=Path, help="a build folder with CUDA")
    parser.add_argument("--all", action="store_true", help="a line per instance, not per template")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures to this file")
    args = parser.parse_args()
    kernels, ptx = read(args.build)
    print(
        "Bytes of local memory are a thread's; of shared memory a block's, without what a launch adds (which lowers the"
    )
    print("occupancy further). Accesses to global memory are instructions x bytes.")
    archs = sorted({k.arch for k in kernels})
    for arch in archs:
        print(f"\n{arch}\n")
        print(table_of([k for k in kernels if k.arch == arch], args.all))
    print(f"\nPTX: {', '.join(ptx) or 'none'}")
    found = faults(kernels, ptx)
    if args.json:
        shown = (
            kernels if args.all else [k for arch in archs for k, _, _ in worst([k for k in kernels if k.arch == arch])]
        )
        rows = [vars(k) | {"barriers": len(k.barriers), "occupancy": k.occupancy} for k in shown]
        write_json(args.json, {"kernels": rows, "ptx": ptx, "faults": found})
    sys.exit("\n".join(found) or 0)


if __name__ == "__main__":
    main()
