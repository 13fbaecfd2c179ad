"""Dockerfile, compose.yaml and their workflow, and what their commands do here without Docker.

Not run here: FROM and apt-get, which need an engine and its images. CI builds both images and runs
the one for CPUs (.ci/try-image).
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
from images.dockerfiles import Ignored, Stage, read_dockerfile
from servers import until

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STAGES = {stage.name: stage for stage in read_dockerfile(ROOT / "Dockerfile")}
IMAGES = ("cpu", "gpu")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "images.yml").read_text("utf-8"))
NOBODY = 65534
"""A user who owns nothing."""


def tracked() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if listed.returncode:
        pytest.skip("is no checkout")
    return listed.stdout.split("\n")[:-1]


def installs(stage: Stage) -> list[list[str]]:
    """The words of each `pip install` and `pip wheel`."""
    commands = (part for rest in stage.all("RUN") for part in rest.split("&&"))
    return [shlex.split(part) for part in commands if re.search(r"\bpip (install|wheel) ", part)]


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_begins_with_a_pinned_image(stage):
    name, _, tag = stage.base.partition(":")
    assert name in ("python", "nvidia/cuda")
    assert re.search(r"\d", tag)
    assert "latest" not in tag


def test_the_python_of_the_images_is_one_that_the_package_takes():
    least, limit = map(int, re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    (minor,) = {
        int(re.match(r"python:3\.(\d+)-", stage.base)[1])
        for stage in STAGES.values()
        if stage.base.startswith("python:")
    }
    assert least <= minor < limit
    # What builds the wheel has the Python of what installs it.
    assert STAGES["wheel"].base == STAGES["cpu"].base
    cuda = {STAGES[name].base.partition(":")[2].partition("-")[0] for name in ("cuda-wheel", "gpu")}
    assert len(cuda) == 1


def test_the_images_for_cpus_is_what_a_build_without_a_target_makes():
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_what_is_copied_is_there_and_not_ignored(stage):
    ignored, files = Ignored(ROOT / ".dockerignore"), tracked()
    for sources, _ in stage.copied():
        for source in sources:
            found = [name for name in files if name == source or name.startswith(f"{source}/")]
            assert found, source
            if not found[0].endswith((".pyc", ".so")):
                assert not [name for name in found if ignored(name)]


def test_the_context_holds_nothing_else():
    ignored = Ignored(ROOT / ".dockerignore")
    copied = {
        each for stage in STAGES.values() for sources, _ in stage.copied() for each in sources
    }
    sent = {name.partition("/")[0] for name in tracked() if not ignored(name)}
    assert sent == copied
    assert ignored("mimo_fast/_native.cpython-312-x86_64-linux-gnu.so")
    assert ignored("mimo_fast/cli/__pycache__/main.cpython-312.pyc")
    assert ignored(".git/config")
    assert ignored("training_output/weights.safetensors")


def test_a_wheel_is_built_of_what_is_copied(tmp_path):
    """All that pyproject.toml and setup.py name is among the files of the stage."""
    for name in ("wheel", "cuda-wheel"):
        copied = {each for sources, _ in STAGES[name].copied() for each in sources}
        assert {"pyproject.toml", "setup.py", "csrc", "mimo_fast"} <= copied
        assert PROJECT["project"]["readme"] in copied
        assert "LICENSE" in copied


@pytest.mark.parametrize("image", IMAGES)
def test_versions_are_those_of_the_constraints(image):
    stage = STAGES[image]
    found = installs(stage)
    assert found
    for words in found:
        assert words[words.index("-c") + 1] == "/tmp/constraints.txt"
        assert "--no-cache-dir" in words
    assert (["constraints.txt"], "/tmp/constraints.txt") in stage.copied()
    # torch is a layer of its own, which a change of the package leaves alone.
    assert "torch" in found[0]
    extras = re.search(r"\[([\w,]+)\]$", found[1][-1])[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert "server" in extras
    assert ("cuda" in extras) == (image == "gpu")
    assert any("/whl/cpu" in word for word in found[0]) == (image == "cpu")


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_installs_is_in_this_environment(image):
    """pip finds nothing to do: the versions of the constraints go together."""
    if "+cu" in __import__("torch").__version__ and image == "cpu":
        pytest.skip("this torch has another version")
    words = installs(STAGES[image])[1]
    extras = re.search(r"\[([\w,]+)\]$", words[-1])[1].split(",")
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in extras:
        wanted += PROJECT["project"]["optional-dependencies"][extra]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet"]
    command += ["-c", str(ROOT / "constraints.txt"), "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_no_root_and_keeps_its_files_in_the_volume(image):
    stage = STAGES[image]
    assert int(stage.last("USER")) >= 1000
    names = [name for name, _ in stage.instructions]
    # Nothing is written as the user who serves.
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    (volume,) = stage.all("VOLUME")
    assert stage.environment["HF_HOME"].startswith(f"{volume}/")
    if image == "gpu":
        assert stage.environment["TRITON_CACHE_DIR"].startswith(f"{volume}/")
    assert stage.last("EXPOSE") == stage.environment["MIMO_FAST_PORT"]
    assert stage.command("ENTRYPOINT") + stage.command("CMD") == ["mimo-fast", "serve"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_an_image_with_a_key_on_this_machine_alone(name):
    service = COMPOSE["services"][name]
    assert service["build"]["target"] == name
    assert STAGES[name]
    (port,) = service["ports"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(f":{STAGES[name].environment['MIMO_FAST_PORT']}")
    assert service["environment"]["MIMO_FAST_API_KEY"].startswith("${MIMO_FAST_API_KEY:?")
    (volume,) = service["volumes"]
    assert volume.split(":") == ["weights", STAGES[name].last("VOLUME")]
    assert "weights" in COMPOSE["volumes"]
    # It is stopped after it has drained.
    assert service["stop_grace_period"] == "30s"
    assert service.get("profiles") == (["gpu"] if name == "gpu" else None)


def test_the_variables_of_the_services_are_options():
    from mimo_fast.cli.parser import build_parser

    known = vars(build_parser().parse_args(["serve"]))
    for service in COMPOSE["services"].values():
        for variable in service["environment"]:
            assert variable.removeprefix("MIMO_FAST_").lower() in known, variable
    for image in IMAGES:
        for variable in STAGES[image].environment:
            if variable.startswith("MIMO_FAST_"):
                assert variable.removeprefix("MIMO_FAST_").lower() in known, variable


def test_the_workflow_builds_every_image_and_pushes_tags_alone():
    on = WORKFLOW[True]
    assert on["push"] == {"tags": ["v*"]}
    (job,) = WORKFLOW["jobs"].values()
    assert job["strategy"]["matrix"]["target"] == list(IMAGES)
    for step in job["steps"]:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
        pushes = step.get("with", {}).get("push") or "login" in step.get("uses", "")
        assert bool(pushes) == (step.get("if") == "github.event_name != 'pull_request'")
        assert "continue-on-error" not in step
    (names,) = [step["with"] for step in job["steps"] if step.get("id") == "names"]
    assert names["images"].endswith("-${{ matrix.target }}")
    for path in on["pull_request"]["paths"]:
        assert list(ROOT.glob(path)), path
    copied = {
        each for stage in STAGES.values() for sources, _ in stage.copied() for each in sources
    }
    named = {path.partition("/")[0] for path in on["pull_request"]["paths"]}
    assert copied - {"README.md", "LICENSE", "MANIFEST.in"} <= named
    (script,) = [step["run"].split()[0] for step in job["steps"] if "run" in step]
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("setpriv")),
    reason="becomes another user",
)
def test_the_image_for_cpus_runs_as_a_user_who_may_write_nothing(tmp_path):
    """Entrypoint, health check and stop, as an engine would call them: PID 1 apart."""
    stage = STAGES["cpu"]
    port, key = free_port(), "a-key-of-this-test"
    home, volume = tmp_path / "home", tmp_path / "weights"
    home.mkdir(mode=0o555)
    volume.mkdir()
    os.chown(volume, NOBODY, NOBODY)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    # The variables of the image, with another port, in an environment without any other.
    environment = {
        name: value.replace(stage.last("VOLUME"), str(volume))
        for name, value in stage.environment.items()
    }
    environment |= {"MIMO_FAST_PORT": str(port), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    becoming = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    becoming += ["--no-new-privs", "--inh-caps=-all", "--"]

    def inside(words: list[str], **more: str) -> subprocess.Popen[str]:
        # mimo-fast is a script of the image's environment, python its interpreter.
        known = {"mimo-fast": [sys.executable, "-m", "mimo_fast"], "python": [sys.executable]}
        command = [*becoming, *known[words[0]], *words[1:]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=home, env=environment | more, **pipes)

    entry = stage.command("ENTRYPOINT") + stage.command("CMD")
    # Without a key it says so, and serves nobody.
    refused = inside(entry)
    said = refused.communicate(timeout=120)[0]
    assert refused.returncode == 2
    assert "MIMO_FAST_API_KEY" in said

    check = json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2])
    assert inside(check).wait(60) == 1
    server = inside(entry, MIMO_FAST_API_KEY=key, MIMO_FAST_KEEP_ALIVE="0")
    try:
        until(lambda: inside(check).wait(60) == 0 or server.poll() is not None, 120)
        assert server.poll() is None, server.communicate()[0]
        assert ask(port, key, "/api/ps")["models"]
        said = {"model": "nano", "voice": "alloy", "input": "good morning"}
        assert ask(port, key, "/v1/audio/speech", said)
        # It is freed when it is not used, and checks of health do not load it.
        until(lambda: not ask(port, key, "/api/ps")["models"])
        assert inside(check).wait(60) == 0
        assert not ask(port, key, "/api/ps")["models"]
        assert ask(port, key, "/v1/audio/speech", said)
        server.send_signal(signal.SIGTERM)
        out = server.communicate(timeout=60)[0]
        assert server.returncode == 0
        assert out.endswith("stopped\n")
        assert "Traceback" not in out
        assert inside(check).wait(60) == 1
    finally:
        server.kill()
    assert not list(home.iterdir())


def ask(port, key, path, body=None):
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    asked.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        asked.data = json.dumps(body).encode()
        asked.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(asked, timeout=120) as answer:
        found = answer.read()
    return json.loads(found) if body is None else found
