"""What the package shows to others: its public names, its version, and files that mean something elsewhere."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from inspect import ismodule
from pathlib import Path

import pytest

import conmoe

ROOT = Path(__file__).parent.parent
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:work|farm|root|opt|tmp|home|Users)/\w")
PRIVATE_INDEX = re.compile(r"(?:index-url|index_url|find-links|find_links)\S*\s*=?\s*[\"']?(?:https?|file):")


def test_every_public_name_is_exported():
    public = {name for name, value in vars(conmoe).items() if not name.startswith("_") and not ismodule(value)}
    public -= {"annotations"}
    assert public <= set(conmoe.__all__), f"not in __all__: {sorted(public - set(conmoe.__all__))}"
    assert len(conmoe.__all__) == len(set(conmoe.__all__))  # their order is held by ruff (RUF022)
    assert all(hasattr(conmoe, name) for name in conmoe.__all__)


@pytest.fixture
def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("conmoe")
    except metadata.PackageNotFoundError:
        pytest.skip("conmoe is imported from its source folder, without being installed")


def test_the_version_is_that_of_the_installed_package(distribution: metadata.Distribution):
    assert conmoe.__version__ == distribution.version


def test_the_command_and_the_vllm_plugin_are_there(distribution: metadata.Distribution):
    points = {point.group: point for point in distribution.entry_points}
    assert points.keys() == {"console_scripts", "vllm.general_plugins"}
    assert all(callable(point.load()) for point in points.values())


def test_no_file_names_a_place_on_somebodys_machine():
    found = [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in committed_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line) or PRIVATE_INDEX.search(line)
    ]
    assert not found, "these mean nothing to anyone else:\n" + "\n".join(found)


def test_markers_are_strict_and_marked_tests_are_asked_for_by_name(pytestconfig: pytest.Config):
    """With strict markers, one that is not registered ends the run; each registered one is off unless asked for."""
    options = pytestconfig.getini("addopts")
    registered = {line.split(":")[0] for line in pytestconfig.getini("markers")} & set(OUR_MARKERS)
    assert "--strict-markers" in options
    assert registered == set(OUR_MARKERS)
    assert options[options.index("-m") + 1] == " and ".join(f"not {name}" for name in OUR_MARKERS)


OUR_MARKERS = ("slow", "gpu", "network", "vllm")


def committed_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    contents = {name: (ROOT / name).read_bytes() for name in names}
    return {name: data.decode(errors="replace") for name, data in contents.items() if b"\0" not in data}
