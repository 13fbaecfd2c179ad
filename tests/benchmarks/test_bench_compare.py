"""Two versions timed in turn: what is slower is called slower, what is equal is not, and nothing is
left behind."""

import json
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import compare as module
from benchmarks.compare import CompareError, Side, checked_out, compared, paired_times, run_compare
from benchmarks.records import JsonLines, read_records

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "op": "patch_decoder.swiglu",
    "format": "*",
    "m": [1, 2],
    "quick": False,
    "device": "cpu",
    "threads": 1,
}
CASES = ["patch_decoder.swiglu bfloat16 M=1 F=4096", "patch_decoder.swiglu bfloat16 M=2 F=4096"]


def noisy(pairs: int, ratio: float, seed: int) -> list[tuple[float, float]]:
    """Times that drift together by a factor of two, with spikes on either side."""
    draw = np.random.default_rng(seed)
    drift = np.exp(draw.uniform(0, 0.7, pairs))
    old, new = (drift * np.exp(0.02 * draw.standard_normal(pairs)) for _ in range(2))
    old[draw.random(pairs) < 0.1] *= 5
    new[draw.random(pairs) < 0.1] *= 5
    return [(float(a), float(b * ratio)) for a, b in zip(old, new, strict=True)]


@pytest.mark.parametrize(("ratio", "verdict"), [(1.1, "slower"), (0.9, "faster")])
def test_a_tenth_is_found_under_drift_and_spikes(ratio, verdict):
    found = [compared(noisy(16, ratio, seed)) for seed in range(20)]
    assert [one.verdict for one in found].count(verdict) >= 18
    assert all(one.low <= one.ratio <= one.high for one in found)
    assert np.median([one.ratio for one in found]) == pytest.approx(ratio, rel=0.02)


def test_equal_versions_are_not_called_different():
    verdicts = [compared(noisy(16, 1.0, seed)).verdict for seed in range(200)]
    assert verdicts.count("no difference shown") >= 194


def test_the_ratio_is_new_over_old_and_drift_cancels():
    found = compared([(1.0, 2.0), (10.0, 20.0), (5.0, 10.0)])
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.pairs == 3
    assert compared([(2.0, 1.0)]).verdict == "faster"
    for bad in ([], [(0.0, 1.0)]):
        with pytest.raises(ValueError, match="positive"):
            compared(bad)


def test_the_order_is_abba_and_then_baab(monkeypatch):
    asked: list[tuple[str, str]] = []
    cases = {"old": ["x", "y", "gone"], "new": ["x", "new", "y"]}

    @contextmanager
    def started(side, arguments):
        """Answers with times from a clock that both sides share, and notes who was asked."""

        def answer(request=None):
            if request is None:
                return {"cases": cases[side.name], "missing": {}}
            asked.append((side.name, request["case"]))
            return {"seconds": {"old": 1.0, "new": 1.5}[side.name] + len(asked)}

        yield SimpleNamespace(answer=answer)

    monkeypatch.setattr(module, "started", started)
    old, new = (Side(name, Path(".")) for name in ("old", "new"))
    pairs = paired_times(old, new, {}, rounds=2)
    assert list(pairs) == ["x", "y"]
    for case in pairs:
        order = [name for name, timed in asked if timed == case]
        assert order == ["old", "new", "new", "old", "new", "old", "old", "new"]
    # (old, new), whoever came first.
    assert pairs["x"][:2] == [(2.0, 3.5), (5.0, 4.5)]
    cases["old"] = ["gone"]
    with pytest.raises(CompareError, match="none of the chosen ops in common"):
        paired_times(old, new, {}, rounds=1)


def git(root: Path, *arguments: str) -> str:
    about = ["-c", "user.name=t", "-c", "user.email=t@t", "-C", str(root)]
    return subprocess.run(
        ["git", *about, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository of the package in two commits, the first from before there was a suite; the tree
    is the second."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q")
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(
        ROOT / "mimo_fast",
        root / "mimo_fast",
        ignore=shutil.ignore_patterns("__pycache__", "bench"),
    )
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "before the suite")
    for part in ("benchmarks", "mimo_fast/bench"):
        shutil.copytree(ROOT / part, root / part, ignore=ignored)
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "the suite")
    return root


