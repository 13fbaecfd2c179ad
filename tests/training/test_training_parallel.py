"""Two processes that train together."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
import torch
from training import parallel

store, place = Path(sys.argv[1]), int(sys.argv[2])
assert (parallel.rank(), parallel.share(5), parallel.seed_of(3)) == (0, 5, 3)
with parallel._group(store, place, 2):
    assert parallel.rank() == place and parallel.share(5) == 3
    assert (parallel.seed_of(3) == 3) == (place == 0)
    leaves = torch.zeros(2, 3), torch.zeros(()), torch.zeros(1)
    leaves[0].grad = torch.full((2, 3), float(place))
    if place:
        leaves[1].grad = torch.tensor(10.0)
    parallel.average_gradients(leaves)
    assert (leaves[0].grad == 0.5).all() and leaves[1].grad == 5 and leaves[2].grad is None
    assert parallel.any_of(place == 1) and not parallel.any_of(False)
    parallel.follow([c := torch.tensor([place + 7.0])])
    assert c == 7 and parallel.agreed(str(place)) == "0"
    made = store.with_name("made")
    with parallel.first():
        assert made.exists() == bool(place)
        made.touch()
"""


def test_gradients_are_averaged_and_the_first_leads(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, place], **options) for place in "01"]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
