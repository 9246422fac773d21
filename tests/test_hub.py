"""Pushing: what arrives at a stand-in for the hub is what lies in the folder; what is refused, and before what.

huggingface_hub reads the endpoint from the environment when it is imported, so here it is put in its place; one test
runs a process of its own, as a user would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from conmoe.manifest import check_files, read_result_manifest
from tests.commands import Outcome, Run, runner, tree, write_text
from tests.conftest import measured_half
from tests.hub import TOKEN, Hub, serving

REPO = "someone/half"
STRAYS = ("conmoe/notes.txt", "stray.safetensors", "link.json")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


class Cli:
    """The command line in this process, which believes that the stand-in is the hub."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.monkeypatch = run, monkeypatch

    def __call__(self, *arguments: object, token: str | None = TOKEN) -> Outcome:
        self.monkeypatch.setenv("HF_TOKEN", token or "")
        return self.run(*arguments)


@pytest.fixture
def cli(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return Cli(runner(capsys), monkeypatch)


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured result; copied by each test that changes it."""
    folder = tmp_path_factory.mktemp("made")
    model = folder / "source"
    shutil.copytree(checkpoint("olmoe"), model)
    (model / "LICENSE").write_text("as you like")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n- no\n---\n# A model\n")
    return measured_half(model, folder)


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "half"))


def pushable(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != ".conmoe"}


def evaluation(folder: Path, file: Path, **changes: object) -> Path:
    fidelity = json.loads((folder / "conmoe" / "results.json").read_text())["fidelity"]
    theirs = folder.parent / "somebody"  # an absolute path, as a command on their machine would leave it
    record = {"model": str(folder), "against": str(theirs / "source"), "data": [str(theirs / "held.txt")], **fidelity}
    file.write_text(json.dumps({**record, **changes}))
    return file


def one_sentence(done: Outcome, code: int) -> str:
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert done.code == code, done.err
    assert len(errors) == 1, done.err
    assert "Traceback" not in done.err
    return errors[0]


def test_what_arrives_is_what_lies_there_and_a_second_push_sends_nothing(hub, cli, result):
    (result / "conmoe" / "notes.txt").write_text("to myself")
    (result / "stray.safetensors").write_bytes(b"stray")
    (result / "link.json").symlink_to("/etc/hostname")
    done = cli("push", result, REPO, "--private", "--message", "first")
    assert done.code == 0, done.err
    for stray in STRAYS:
        assert f"Left out: {stray}" in done.err
    own = {name: data for name, data in pushable(result).items() if name not in STRAYS}
    assert hub.files(REPO) == own
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].messages == ["first"]
    assert "model.safetensors" in own
    assert "LICENSE" in own
    sent = list(hub.uploaded)
    assert sent
    again = cli("push", result, REPO)
    assert again.code == 0, again.err
    assert hub.uploaded == sent
    assert hub.repositories[REPO].messages == ["first"]  # no empty commit
    assert hub.files(REPO) == own
    check_files(result)  # what the push wrote into the folder is in its manifest


def test_a_process_of_its_own_pushes_to_the_endpoint_of_its_environment(hub, result, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "conmoe", "push", str(result), REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.files(REPO) == pushable(result)


def test_an_interrupted_push_does_not_send_again_what_arrived(hub, cli, result):
    hub.fail = {f"POST /api/models/{REPO}/commit": 500}
    assert "the hub answered 500" in one_sentence(cli("push", result, REPO), 1)
    sent = list(hub.uploaded)
    assert sent
    hub.fail = {}
    assert cli("push", result, REPO).code == 0
    assert hub.uploaded == sent
    assert hub.files(REPO) == pushable(result)


def test_a_dry_run_asks_nobody_and_changes_nothing(hub, cli, result, tmp_path):
    before = tree(result)
    numbers = evaluation(result, tmp_path / "more.json")
    done = cli("push", result, REPO, "--dry-run", "--results", numbers, token=None)
    assert done.code == 0, done.err
    assert hub.requests == []
    assert tree(result) == before
    for name in pushable(result):
        assert name in done.out
    assert "conmoe/evaluations/more.json" in done.out
    assert "### Evaluation: more" in done.out


def test_what_is_refused_is_refused_in_one_sentence_before_anything_is_sent(hub, cli, result, tmp_path):
    assert "logged in" in one_sentence(cli("push", result, REPO, token=None), 2)
    assert "cannot be a repository" in one_sentence(cli("push", result, "some one/half"), 2)
    assert hub.requests == []
    assert "does not know this token" in one_sentence(cli("push", result, REPO, token="hf_wrong"), 1)
    assert "hf_wrong" not in cli("push", result, REPO, "--token", "hf_wrong", token=None).err
    assert "leave out --revision" in one_sentence(cli("push", result, REPO, "--create-pr", "--revision", "x"), 2)
    shutil.copytree(result, tmp_path / "half.partial")
    assert "not finished" in one_sentence(cli("push", tmp_path / "half.partial", REPO), 2)
    assert "about another" in one_sentence(
        cli("push", result, REPO, "--results", evaluation(result, tmp_path / "a.json", bytes=7)), 2
    )
    weights = result / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors was altered" in one_sentence(cli("push", result, REPO), 1)
    assert not hub.repositories
    assert not hub.uploaded


def test_a_server_that_fails_gives_one_sentence(hub, cli, result):
    hub.fail = {"POST /api/repos/create": 500}
    assert "the hub answered 500" in one_sentence(cli("push", result, REPO), 1)
    hub.fail = {"POST /api/repos/create": 403}
    assert "may not write" in one_sentence(cli("push", result, REPO), 1)
    hub.fail = {}
    card = result / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: no-such-licence"))
    assert '"license" must be one of' in one_sentence(cli("push", result, REPO), 1)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, cli, result):
    assert cli("push", result, REPO).code == 0
    assert not hub.repositories[REPO].private
    assert "public" in one_sentence(cli("push", result, REPO, "--private"), 2)


def test_branches_and_pull_requests(hub, cli, result):
    done = cli("push", result, REPO, "--revision", "try", "--json")
    assert done.code == 0, done.err
    assert hub.files(REPO, "try") == pushable(result)
    assert hub.files(REPO) == {}
    assert json.loads(done.out)["repo"] == REPO
    done = cli("push", result, REPO, "--create-pr", "--base-model", "someone/whole")
    assert "/discussions/1" in done.err
    assert ModelCard(hub.files(REPO, "refs/pr/1")["README.md"].decode()).data["base_model"] == "someone/whole"
    assert hub.files(REPO) == {}


def test_evaluations_go_into_the_card_and_stay_with_the_result(hub, cli, result, tmp_path):
    task = {"acc": {"value": 0.5, "stderr": 0.1, "n": 25, "higher_is_better": True, "source": None, "difference": None}}
    numbers = evaluation(result, tmp_path / "more.json", tasks={"arc_easy": task})
    assert cli("push", result, REPO, "--results", numbers).code == 0
    assert hub.files(REPO) == pushable(result)
    stored = json.loads(hub.files(REPO)["conmoe/evaluations/more.json"])
    assert (stored["model"], stored["against"]) == ("half", "source")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    (found,) = [each for each in card.data["eval_results"] if each.metric_type == "acc"]
    assert (found.metric_value, found.metric_args["stderr"], found.dataset_name) == (0.5, 0.1, "arc_easy")
    assert cli("push", result, REPO).code == 0  # without --results: the card keeps them
    assert hub.files(REPO)["README.md"].decode() == (result / "README.md").read_text()
    assert "### Evaluation: more" in (result / "README.md").read_text()
    check_files(result)


def test_a_card_in_other_letters_is_refused_and_left_alone(hub, cli, result):
    card = (
        (result / "README.md")
        .read_text()
        .replace("## Licence", "By Andr\u00e9\n\n## Licence")
        .encode("latin-1", "replace")
    )
    (result / "README.md").write_bytes(card)
    assert "README.md is not in UTF-8" in one_sentence(cli("push", result, REPO), 1)
    assert (result / "README.md").read_bytes() == card
    assert not hub.repositories


def test_the_code_of_a_pushed_card_names_its_repository(hub, cli, result):
    assert cli("push", result, REPO).code == 0
    (code,) = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert f'name = "{REPO}"' in code
    compile(code, "README.md", "exec")


def test_an_evaluation_tells_no_folder_wherever_it_names_one(hub, cli, result, tmp_path):
    theirs = str(tmp_path / "somebody" / "held.txt")
    more = {"domains": {"wiki": {"data": [theirs]}}, "generation": {"prompts_from": theirs}}
    assert cli("push", result, REPO, "--results", evaluation(result, tmp_path / "more.json", **more)).code == 0
    sent = hub.files(REPO)["conmoe/evaluations/more.json"].decode()
    assert str(tmp_path) not in sent
    assert sent.count('"held.txt"') == 3


def test_an_evaluation_of_another_model_of_the_same_size_is_refused(hub, cli, result, checkpoint, tmp_path):
    other = Path(shutil.copytree(result, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for folder, code in ((other, 2), (result, 0)):
        measured, text = tmp_path / f"{folder.name}.json", write_text(tmp_path)
        assert cli("evaluate", folder, "--data", text, "--tokens", 512, "--seq-len", 64, "--output", measured).code == 0
        assert cli("push", result, REPO, "--results", measured).code == code


def test_a_report_that_was_added_later_stays_behind(hub, cli, result):
    (result / "conmoe" / "report.html").unlink(missing_ok=True)
    made = read_result_manifest(result)
    rest = tuple(record for record in made.files if record.path != "conmoe/report.html")
    (result / "conmoe" / "manifest.json").write_text(made.model_copy(update={"files": rest}).model_dump_json())
    (result / "conmoe" / "report.html").write_text("<html>")
    assert cli("push", result, REPO).code == 0
    assert "conmoe/report.html" not in hub.files(REPO)
    listed = json.loads(hub.files(REPO)["conmoe/manifest.json"])["files"]
    assert {record["path"] for record in listed} < hub.files(REPO).keys()


def test_compress_asks_before_it_works_and_keeps_what_it_could_not_push(hub, cli, checkpoint, tmp_path):
    text = write_text(tmp_path)
    small = ("--tokens", 256, "--seq-len", 32, "--eval-tokens", 64, "--sample", 64, "--refine", "none", "--keep", 0.5)
    out = tmp_path / "half"
    arguments = ("compress", checkpoint("olmoe"), out, "--data", text, "--eval-data", text, *small)
    assert "logged in" in one_sentence(cli(*arguments, "--push-to", REPO, token=None), 2)
    assert "cannot be a repository" in one_sentence(cli(*arguments, "--push-to", "a/b/c"), 2)
    assert not list(tmp_path.glob("half*"))
    hub.fail = {"POST /api/repos/create": 403}
    said = one_sentence(cli(*arguments, "--push-to", REPO, "--private"), 1)
    assert said.endswith(f"conmoe push {out} {REPO} --private")
    check_files(out)
    hub.fail = {}
    assert cli("push", out, REPO, "--private").code == 0
    assert hub.files(REPO) == pushable(out)
