"""Puts the faults of cuda_mutations.yaml into the CUDA kernels, one at a time: do the native tests notice?

    python tests/mutate_cuda.py [--only FILE] [-j N]      exit 1 where a fault is not noticed
    python tests/mutate_cuda.py --list

The tests over the emulator are built once, with the address sanitizer, in build/mutations (minutes; `--build` for
another folder). A fault then costs one file's compilation and a link: csrc/cuda is copied, changed, and what it gives
is linked before the libraries. A family's test is asked if one of its kernels' files is the changed one or includes it.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc/cuda"
BY_FILE = yaml.safe_load((ROOT / "tests/cuda_mutations.yaml").read_text())
# The kernels' files that tests/native/test_<family>.cpp runs; quickest first.
FAMILIES = {
    "density": ("density.cu",),
    "partial_linear": ("partial_linear.cu",),
    "masks": ("masks.cu",),
    "conv1d": ("conv1d.cu",),
    "galore": ("galore.cu",),
    "logits": ("logits.cu",),
    "neighbours": ("neighbours.cu", "gather_points.cu"),
    "quant4": ("quant4.cu",),
    "ssd": ("ssd.cu", "ssm.cu"),
    "ssm": ("ssm.cu",),
    "sparse_mlp": ("sparse_mlp.cu", "sparse_mlp4.cu"),
}
SEEDS = ("0", "1")
FAILED = ": failed: "  # in what tests/native/check.h prints


class Mutation(NamedTuple):
    file: str
    kind: str
    old: str
    new: str

    def __str__(self):
        old, new = ("\\n".join(line.strip() for line in text.split("\n")) for text in (self.old, self.new))
        return f"{self.file} {self.kind}: {old}  ->  {new or '(nothing)'}"


MUTATIONS = [Mutation(file, *entry) for file, entries in BY_FILE.items() for entry in entries]


def misplaced(mutations):
    """What is wrong with the list itself: texts that their files do not have, or have more than once."""
    counts = {m: (CUDA / m.file).read_text().count(m.old) for m in mutations}
    return [f"{count} times in its file, must be 1: {m}" for m, count in counts.items() if count != 1]


def sources_of(family, file):
    """The family's kernels' files that read this one."""
    return [source for source in FAMILIES[family] if file in files_read(source)]


def files_read(name):
    """A file of csrc/cuda and those that it includes."""
    included = re.findall(r'#include "(\w+\.cuh)"', (CUDA / name).read_text())
    return {name}.union(*(files_read(other) for other in included))


class Build:
    """The tests as they are, and the commands that compile a kernel's file and link a test."""

    def __init__(self, folder):
        self.folder = folder
        options = {
            "DEFTCORE_CUDA": "emulate",
            "DEFTCORE_BUILD_TESTS": "ON",
            "CMAKE_BUILD_TYPE": "None",
            "CMAKE_CXX_FLAGS": "-O1 -fsanitize=address",
            # Unknown: the CPU's kernels, beside the point here, are built for no vectors only.
            "CMAKE_SYSTEM_NAME": platform.system(),
            "CMAKE_SYSTEM_PROCESSOR": "any",
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        targets = [f"test_emulated_{family}" for family in FAMILIES]
        subprocess.run(["ninja", "-C", folder, "--quiet", *targets], check=True)
        self.compile, self.link = {}, {}
        for family, target in zip(FAMILIES, targets, strict=True):
            lines = self.output("ninja", "-t", "commands", target).splitlines()
            self.link[family] = shlex.split(lines[-1].strip(": &"))
            for line in lines:
                if line.endswith(".cu"):
                    self.compile[Path(line.split()[-1]).name] = shlex.split(line)

    def output(self, *command):
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def run(self, command, limit=None, stop=None):
        """Return code and output, up to a line with `stop`; no code where the time was up."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with subprocess.Popen(command, cwd=self.folder, **pipes) as process:
            timer = threading.Timer(limit or 3600, process.kill)
            timer.start()
            lines = []
            for line in process.stdout:
                lines.append(line)
                if stop and stop in line:
                    process.kill()
                    break
            late = not timer.is_alive()
            timer.cancel()
        return None if late else process.returncode, "".join(lines)

    def compile_copy(self, source, result):
        command = [word for word in self.compile[source.name] if word != "-MD"]
        for option, value in {"-o": result, "-c": source}.items():
            command[command.index(option) + 1] = str(value)
        for option in ("-MT", "-MF"):
            at = command.index(option)
            del command[at : at + 2]
        return self.run(command)

    def link_with(self, family, objects, result):
        command = list(self.link[family])
        command[command.index("-o") + 1] = str(result)
        first = next(i for i, word in enumerate(command) if word.endswith(".a"))
        return self.run(command[:first] + [str(o) for o in objects] + command[first:])


def death(code, output):
    """In a few words, how a test's program failed; empty where it passed."""
    if code is None:
        return "time limit"
    if found := re.search(r"AddressSanitizer: ([\w-]+)", output):
        return f"sanitizer: {found[1]}"
    if found := re.search(r"what\(\):\s+(?:\S+:\d+: )?(.*)", output):
        return "emulator: " + re.sub(r"/\S+/", "", found[1])
    if found := re.search(r"(\w+\.\w+:\d+)" + FAILED + "(.*)", output):
        return f"value: {found[2]} at {found[1]}"
    return f"exit {code}" if code else ""


def run_test(build, program, limit):
    """How the program dies, with the seed that showed it; empty where it passes under all."""
    environment = ["env", "OMP_NUM_THREADS=1", "ASAN_OPTIONS=symbolize=0:" + os.environ.get("ASAN_OPTIONS", "")]
    for seed in SEEDS:
        if how := death(*build.run([*environment, f"DEFTCORE_EMULATE_SEED={seed}", program], limit, stop=FAILED)):
            return how if seed == SEEDS[0] else f"{how} (seed {seed})"
    return ""


def copy_kernels(folder):
    """csrc/cuda for float alone, the type of nearly all native tests: the others take most of a compilation."""
    shutil.copytree(CUDA, folder)
    elements = folder / "elements.cuh"
    elements.write_text(re.sub(r"\n *case DType::k(BFloat16|Float16):.*", "", elements.read_text()))


def ask(build, family, copy, sources, limit):
    """What the family's test says of these files of the copy: a verdict, and how it was reached."""
    objects = [copy / f"{source}.o" for source in sources]
    for source, result in zip(sources, objects, strict=True):
        if not result.exists():
            code, output = build.compile_copy(copy / source, result)
            if code:
                return "does not compile", next((s for s in output.splitlines() if "error" in s), output)
    program = copy / family
    code, output = build.link_with(family, objects, program)
    if code:
        return "does not link", output.splitlines()[-1]
    how = run_test(build, program, limit)
    return ("killed", f"{family}: {how}") if how else ("survived", "")


def judge(build, mutation, limits):
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "cuda")
        copy_kernels(copy)
        changed = copy / mutation.file
        changed.write_text(changed.read_text().replace(mutation.old, mutation.new))
        for family, limit in limits.items():
            sources = sources_of(family, mutation.file)
            if sources:
                verdict = ask(build, family, copy, sources, limit)
                if verdict[0] != "survived":
                    return verdict
    return "survived", ""


