"""The hosting service's files: they parse, and its checks are those of .ci/run."""

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
INSTALLED = r"apt-get install [-\w ]*?-qq ([-+\w ]+)"
"""Debian packages of a command line."""


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
    compilers, browser = re.findall(INSTALLED, script)
    assert re.findall(INSTALLED, "\n".join(commands(job, "apt-get"))) == [compilers]
    # The hosting service's machines have those.
    assert browser.split()[-2:] == ["chromium", "npm"]
    # Tests in a browser are not skipped.
    assert "\nexport MIMO_FAST_BROWSER=required\n" in script
    (last,) = [step for step in job["steps"] if step.get("run") == checks[-1]]
    assert last["env"] == {"MIMO_FAST_BROWSER": "required"}
    assert not job.get("continue-on-error")
    assert all("if" not in step and "continue-on-error" not in step for step in job["steps"])


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