def slow_down(root: Path, extra: str) -> None:
    """Work that changes nothing, before every SwiGLU in plain torch."""
    path = root / "mimo_fast" / "kernels" / "swiglu.py"
    text, head = path.read_text(), "def swiglu_ref(gate_up: Tensor) -> Tensor:\n"
    assert head in text
    path.write_text(text.replace(head, f"{head}    {extra}\n"))


@pytest.mark.slow
def test_a_slowed_op_is_slower_than_the_commit_before(checkout, tmp_path, capsys):
    slow_down(checkout, "_ = [gate_up.clone().exp() for _ in range(40)]")
    output = tmp_path / "compare.jsonl"
    found = run_compare("HEAD~1", ARGUMENTS, JsonLines(output), rounds=2, seconds=0, root=checkout)
    assert {case: one.verdict for case, one in found.items()} == dict.fromkeys(CASES, "slower")
    records = read_records(output)
    assert [record["case"] for record in records] == CASES
    assert all(record["ratio"] > 2 and len(record["seconds"]) == 4 for record in records)
    assert records[0]["environment"]["dirty"] is True
    assert "slower" in capsys.readouterr().out
    assert git(checkout, "worktree", "list").count("\n") == 0


def test_a_wrong_op_ends_the_comparison(checkout):
    path = checkout / "mimo_fast" / "kernels" / "swiglu.py"
    text = path.read_text()
    broken = text.replace(
        "    if not use_triton(gate_up):\n        return swiglu_ref(gate_up)\n",
        "    if not use_triton(gate_up):\n        return swiglu_ref(gate_up) * 1.1\n",
    )
    assert broken != text
    path.write_text(broken)
    with pytest.raises(CompareError, match=r"swiglu.* is wrong in the working tree: error"):
        run_compare("HEAD", ARGUMENTS, JsonLines(None), rounds=1, seconds=0, root=checkout)
    assert git(checkout, "worktree", "list").count("\n") == 0


@pytest.mark.slow
def test_a_version_that_does_not_fit_is_one_line(checkout):
    path = checkout / "mimo_fast" / "kernels" / "matmul" / "product.py"
    path.write_text("raise ImportError('no products yet')\n")
    with pytest.raises(
        CompareError, match="cannot measure the working tree with this suite: ImportError"
    ) as caught:
        run_compare("HEAD", ARGUMENTS, JsonLines(None), rounds=1, seconds=0, root=checkout)
    assert "\n" not in str(caught.value)


def test_the_worktree_is_gone_after_an_interrupt(checkout):
    trees = []

    def interrupted():
        with checked_out("HEAD~1", checkout) as side:
            trees.append(side.root)
            # Today's suite is laid over a commit that has none.
            assert (side.root / "benchmarks" / "ops.py").exists()
            assert (side.root / "mimo_fast" / "bench" / "timing.py").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not trees[0].exists()
    assert git(checkout, "worktree", "list").count("\n") == 0


def test_an_unknown_commit_is_one_line(checkout, capsys, monkeypatch):
    with (
        pytest.raises(CompareError, match="nothing names no commit"),
        checked_out("nothing", checkout),
    ):
        pass
    with pytest.raises(CompareError, match="names no commit"), checked_out("HEAD", checkout.parent):
        pass

    def refused(reference, arguments, output, **options):
        raise CompareError(f"{reference} names no commit; {json.dumps(arguments)}")

    monkeypatch.setattr(module, "run_compare", refused)
    assert (
        command.main(
            ["--compare", "nothing", "--op", "backbone.swiglu", "--m", "1", "--device", "cpu"]
        )
        == 1
    )
    printed = capsys.readouterr().err
    assert printed.startswith("error: nothing names no commit")
    assert '"m": [1]' in printed
    assert command.main(["--compare", "HEAD", "--op", "backbone.swigl"]) == 2
    assert command.main(["--compare", "HEAD", "--op", "backbone.swiglu", "--rounds", "0"]) == 2
