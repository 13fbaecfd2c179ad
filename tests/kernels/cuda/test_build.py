"""Which architectures an nvcc builds: a stand-in knows some, and compiles C++ by g++."""

import ctypes
import shutil
from pathlib import Path

import pytest

from mimo_fast.kernels.cuda import library as cuda

ROOT = Path(__file__).parents[3]
NVCC = """#!/bin/sh
case "$*" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--list-gpu-code) {listing} ;;
--help) echo "--gpu-code: Allowed values: 'compute_80','sm_75','sm_80','sm_86','sm_90'." ;;
*"-cudart=static"*) for last; do :; done; exec g++ -shared *.o -o "$last" ;;
*) for last; do :; done
   case "$*" in
   *build.cpp*) exec g++ -c -fPIC build.cpp -o "$last" ;;
   *) echo "$*" >> {log}; echo | g++ -x c++ - -c -o "$last" ;;
   esac ;;
esac
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Makes one of a release that lists these architectures, or fails where it has no listing."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    monkeypatch.delenv("MIMO_FAST_CUDA_ARCHITECTURES", raising=False)

    def make(release: str, *listed: str) -> str:
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir()
        listing = f"printf 'sm_%s\\n' {' '.join(listed)}" if listed else "exit 1"
        log = tmp_path / "log"
        path.write_text(NVCC.format(release=release, listing=listing, log=log))
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return str(path)

    return make


def test_an_older_nvcc_builds_what_it_knows_and_info_says_so(nvcc, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = nvcc("12.0", "75", "80", "86", "90")
    import cuda_build
    from ninja_file import NinjaFile

    assert cuda_build.find_nvcc() == path
    choice = cuda_build.choose(path)
    assert choice.architectures == ["80", "90"]
    ninja = NinjaFile(tmp_path / "build")
    cuda_build.add_library(ninja, path, choice, "cuda.so")
    assert ninja.run()
    flags = (tmp_path / "log").read_text().splitlines()
    assert len(flags) == len(list(cuda_build.SOURCES.glob("*.cu")))
    for line in flags:
        assert "arch=compute_80,code=sm_80" in line
        # Later GPUs compile the last one's PTX.
        assert "arch=compute_90,code=compute_90" in line
        assert "100" not in line
    loaded = ctypes.CDLL(str(tmp_path / "build" / "cuda.so"))
    monkeypatch.setattr(cuda, "library", lambda: loaded)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    stated = "built by nvcc 12.0 for sm_80 sm_90"
    for name in ("100", "103", "120"):
        stated += f"; not for sm_{name}: nvcc 12.0 does not compile for it"
    assert cuda.state().endswith(f"; {stated}")


def test_one_without_a_listing_is_asked_for_its_help(nvcc):
    """Before CUDA 11.5."""
    path = nvcc("11.4")
    import cuda_build

    assert cuda_build.choose(path).architectures == ["80", "90"]


def test_a_choice_says_what_it_leaves_out(nvcc, monkeypatch):
    path = nvcc("13.0", "80", "90", "100", "103", "120")
    monkeypatch.setenv("MIMO_FAST_CUDA_ARCHITECTURES", "sm_90 12.0, 86")
    import cuda_build

    choice = cuda_build.choose(path)
    assert choice.architectures == ["90", "120"]
    named = "MIMO_FAST_CUDA_ARCHITECTURES"
    assert choice.left_out == {
        "80": f"{named} leaves it out",
        "100": f"{named} leaves it out",
        "103": f"{named} leaves it out",
        "86": f"{named} takes 80 90 100 103 120",
    }


def test_a_library_of_an_earlier_version_states_nothing():
    assert cuda.build_of(None) == "it does not state for which architectures it was built"
    assert cuda.build_of(ctypes.CDLL(None)) == cuda.build_of(None)