def time_limits(build, families):
    """Of a test's program in seconds, by family, from what it takes without any fault."""
    limits = {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "cuda")
        copy_kernels(copy)
        for family in families:
            start = time.monotonic()
            verdict, how = ask(build, family, copy, FAMILIES[family], None)
            if verdict != "survived":
                raise SystemExit(f"without any fault: {verdict}, {how}")
            limits[family] = 10 + 10 * (time.monotonic() - start)
    return limits


def table(results):
    """Kinds by file: killed of all."""
    kinds = list(dict.fromkeys(m.kind for m in MUTATIONS))
    all_, killed = Counter(), Counter()
    for m, (verdict, _) in results:
        all_[m.file, m.kind] += 1
        killed[m.file, m.kind] += verdict == "killed"
    print(f"\n{'killed of all':20}" + "".join(f"{kind:>12}" for kind in kinds))
    for file in dict.fromkeys(m.file for m, _ in results):
        cells = [f"{killed[file, k]}/{all_[file, k]}" if all_[file, k] else "" for k in kinds]
        print(f"{file:20}" + "".join(f"{cell:>12}" for cell in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=BY_FILE, help="this file's mutations; may be given again")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--build", type=Path, default=ROOT / "build/mutations", help="where the tests are built")
    parser.add_argument("-j", type=int, default=1, help="mutations at a time")
    options = parser.parse_args()
    mutations = [m for m in MUTATIONS if not options.only or m.file in options.only]
    if options.list:
        print(*mutations, sep="\n")
        return 0
    if wrong := misplaced(mutations):
        print(*wrong, sep="\n")
        return 1
    build = Build(options.build.resolve())
    limits = time_limits(build, [f for f in FAMILIES if any(sources_of(f, m.file) for m in mutations)])

    def judged(mutation):
        verdict, how = judge(build, mutation, limits)
        print(f"{verdict:9} {mutation}\n          {how}" if how else f"{verdict:9} {mutation}", flush=True)
        return mutation, (verdict, how)

    with ThreadPoolExecutor(options.j) as pool:
        results = list(pool.map(judged, mutations))
    table(results)
    left = [m for m, (verdict, _) in results if verdict != "killed"]
    print(f"\n{len(results) - len(left)} of {len(results)} killed")
    print(*(f"not killed: {m}" for m in left), sep="\n")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
