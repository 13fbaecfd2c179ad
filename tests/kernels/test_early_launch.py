"""The rule of programmatic dependent launch (dispatch.py) in every kernel that takes part."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import refuses

pytest.importorskip("triton", reason="Triton has no build for this platform")

from benchmarks.compile_matrix import cases
from mimo_fast.kernels import dispatch
from mimo_fast.kernels.dispatch import PDL_TRIGGERS, PdlTrigger

KERNELS = {case.kernel.__name__: case.kernel for case in cases() if "PDL" in case.kernel.arg_names}

AHEAD = {
    "rms_norm_kernel": {"weight_ptr"},
    "rotary_attention_kernel": {"cos_ptr", "sin_ptr"},
    "small_decode_kernel": {"cos_ptr", "sin_ptr", "slots_ptr", "starts_ptr"},
    "head_logits_kernel": {"heads_ptr"},
    "code_step_kernel": {"heads_ptr"},
    "dense_gemv_kernel": {"w_ptr"},
}
"""What a kernel may name before it waits: weights and tables, and what its caller says is fixed."""

DECODED = {
    f"{name}_kernel"
    for name in (
        *("code_step", "dense_embed", "dense_gemv", "head_logits", "merge_splits", "patch_embed"),
        *("patch_noise", "quantized_embed", "rms_norm", "rotary_attention", "small_decode"),
        *("split_attention", "take_settings", "text_check", "text_digit", "text_draw"),
        "text_settle",
    )
}
"""Kernels of a group that are launched early."""


def body_of(kernel: Any) -> list[ast.stmt]:
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    return function.body


def names_in(tree: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(tree) if isinstance(name, ast.Name)}


def paths(body: list[ast.stmt]) -> Iterator[tuple[dict[str, bool], list[ast.stmt]]]:
    """The statements of a program in order, for each choice of its top-level flags."""
    tests = [x.test for x in body if isinstance(x, ast.If)]
    flags = sorted({flag for test in tests for flag in names_in(test) if flag.isupper()})
    for values in product((False, True), repeat=len(flags)):
        chosen = dict(zip(flags, values, strict=True))
        yield chosen, list(flattened(body, chosen))


def flattened(body: list[ast.stmt], flags: dict[str, bool]) -> Iterator[ast.stmt]:
    for statement in body:
        names = names_in(getattr(statement, "test", statement))
        if isinstance(statement, ast.If) and names <= flags.keys():
            expression = compile(ast.Expression(statement.test), "<flags>", "eval")
            yield from statement.body if eval(expression, dict(flags)) else statement.orelse
        else:
            yield statement


def called(statement: ast.stmt) -> str:
    """The function that a statement calls with PDL, alone."""
    text = ast.unparse(statement)
    return text.removesuffix("(PDL)") if text.endswith("(PDL)") else ""


def follows_the_rule(name: str, body: list[ast.stmt]) -> None:
    for flags, statements in paths(body):
        calls = [called(statement) for statement in statements]
        assert calls[0] == "pdl_trigger", f"{name} triggers late"
        assert calls.count("pdl_wait") == 1, f"{name} does not wait where {flags}"
        waits = calls.index("pdl_wait")
        assert "pdl_trigger_last" not in calls[:waits], f"{name} triggers before it waits"
        before = statements[:waits]
        for node in (node for statement in before for node in ast.walk(statement)):
            assert not isinstance(node, ast.Return | ast.While | ast.For), f"{name} {node.lineno}"
            if isinstance(node, ast.Name) and node.id.endswith("_ptr"):
                assert node.id in AHEAD.get(name, ()), f"{name} has {node.id} before it waits"
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith(("store", "atomic")), f"{name} writes too early"


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_path_waits_before_it_reads_or_writes(name):
    follows_the_rule(name, body_of(KERNELS[name]))


def test_all_kernels_of_a_group_take_part():
    assert KERNELS.keys() == DECODED
    assert {f"{name}_kernel" for name in PDL_TRIGGERS} == DECODED


@pytest.mark.parametrize(
    "body",
    [
        "pdl_trigger(PDL)\nx = tl.load(x_ptr)\npdl_wait(PDL)",
        "pdl_trigger(PDL)\nif FLAG:\n    pdl_wait(PDL)\nx = tl.load(x_ptr)",
        "pdl_trigger(PDL)\nif i_row > 0:\n    pdl_wait(PDL)",
        "pdl_trigger(PDL)\nif i_row > 0:\n    return\npdl_wait(PDL)",
        "pdl_wait(PDL)\npdl_trigger(PDL)",
        "pdl_trigger(PDL)\npdl_trigger_last(PDL)\npdl_wait(PDL)",
    ],
)
def test_what_breaks_the_rule_is_found(body):
    with pytest.raises(AssertionError):
        follows_the_rule("broken_kernel", ast.parse(body).body)


@pytest.mark.parametrize(
    ("major", "hip", "known", "switch", "trigger"),
    [
        (9, None, True, None, PDL_TRIGGERS["rms_norm"]),
        (12, None, True, "1", PdlTrigger.FIRST),
        (9, None, True, "waited", PdlTrigger.WAITED),
        (9, None, True, "first,rms_norm=none", PdlTrigger.NONE),
        (9, None, True, "merge_splits=last,rms_norm=last", PdlTrigger.LAST),
        (9, None, True, "1,rms_norm=lets", PdlTrigger.LETS),
        (9, None, True, "none,merge_splits=0", PdlTrigger.NONE),
        (9, None, True, "0", PdlTrigger.OFF),
        (8, None, True, "1", PdlTrigger.OFF),
        (9, "7.0", True, "1", PdlTrigger.OFF),
        (9, None, False, "1", PdlTrigger.OFF),
    ],
)
def test_where_kernels_are_launched_early(monkeypatch, major, hip, known, switch, trigger):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(dispatch, "HAS_PDL", known)
    monkeypatch.delenv(dispatch.PDL_ENVIRONMENT, raising=False)
    if switch is not None:
        monkeypatch.setenv(dispatch.PDL_ENVIRONMENT, switch)
    dispatch._supports_pdl.cache_clear()
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    waits = trigger not in (PdlTrigger.OFF, PdlTrigger.LETS)
    expected = {"PDL": int(trigger)} | ({"launch_pdl": True} if waits else {})
    assert dispatch.early_launch(x, "rms_norm") == expected
    dispatch._supports_pdl.cache_clear()


def test_never_on_a_cpu():
    assert dispatch.early_launch(torch.zeros(1), "rms_norm") == {"PDL": 0}


@pytest.mark.parametrize("switch", ["2", "rms_norm", "rms=first", "first,", "rms_norm=begin"])
def test_a_switch_that_says_nothing_is_refused(switch):
    refuses(dispatch.PDL_ENVIRONMENT, dispatch._trigger_of, "rms_norm", switch)
