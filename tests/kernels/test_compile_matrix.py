"""Every kernel configuration compiles for every GPU generation, and to the intended code."""

import re
import shutil

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from emulated import exclusive

from benchmarks import compile_matrix as matrix
from mimo_fast.kernels.dispatch import PDL_TRIGGERS, PdlTrigger

CASES = list(matrix.cases())
STATIC_SHARED = 48 * 1024
SPLIT = ("split_attention bf16", "merge_splits")

architectures = pytest.mark.parametrize("architecture", matrix.ARCHITECTURES, ids="sm_{}".format)


@pytest.fixture(scope="session", autouse=True)
def shared_cubins(tmp_path_factory):
    """A CUDA file is compiled once for an architecture and run, whatever the number of workers."""
    compiled = matrix.cubin

    def once(source, architecture):
        name = f"{source.stem}-{architecture}"
        with exclusive(tmp_path_factory, name) as folder:
            kept = folder / f"{name}.cubin"
            if not kept.exists():
                kept.write_bytes(compiled(source, architecture))
            return kept.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "cubin", once)
        yield


def check_cuda(source, architecture):
    kernels = matrix.compile_cuda(source, architecture)
    assert kernels
    for name, (_, local, shared) in kernels.items():
        assert local == 0, name
        assert shared <= STATIC_SHARED, name
    assert not matrix.wrong_descriptors(source, architecture)
    return kernels


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 120], ids="sm_{}".format)
def test_the_persistent_kernel_has_registers_for_512_threads(architecture):
    """Its file takes minutes, so this is the only test that compiles it for an architecture, and
    the first: at the end one process would wait for it."""
    source = next(source for source in matrix.CUDA if source.stem == "engine")
    kernels = check_cuda(source, architecture)
    # T, DEPTH, KIND
    assert len(kernels) == 8
    for name, (registers, *_) in kernels.items():
        assert registers <= 65536 // 512, name


@architectures
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_without_spills(case, architecture):
    compiled = matrix.compile_case(case, architecture)
    assert compiled.spilled == 0
    assert compiled.shared <= matrix.SHARED_LIMIT
    if case.ieee:
        assert not compiled.tf32
    if case.wide_loads:
        assert compiled.load_bits == 128
    early = "PDL" in case.kernel.arg_names and architecture >= 90
    assert (compiled.triggers, compiled.waits) == ((1, 1) if early else (0, 0))
    if early:
        before, _, _ = compiled.ptx.partition("griddepcontrol.wait")
        assert not re.search(r"\b(st\.global|atom\.|red\.)", before), "writes before it waits"


@pytest.mark.parametrize("trigger", PdlTrigger)
@pytest.mark.parametrize("name", ["small_decode bf16", *(f"{x} splits=16" for x in SPLIT)])
def test_the_next_starts_where_it_is_triggered(name, trigger):
    case = next(case for case in CASES if case.name == name)
    ptx = matrix.compile_case(case, 90, trigger).ptx
    calls = re.findall(r"griddepcontrol\.\w+|\b(?:ld|st)\.global|cp\.async\.cg", ptx)
    triggers = [i for i, call in enumerate(calls) if call.endswith("launch_dependents")]
    waits = [i for i, call in enumerate(calls) if call.endswith("wait")]
    assert len(waits) == (trigger not in (PdlTrigger.OFF, PdlTrigger.LETS))
    assert len(triggers) == (trigger not in (PdlTrigger.OFF, PdlTrigger.NONE))
    if trigger in (PdlTrigger.FIRST, PdlTrigger.LETS):
        assert triggers == [0]
    if trigger == PdlTrigger.WAITED:
        assert triggers[0] == waits[0] + 1
    if trigger == PdlTrigger.LAST:
        after = calls[triggers[0] + 1 :]
        assert after
        assert not any(call.startswith(("ld", "cp")) for call in after)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@architectures
