"""The installer's decisions; that it installs is shown by every run of CI, which begins with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import install

ASKED = "torch==2.13.0"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine without a GPU whose pip and uv only write down what they are asked, and what pip would bring."""
    commands: list[str] = []
    brings = ["torch", "sympy"]

    def run(*command: str | Path, check: bool = True) -> int:
        words = [str(part) for part in command]
        commands.append(" ".join(words[1:]))
        if "--report" in words:
            items = [{"metadata": {"name": name}} for name in brings]
            Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": items}))
        return 0

    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install, "pip_version", lambda python: (26, 0))
    versions = iter(["", "2.13.0+cpu"])
    monkeypatch.setattr(install, "torch_version", lambda python: next(versions))
    monkeypatch.setattr(sys, "platform", "linux")
    return commands, brings


def test_pip_installs_torch_where_it_brings_no_gpu_packages(machine):
    commands, _ = machine
    assert install.install_torch(Path("python"), "auto", keep=True) == "2.13.0+cpu"
    assert commands[-1] == f"-m pip install {ASKED}"
    assert not any(" uv " in command for command in commands)


def test_uv_installs_the_cpu_build_where_pip_would_bring_gpu_packages(machine):
    commands, brings = machine
    brings += ["nvidia-cublas", "triton"]
    install.install_torch(Path("python"), "auto", keep=True)
    assert commands[-1] == f"-m uv pip install --python python --torch-backend cpu {ASKED}"


def test_pip_decides_on_a_machine_with_a_gpu(machine, monkeypatch: pytest.MonkeyPatch):
    commands, _ = machine
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    install.install_torch(Path("python"), "auto", keep=True)
    assert commands == [f"-m pip install {ASKED}"]


def test_a_torch_that_is_there_is_kept(machine, monkeypatch: pytest.MonkeyPatch):
    commands, _ = machine
    monkeypatch.setattr(install, "torch_version", lambda python: "2.12.1+rocm7.1")
    assert install.install_torch(Path("python"), "auto", keep=True) == "2.12.1+rocm7.1"
    assert commands == []


def test_skip_needs_a_torch(machine):
    with pytest.raises(SystemExit, match="there is none"):
        install.install_torch(Path("python"), "skip", keep=True)


def test_an_unknown_choice_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CONMOE_TORCH", "gpu")
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    with pytest.raises(SystemExit, match="auto, cpu, cuda, plain, skip, not 'gpu'"):
        install.main(set())
    assert not (tmp_path / "venv").exists()


def test_gpu_packages_are_told_from_their_neighbours():
    names = ["torch", "nvidia-cublas", "nvidia_nccl_cu13", "cuda-toolkit", "triton", "cudagraph", "numpy"]
    report = {"install": [{"metadata": {"name": name}} for name in names]}
    assert install.gpu_packages(report) == ["cuda-toolkit", "nvidia-cublas", "nvidia_nccl_cu13", "triton"]


def test_constraints_hold_the_torch_that_is_there():
    assert install.pin_torch("numpy==2.4.6\ntorch==2.13.0\n", "2.12.1+cpu") == "numpy==2.4.6\ntorch==2.12.1\n"


def test_the_tested_set_names_versions_only():
    lines = [line for line in install.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and "+" not in line and "/" not in line for line in lines)
    assert not install.gpu_packages({"install": [{"metadata": {"name": line.split("==")[0]}} for line in lines]})
