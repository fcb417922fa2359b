"""bench/cuda_static.py over what CUDA 13's tools said of two of the kernels, shortened."""

import pytest

from bench import cuda_static
from bench.cuda_static import MULTIPROCESSORS, Kernel, add_instructions, add_threads, faults, parse_resources, readable

DENSITY = "_ZN8deftcore4cuda43_GLOBAL__N__57b772dc_10_density_cu_09742da714density_kernelILi4EfEEvNS_11DensityArgsE"
QUANTIZE = "_ZN8deftcore4cuda41_GLOBAL__N__d8d569bc_9_quant4_cu_c9fe54db15quantize_kernelIfEEvPKT_PhPfllNS1_4BookE"


def resources(arch, **functions):
    """Of one architecture's code, by function its registers, stack, shared memory and constants."""
    head = f"Fatbin elf code:\n================\narch = {arch}\ncode version = [1,8]\n\n"
    head += "Resource usage:\n Common:\n  GLOBAL:0\n"
    line = " Function {}:\n  REG:{} STACK:{} SHARED:{} LOCAL:0 CONSTANT[0]:{} TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    return head + "".join(line.format(name, *used) for name, used in functions.items())


RESOURCES = "\n".join((
    resources("sm_80", **{DENSITY: (48, 0, 64, 400), QUANTIZE: (32, 80, 0, 468)}),
    "Fatbin ptx code:\n================\narch = sm_90\ncompressed\n",
    resources("sm_90a", **{DENSITY: (48, 0, 1088, 576)}),
))  # fmt: skip

ELF = f"""
arch = sm_80
.nv.info.{QUANTIZE}
	<0x6>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xff
.nv.info.{DENSITY}
	<0x12>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x2 0x1
"""

SASS = f"""
	code for sm_80
	.target	sm_80

		Function : {DENSITY}
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
                                                                                 /* 0x000fe400078e00ff */
        /*08b0*/                   LDG.E.U8 R12, [R12.64] ;                      /* 0x000000060c0c7981 */
        /*0930*/              @!P0 LDG.E.128.CONSTANT R12, [R12.64] ;            /* 0x000000060c0c7981 */
        /*2230*/                   STS [R2], R0 ;                                /* 0x0000000002007388 */
        /*2240*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                 /* 0x0000000000007b1d */
        /*2290*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                 /* 0x0000000000007b1d */
		Function : {QUANTIZE}
        /*00a0*/                   STL.64 [R1], R2 ;                             /* 0x0000000201007387 */
        /*0780*/                   LDG.E R5, [R4.64] ;                           /* 0x0000000a04057981 */
        /*14d0*/               @P0 LDG.E R26, [R28.64+-0x4] ;                    /* 0xfffffc0a1c1a0981 */
        /*18f0*/                   LDL.U8 R7, [R2+0x3c] ;                        /* 0x00003c0002077983 */
        /*1d60*/                   STG.E.U8 [R18.64], R7 ;                       /* 0x0000000712007986 */
	code for sm_90a
		Function : {DENSITY}
        /*0990*/                   LDG.E.64 R12, desc[UR8][R12.64] ;             /* 0x000000080c0c7981 */
"""


def parsed():
    kernels = parse_resources(RESOURCES, "family")
    add_threads(ELF, kernels)
    add_instructions(SASS, kernels)
    return kernels


def test_figures_of_each_kernel_and_architecture():
    kernels = parsed()
    assert kernels.keys() == {("sm_80", DENSITY), ("sm_80", QUANTIZE), ("sm_90", DENSITY)}
    density, quantize, later = kernels.values()
    assert (density.registers, density.local, density.shared, density.threads) == (48, 0, 64, 256)
    assert (density.loads, density.stores, density.barriers) == ({1: 1, 16: 1}, {}, {"0x0"})
    assert density.local_accesses == 0
    assert (quantize.registers, quantize.local, quantize.shared, quantize.threads) == (32, 80, 0, 1024)
    assert (quantize.loads, quantize.stores, quantize.barriers) == ({4: 2}, {1: 1}, set())
    assert quantize.local_accesses == 2
    assert (later.shared, later.loads) == (64, {8: 1})  # what the driver takes is not the kernel's


def test_names_are_short():
    space = "deftcore::cuda::(anonymous namespace)::"
    assert readable(f"void {space}density_kernel<4, float>(deftcore::DensityArgs)") == "density_kernel<4, float>"
    assert readable(f"void {space}f<(deftcore::Activation)0, 1>(int)") == "f<(Activation)0, 1>"
    assert readable(f"{space}add_parts_kernel(float*, float const*)") == "add_parts_kernel"


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 256, 32, 0, 8),  # threads: 64 warps
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_80", 256, 72, 0, 3),  # registers: 16384 / 2304, so 7 warps a scheduler
        ("sm_80", 64, 144, 32768, 4),  # shared memory: 164 KB in pieces of 33
        ("sm_90", 64, 144, 32768, 6),  # 228 KB: six pieces; registers: three warps a scheduler, six blocks
        ("sm_90", 1024, 128, 0, 0),
    ],
)
def test_blocks_of_a_multiprocessor(arch, threads, registers, shared, blocks):
    machine = MULTIPROCESSORS[arch]
    assert machine.blocks_of(threads, registers, shared) == blocks
    assert machine.occupancy(threads, registers, shared) == blocks * threads / 32 / 64


def kernel(name="a_kernel<1>", **changes):
    return Kernel(
        **{"file": "family", "name": name, "arch": "sm_80", "registers": 32, "local": 0, "shared": 0} | changes
    )


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setattr(cuda_static, "ALLOWED_LOCAL", {"family by_design": 80})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": 16}, "sm_80 family a_kernel<1>: 16 bytes of local memory a thread, 0 are allowed"),
        ({"local_accesses": 1}, "a_kernel<1>: 0 bytes of local memory"),
        ({"name": "by_design", "local": 81}, "by_design: 81 bytes of local memory a thread, 80 are allowed"),
        ({"registers": 128}, "no multiprocessor has room for 1024 threads of 128 registers"),
    ],
)
def test_faults(allowed, changes, message):
    good = [kernel(), kernel("by_design", local=80, local_accesses=9)]
    assert faults(good, ["sm_90"]) == []
    (fault,) = faults([*good, kernel(**changes)], ["sm_90"])
    assert message in fault


def test_an_allowance_that_no_kernel_needs_is_a_fault(allowed):
    assert faults([kernel(), kernel("by_design")], ["sm_90"]) == [
        "family by_design: local memory is allowed, but it has none"
    ]


@pytest.mark.parametrize("ptx", [[], ["sm_90a"], ["sm_100f"]])
def test_ptx_that_later_gpus_cannot_run_is_a_fault(allowed, ptx):
    assert faults([kernel("by_design", local=80)], ptx) == ["no PTX that later GPUs can run is in every object"]


def test_a_template_shows_its_worst_instance_and_how_many_load_wide():
    few, many, wide = kernel("f<1>", registers=20), kernel("f<2>", registers=60), kernel("f<3>", loads={16: 2})
    few.loads, many.loads = {16: 0}, {16: 0, 2: 1}
    assert cuda_static.worst([few, many, wide]) == [(many, 3, 1)]