@pytest.mark.parametrize(
    "source", [each for each in matrix.CUDA if each.stem != "engine"], ids=lambda each: each.name
)
def test_cuda_compiles_without_spills(source, architecture):
    check_cuda(source, architecture)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_cuda_file_is_compiled_once(monkeypatch):
    source = next(source for source in matrix.CUDA if source.stem == "unpack")
    first = matrix.cubin(source, 90)

    def again(*command, **options):
        raise AssertionError(f"compiled again: {command}")

    monkeypatch.setattr(matrix.subprocess, "run", again)
    assert matrix.cubin(source, 90) == first


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_pair_of_int4_is_one_logical_instruction():
    """A thread unpacks 32 pairs of a unit: two instructions each would be 64, and were."""
    source = next(source for source in matrix.CUDA if source.stem == "quantized_mma")
    # T, BITS, GROUPED, WARPS, STAGES, TILES_X, BUFFERS
    found = {tuple(name.split()[1:]): code for name, code in matrix.cuda_assembly(source, 90)}
    of_int4 = {name: code for name, code in found.items() if name[1] == "4"}
    assert of_int4
    for name, code in of_int4.items():
        masks = re.findall(r"LOP3\.LUT [^;]*\b0xf000f\b[^;]*;", code)
        assert len(masks) == 32, name
        assert all(" 0xea," in mask for mask in masks), name
        assert len(re.findall(r"\bHMMA\.", code)) == 8 * int(name[5]), name


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["quantized_mma", "quantized_gemm", "row_tiles", "unpack"])
def test_cuda_kernels_begin_early_and_write_late(name):
    """A trigger and a wait each, nothing written before the wait, memory read 16 bytes at a time
    and, where it is a weight, with the 256 bytes around it."""
    source = next(source for source in matrix.CUDA if source.stem == name)
    for kernel, code in matrix.cuda_assembly(source, 90):
        # The machine's names of griddepcontrol.launch_dependents and griddepcontrol.wait.
        assert (code.count("PREEXIT"), code.count("ACQBULK")) == (1, 1), kernel
        before = code[: code.index("ACQBULK")]
        assert not re.findall(r"\b(?:STG|RED|ATOM|ATOMG)\b", before), kernel
        copies = re.findall(r"\bLDGSTS\.[.\w]+", code)
        if name == "unpack" or kernel.startswith("sort_x"):
            assert re.findall(r"\b(?:LDG|STG)\.E\.128\b", code), kernel
            continue
        assert {*copies} == {"LDGSTS.E.BYPASS.LTC256B.128"}, kernel
        if name == "quantized_mma":
            # T, BITS, GROUPED, WARPS, STAGES, TILES_X, BUFFERS; two rows of W a thread and unit, at
            # the queue's begin and in its loop.
            _, bits, _, _, _, tiles_x, _ = kernel.split()[1:]
            assert len(copies) == int(bits), kernel
            assert len(re.findall(r"\bHMMA\.", code)) == 8 * int(tiles_x), kernel
        if name == "row_tiles":
            # T, BITS, GROUPED, WARPS_W, WARPS_X, TILES_X, GROUPS, STAGES; 32 rows of W a warp.
            assert len(re.findall(r"\bHMMA\.", code)) == 16 * int(kernel.split()[6]), kernel


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("text_draw")], ids=lambda x: x.name
)
def test_noise_for_every_id_is_not_float64(case):
    """Nor is anything else that the kernel computes for each of 151,680 ids."""
    assert ".f64" not in matrix.compile_case(case, 90).ptx


class Hopper:
    """What Triton asks of its driver before it compiles a launch."""

    def get_current_target(self):
        return matrix.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def test_a_launch_finds_what_was_compiled_before(tmp_path, monkeypatch):
    """`benchmarks.kernel_cache compile` fills Triton's cache for a machine with a GPU."""
    from triton.runtime.driver import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in CASES if case.name == "rms_norm D=1024")
    matrix.compile_case(case, 90, PDL_TRIGGERS["rms_norm"])
    assert len({*tmp_path.rglob("*.cubin")}) == 1
    launched = {"BLOCK_D": 1024, "PDL": int(PDL_TRIGGERS["rms_norm"]), "launch_pdl": True}
    tensors = [torch.bfloat16] * 3
    monkeypatch.setattr(driver, "_active", Hopper())
    for stride, files in ((1024, 1), (1027, 2)):
        # A row that does not begin at a multiple of 16 is another kernel.
        sizes = stride, 1024, 1e-6
        case.kernel.warmup(*tensors, *sizes, **launched, num_warps=case.warps, grid=(1,))
        assert len({*tmp_path.rglob("*.cubin")}) == files


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_kernel_file_is_covered():
    modules = {case.kernel.__module__.rpartition(".")[2] for case in CASES}
    ops = "attention norm patch_embed prefill_attention rope rvq sample_codes sample_text swiglu"
    assert set(ops.split()) <= modules
    assert {"decode_attention", "text_embed", "window_attention", "triton_kernels"} <= modules
