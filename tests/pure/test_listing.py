"""dfl list: what it prints is kept until a file changes, and then waits for no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfl.cli import listing, main

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = ROOT / "tests" / "outside"
PROGRAM = "import sys; from dfl.cli import main; main(['list']); print('torch' in sys.modules, file=sys.stderr)"


def listed(cache: Path, *packages: Path) -> tuple[str, bool]:
    """What a process of its own prints, and whether it imported torch."""
    path = os.pathsep.join(map(str, (*packages, ROOT)))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": path},
                          capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.strip() == "True"


def test_it_imports_torch_once_and_never_again(tmp_path):
    first, second = listed(tmp_path), listed(tmp_path)
    assert first == (second[0], True) and not second[1]
    assert "  decaf " in first[0] and "partitions:" in first[0]
    text, imported = listed(tmp_path, OUTSIDE)  # what another package adds is not in the kept one
    assert imported and "slow_average" in text and "slow_average" not in first[0]
    assert [path.name for path in tmp_path.rglob("*.*")] == ["list.txt"]


@pytest.mark.parametrize("broken", ["", "something else\nold", None])
def test_a_changed_file_or_a_cache_that_cannot_be_used_costs_time_alone(tmp_path, monkeypatch, capsys, broken):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(listing, "lines", lambda: ["made anew:"])
    path = tmp_path / "dfl" / "list.txt"
    if broken is None:
        (tmp_path / "dfl").write_text("no folder")
    else:
        path.parent.mkdir()
        path.write_text(broken)
    assert main(["list"]) == 0 and capsys.readouterr().out == "made anew:\n"
    if broken is not None:
        assert path.read_text().splitlines() == [listing.digest_of_files(), "made anew:"]
        monkeypatch.setattr(listing, "lines", lambda: ["of a changed file:"])
        assert main(["list"]) == 0 and capsys.readouterr().out == "made anew:\n"
        monkeypatch.setattr(listing, "digest_of_files", lambda: "another")
        assert main(["list"]) == 0 and capsys.readouterr().out == "of a changed file:\n"


def test_names_of_the_literature_are_in_it():
    """Whoever has read of a method finds where it is."""
    text = "\n".join(listing.lines()).lower()
    names = """event-triggered ef-hc zt gt rg sparq eventgrad periodic merge flexatc proxskip nids
        exact_diffusion aug-dgm next extra diging l1 group task_bank orthogonal lossy segments
        gilbert-elliott delay over_the_air differences gradients salf stragglers presence bfloat16 float16
        int8 int4 top_k random_k sign qsgd powergossip choco error_feedback led k-gt d2 qg-dsgdm
        momentum_tracking sgp push-diging noloco diloco relaysgd moshpit dsgd-ac clippedgossip trimmed_mean
        median krum rfa bridge-t sign_flip alie ipm dissensus label_flip nan huge dp-sgd zip-dl masks
        muffliato"""
    missing = [name for name in names.split() if name not in text and name.replace("_", " ") not in text]
    assert not missing
