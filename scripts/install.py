"""Install conmoe into a virtual environment of this folder, with the PyTorch that suits this machine.

    python scripts/install.py [EXTRA ...]

A plain ``pip install torch`` brings several gigabytes of GPU libraries to a Linux machine that has no GPU. Where pip
would do that, the CPU build is taken instead. Nothing happens when nothing changed since the last time.

Environment: ``VENV`` is the folder of the environment (.venv). ``CONMOE_TORCH`` is ``auto``; or ``cpu``, ``cuda`` (the
build for the driver of this machine), ``plain`` (whatever pip takes), ``skip`` (a torch is there and must stay).
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", ROOT / "src/conmoe/__init__.py", CONSTRAINTS, Path(__file__).resolve())
CHOICES = ("auto", "cpu", "cuda", "plain", "skip")
GPU_PACKAGE = re.compile(r"(nvidia|cuda|triton|pytorch[-_]triton)([-_]|$)", re.IGNORECASE)
FRUGAL_PIP = (23, 2)  # from here on a dry run reads metadata; before, it downloads all that it would install


def main(extras: set[str]) -> None:
    choice = os.environ.get("CONMOE_TORCH") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"CONMOE_TORCH takes one of {', '.join(CHOICES)}, not {choice!r}.")
    if sys.version_info < (3, 11):  # noqa: UP036 (one sentence here instead of many from pip)
        raise SystemExit("conmoe needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")
    venv = Path(os.environ.get("VENV") or ROOT / ".venv").absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / "conmoe-install.json"
    usable = python.exists() and run(python, "-c", "", check=False) == 0
    done: dict[str, Any] = json.loads(stamp.read_text()) if usable and stamp.exists() else {}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    if done.get("digest") == digest and choice in ("auto", done["torch"]) and extras <= set(done["extras"]):
        return
    if not usable:
        say(f"making an environment in {venv}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    keep = choice in ("auto", "skip", done.get("torch"))
    torch = install_torch(python, choice, keep)
    extras |= set(done.get("extras", ()))
    install_package(python, torch, extras)
    choice = done.get("torch", choice) if choice == "auto" else choice
    stamp.write_text(json.dumps({"digest": digest, "torch": choice, "extras": sorted(extras)}))


def install_torch(python: Path, choice: str, keep: bool) -> str:
    """The version of the torch that is there afterwards. One that works is kept, unless another was asked for."""
    present = torch_version(python)
    if present and keep:
        say(f"keeping torch {present}")
        return present
    if choice == "skip":
        raise SystemExit("CONMOE_TORCH=skip needs a torch in the environment, and there is none.")
    if present:
        pip(python, "uninstall", "--yes", "torch")
    requirement = next(line for line in CONSTRAINTS.read_text().split() if line.startswith("torch=="))
    backend = {"cpu": "cpu", "cuda": "auto"}.get(choice)
    if choice == "auto" and unwanted_gpu_packages(python, requirement):
        backend = "cpu"
    if not (backend and install_from_torch_index(python, requirement, backend)):
        say(f"installing {requirement} with pip")
        pip(python, "install", requirement)
    installed = torch_version(python)
    if not installed:
        raise SystemExit(f"{requirement} was installed, but `import torch` fails in {python}; its error is above.")
    return installed


def install_package(python: Path, torch: str, extras: set[str]) -> None:
    """conmoe itself, editable, with its tested dependencies, and without touching the torch that is there."""
    target = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    say(f"installing conmoe{target.removeprefix(str(ROOT))} and the tested versions of what it needs")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(pin_torch(CONSTRAINTS.read_text(), torch))
        pip(python, "install", "--constraint", str(constraints), "--editable", target)


def unwanted_gpu_packages(python: Path, requirement: str) -> list[str]:
    """The GPU packages that pip would bring to a Linux machine without a GPU; nothing is installed or downloaded."""
    if sys.platform != "linux" or has_nvidia_gpu():
        return []
    if pip_version(python) < FRUGAL_PIP:
        pip(python, "install", "--upgrade", "pip")
    say(f"asking pip what {requirement} would bring to this machine, which has no GPU")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        ask = ("-m", "pip", "install", "--dry-run", "--quiet", "--report", report, requirement)
        asked = run(python, *ask, check=False)
        return gpu_packages(json.loads(report.read_text())) if asked == 0 else []


def install_from_torch_index(python: Path, requirement: str, backend: str) -> bool:
    """uv knows where PyTorch publishes its builds for each backend; pip would have to be told an address."""
    say(f"installing {requirement} for {'CPU' if backend == 'cpu' else 'the driver of this machine'} with uv")
    uv = ("-m", "uv", "pip", "install", "--python", python, "--torch-backend", backend, requirement)
    installed_uv = run(python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, "uv", check=False) == 0
    if installed_uv and run(python, *uv, check=False) == 0:
        return True
    say(
        "WARNING: that did not work, and pip's own choice follows. On Linux it may bring several gigabytes of GPU "
        "libraries; to avoid that, stop here and see docs/install.md."
    )
    return False


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and run(tool, "-L", check=False) == 0


def gpu_packages(report: dict[str, Any]) -> list[str]:
    """Names of the GPU packages in a report of ``pip install --report``."""
    names = [item["metadata"]["name"] for item in report["install"]]
    return sorted(name for name in names if GPU_PACKAGE.match(name))


def pin_torch(constraints: str, version: str) -> str:
    """The constraints with torch held at ``version``, so that pip keeps the build that is there."""
    return re.sub(r"(?m)^torch==.*$", f"torch=={version.split('+')[0]}", constraints)


def torch_version(python: Path) -> str:
    """The version of the torch that ``python`` can import, or nothing."""
    code = "import importlib.util as u\nif u.find_spec('torch'):\n import torch; print(torch.__version__)"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


def pip_version(python: Path) -> tuple[int, ...]:
    code = "import pip; print(pip.__version__)"
    shown = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", shown)[:2])


def pip(python: Path, *arguments: str) -> None:
    run(python, "-m", "pip", *arguments)


def run(*command: str | Path, check: bool = True) -> int:
    """The exit status; with ``check``, one that is not zero ends the installation with it."""
    status = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL, check=False).returncode
    if check and status != 0:
        say("the installation failed; the reason is above")
        raise SystemExit(status)
    return status


def say(sentence: str) -> None:
    print(f"install: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(set(sys.argv[1:]))
