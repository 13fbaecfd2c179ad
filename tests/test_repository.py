"""The hosting service's files: they parse, and its checks are those of .ci/run."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
INSTALLED = r"apt-get install (?:-[-\w]+ )*([-+\w ]+)"
"""Debian packages of a command line."""
BASH = shutil.which("bash")


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def job() -> dict[str, Any]:
    (found,) = parsed(GITHUB / "workflows" / "checks.yml")["jobs"].values()
    return found


def commands(job: dict[str, Any], tool: str) -> list[str]:
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    return [line for line in lines if tool in line]


def test_the_workflow_runs_what_ci_runs(job):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    checks = re.findall(r"(?m)^make .*$", script)
    assert len(checks) == 2
    assert commands(job, "make ") == [*checks, "make dist"]
    wanted = re.findall(r"(?m)^package_of (\S+)", script)
    # The hosting service's machines have the last two.
    compilers = " ".join(wanted[:-2])
    assert wanted[-2:] == ["chromium", "npm"]
    assert re.findall(INSTALLED, "\n".join(commands(job, "apt-get"))) == [compilers]
    # Tests in a browser are not skipped.
    assert "\nexport MIMO_FAST_BROWSER=required\n" in script
    (last,) = [step for step in job["steps"] if step.get("run") == checks[-1]]
    assert last["env"] == {"MIMO_FAST_BROWSER": "required"}
    assert not job.get("continue-on-error")
    assert all("if" not in step and "continue-on-error" not in step for step in job["steps"])


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ((), "g++ g++-aarch64-linux-gnu qemu-user flite chromium npm"),
        # Debian's npm conflicts with the Node.js that another npm came with.
        (("g++", "aarch64-linux-gnu-g++", "qemu-aarch64", "flite", "npm"), "chromium"),
        (("g++", "npm", "google-chrome"), "g++-aarch64-linux-gnu qemu-user flite"),
        (("g++", "aarch64-linux-gnu-g++", "qemu-aarch64", "flite", "npm", "chromium"), ""),
    ],
)
def test_a_fresh_machine_is_given_what_it_lacks(tmp_path, there, asked):
    said = tmp_path / "said"
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "make", *there):
        tool = tools / name
        tool.write_text(f'#!/bin/bash\necho "{name} $*" >> "{said}"\n', encoding="utf-8")
        tool.chmod(0o755)
    (tools / "dirname").symlink_to(shutil.which("dirname"))
    subprocess.run([BASH, ROOT / ".ci" / "run"], env={"PATH": str(tools)}, check=True)
    calls = said.read_text(encoding="utf-8").splitlines()
    installed = re.findall(INSTALLED, "\n".join(calls))
    assert installed == ([asked] if asked else [])
    assert calls[-2:] == ["make -j2 -O test", "make -j2 -O check aarch64"]


def test_the_workflow_runs_on_every_python_that_the_metadata_allows(job):
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least, limit = map(
        int, re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', metadata).groups()
    )
    wanted = [f"3.{minor}" for minor in range(least, limit)]
    assert job["strategy"]["matrix"]["python"] == wanted
    (python,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert python["with"]["python-version"] == "${{ matrix.python }}"


@pytest.mark.parametrize(
    "path", [path for path in FORMS if path.stem != "config"], ids=lambda x: x.stem
)
def test_an_issue_form_is_whole(path):
    form = parsed(path)
    assert {"name", "description", "body"} <= form.keys()
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in asked)
    assert len({field["id"] for field in asked}) == len(asked) > 0
    assert any(field.get("validations", {}).get("required") for field in asked)


def test_the_citation_is_of_this_project_and_of_the_report():
    cited = parsed(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert cited["authors"] == [{"name": "The mimo-fast developers"}]
    assert f'license = "{cited["license"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    # The version has one definition, mimo_fast.__version__.
    assert "version" not in cited
    (report,) = cited["references"]
    assert {"type", "title", "authors", "year"} <= report.keys()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_the_files_that_are_referred_to_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\b(?:docs|tests|\.ci|\.github|mimo_fast|benchmarks)/[\w./-]+\w", text):
        # Results and reports are made.
        if not re.search(r"DATE|demo_output", link):
            assert (ROOT / link).exists(), link
