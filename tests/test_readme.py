"""What the README shows runs as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path) -> None:
    """Each block in a fresh process, in one folder, as a reader would."""
    assert [kind for kind, _ in BLOCKS].count("sh") >= 2
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for kind, text in BLOCKS:
        command = [sys.executable, "-W", "error", "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for name in (
        "vectors.index",
        "digits.safetensors",
        "images.safetensors",
        "runs/embeddings/curves.png",
        "runs/images/log.csv",
        "codes/part-00000.parquet",
    ):
        assert (tmp_path / name).stat().st_size > 0, name


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|    )make ([\w-]+)", README))))
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", README)) | {"benchmarks.demo"}))
def test_benchmarks_have_help(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    """The main job on digits, at one size and two epochs; a second call goes on from what is there."""
    command = [sys.executable, "-m", "benchmarks.demo", "--bits", "16", "--epochs", "2", "--out", str(tmp_path / "demo")]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        for expected in ("faiss.IndexPQ, 16 bits", "OPQ + faiss.IndexPQ, 16 bits", "exact L2", "HiHPQ, 16 bits", "MAP@100"):
            assert expected in done.stdout
    for name in ("neighbours.png", "results.json", "16bits/curves.png", "16bits/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name


def test_demo_without_labels_says_so(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    command = [sys.executable, "-m", "benchmarks.demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no labels" in done.stderr
    assert "Traceback" not in done.stderr
