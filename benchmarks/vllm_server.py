"""Does vLLM's server answer as Transformers does? Run in an environment that has vLLM, conmoe installed beside it.

    python benchmarks/vllm_server.py CHECKPOINT... [--against CHECKPOINT] [--output results.json]
    python benchmarks/vllm_server.py --refused CHECKPOINT... [--output results.json]

For each checkpoint, ``vllm serve`` is started on 127.0.0.1, asked for its models and for greedy completions, one of
them streamed, and stopped. The tokens must be those of Transformers, which runs in a process of its own. A ``shared``
checkpoint is served twice, by remote code without our plugin and by our plugin without remote code, and each time the
log must say that the routing was left to the model (or, for a family in ``UNFUSED``, nothing: all of the layer was).
Any other checkpoint is served by vLLM's own class of its family.

``--against`` compares with the tokens of another checkpoint, for negative controls. ``--refused`` asks for the
opposite: the server must not start, and the log must say in our words why. The exit code is 1 unless all is well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "12 + 30 =",
    "Experts are chosen by a router that",
    "Q: Why is the sky blue?\nA:",
)
NEW_TOKENS = 24
#: model types whose experts vLLM leaves to Transformers, which then routes itself, and why
UNFUSED = {"conmoe_gpt_oss": "experts with biases: vLLM fuses those alone whose parameters are all of three dimensions"}
EXTERNAL, INTERNAL, REFUSAL = "(external routing)", "(internal routing)", "vLLM cannot serve"
#: lines of the log that say what vLLM made of a checkpoint
DECISIVE = re.compile(
    r"routing\)|Resolved architecture|modeling backend|(Value|Runtime|Key|Type|Attribute|Assertion|Validation)Error:"
)
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENGINE = ("--enforce-eager", "--max-model-len", "256", "--no-enable-prefix-caching")
#: how a checkpoint is loaded -> whether remote code may run, the vLLM plugins that may load
ROUTES = {"remote code": (True, ""), "plugin": (False, "conmoe"), "stock": (False, "")}
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 300, 120, 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.tokens_of:
        tokens = decode_transformers(*options.tokens_of, _token_ids(options.checkpoints[0]))
        options.output.write_text(json.dumps(tokens))
        return 0
    rows = []
    for folder in options.checkpoints:
        for route in options.route or routes(folder):
            check = check_refused if options.refused else check_served
            rows.append(check(folder, route, options.against or folder))
            print(_line(rows[-1]), *_why(rows[-1]), sep="\n", flush=True)
    names = ("torch", "transformers", "vllm", "vllm-cpu", "conmoe")
    report = {"versions": {"python": platform.python_version(), **versions(names)}, "rows": rows}
    print("\n" + "\n".join([HEAD, *map(_line, rows)]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def check_served(folder: Path, route: str, against: Path) -> dict[str, Any]:
    """One checkpoint, served one way: the tokens of both engines, and who chose among the experts."""
    row = _row(folder, route)
    prompts = _token_ids(folder)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        try:
            with serving(folder, route, log) as (process, url):
                expected = _in_transformers(against, route, Path(scratch))  # while the server starts
                wait_for_health(process, url)
                listed = [model["id"] for model in request(f"{url}/v1/models")["data"]]
                answers = [complete(url, folder.name, prompt) for prompt in prompts]
                streamed = complete(url, folder.name, prompts[0], stream=True)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            return {**row, **routing(log), "ok": False, "error": str(error), "log": decisive(log)}
        row |= {**routing(log), "log": decisive(log)}
    equal = [_common(a, b) for a, b in zip(answers, expected, strict=True)]
    row |= {
        "equal": sum(equal),
        "total": NEW_TOKENS * len(equal),
        "streamed": streamed == answers[0],
        "listed": listed == [folder.name],
    }
    wanted = "not fused" if row["type"] in UNFUSED else "external"
    routed = route == "stock" or row["routing"] == wanted
    return {**row, "ok": routed and row["listed"] and row["streamed"] and row["equal"] == row["total"]}


def check_refused(folder: Path, route: str, _: Path) -> dict[str, Any]:
    """One checkpoint that vLLM would read wrongly: it must stop before it serves, and say why."""
    row = _row(folder, route)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        try:
            with serving(folder, route, log) as (process, url):
                wait_for_health(process, url)
        except RuntimeError:
            lines = decisive(log)
            row |= {
                "log": lines,
                "refused": next((x.partition("Error: ")[2] for x in lines if f"Error: {REFUSAL}" in x), ""),
            }
            return {**row, "ok": bool(row["refused"])}
        return {**row, **routing(log), "ok": False, "error": "it was served", "log": decisive(log)}


@contextmanager
def serving(
    folder: Path, route: str, log: Path, dtype: str = "float32"
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that is starting, and its address; it and all its processes are gone afterwards."""
    remote_code, plugins = ROUTES[route]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", folder.name]
    command += [*ENGINE, "--dtype", dtype, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--trust-remote-code"] if remote_code else []
    # A module cache of its own, so that remote code is really that of the folder.
    environment = {**os.environ, **SETTINGS, "VLLM_PLUGINS": plugins, "HF_MODULES_CACHE": str(log.parent / "modules")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def wait_for_health(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers; an error if it stops or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server stopped with exit code {process.returncode}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start in {START_SECONDS} seconds")


def complete(url: str, model: str, prompt: list[int], *, stream: bool = False) -> list[int]:
    """The greedy continuation of a prompt, both as token ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0}
    answer = request(f"{url}/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True, "stream": stream})
    parts = answer if stream else [answer]
    return [token for part in parts for choice in part["choices"] for token in choice["token_ids"] or []]


def decode_transformers(folder: str, route: str, prompts: list[list[int]]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    remote_code = ROUTES[route][0]
    if not remote_code:
        import conmoe  # noqa: F401  (teaches the Auto classes our types)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote_code).eval()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def _in_transformers(folder: Path, route: str, scratch: Path) -> list[list[int]]:
    output = scratch / "tokens.json"
    command = [sys.executable, __file__, str(folder), "--tokens-of", str(folder), route, "--output", str(output)]
    environment = {**os.environ, **SETTINGS, "HF_MODULES_CACHE": str(scratch / "reference")}
    tokens: list[list[int]] = answer_of(command, environment, output)
    return tokens


def answer_of(command: list[str], environment: dict[str, str], output: Path) -> Any:
    """The JSON that a process with Transformers leaves in ``output``."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=START_SECONDS)
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise RuntimeError(f"Transformers failed: {why.splitlines()[-1]}")
    return json.loads(output.read_text())


def request(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers with; a list of it where the answer is streamed."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the server answered {error.code}: {error.read().decode()[:300]}") from error
    if body and body["stream"]:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return [json.loads(event) for event in events if event != "[DONE]"]
    return json.loads(text)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait()


def _row(folder: Path, route: str) -> dict[str, Any]:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return {"checkpoint": folder.name, "type": model_type, "route": route}


def routing(log: Path) -> dict[str, str]:
    text = log.read_text(errors="replace")
    if INTERNAL in text:
        return {"routing": "internal"}
    return {"routing": "external" if EXTERNAL in text else "not fused"}


def decisive(log: Path) -> list[str]:
    """The lines of a log that say what became of the checkpoint, each once, without time and process."""
    found = [line for line in log.read_text(errors="replace").splitlines() if DECISIVE.search(line)]
    plain = [re.sub(r"^\(.*?\)\s*|(INFO|WARNING|ERROR) [\d-]+ [\d:]+ |\x1b\[[\d;]*m", "", line) for line in found]
    return list(dict.fromkeys(line.strip() for line in plain))


def routes(folder: Path) -> tuple[str, ...]:
    shared = json.loads((folder / "config.json").read_text())["model_type"].startswith("conmoe_")
    return ("remote code", "plugin") if shared else ("stock",)


def _token_ids(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


HEAD = "| checkpoint | loaded by | routing | equal tokens | streamed | ok |\n|---|---|---|---|---|---|"


def _line(row: dict[str, Any]) -> str:
    routing = "vLLM's own" if row["route"] == "stock" else row.get("routing", "-")
    count = f"{row['equal']} / {row['total']}" if "equal" in row else row.get("refused") or row.get("error", "-")
    streamed = {True: "the same", False: "differs"}.get(row.get("streamed"), "-")  # type: ignore[arg-type]
    cells = (row["checkpoint"], row["route"], routing, count, streamed, "yes" if row["ok"] else "no")
    return f"| {' | '.join(cells)} |"


def _why(row: dict[str, Any]) -> list[str]:
    return [] if row["ok"] else [f"    {line}" for line in row["log"]]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of checkpoints, each with a tokenizer.json")
    parser.add_argument("--route", action="append", choices=ROUTES, help="load them this way only")
    parser.add_argument("--against", type=Path, help="the checkpoint whose tokens Transformers gives")
    parser.add_argument("--refused", action="store_true", help="vLLM must refuse these checkpoints")
    parser.add_argument("--output", type=Path, help="write the results as JSON here")
    parser.add_argument("--tokens-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
