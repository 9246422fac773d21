"""What models write, against a loop that asks for one token after the other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.evaluate.generation import _continue
from conmoe.evaluate.health import agreed, distinct, repetition
from conmoe.whole import load_whole
from tests.commands import runner, write_text
from tests.conftest import token_data
from tests.families import save_tiny, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8], [60, 61, 62, 63], [9, 8, 7, 6, 5, 4], [100, 3, 30, 200]]
OPTIONS = conmoe.GenerationOptions(max_new_tokens=20, batch_size=2)


def greedy(folder, prompt, new=20, stop=255):
    """The likeliest token after the other, without a cache, up to the end."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == stop:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_tiny("olmoe", tmp_path_factory.mktemp("models") / "other", seed=1)


def mean(values):
    return sum(values) / len(values)


def test_every_number_is_that_of_a_plain_loop(checkpoint, other):
    found = conmoe.evaluate_generation(other, PROMPTS, against=checkpoint("olmoe"), options=OPTIONS)
    ours, theirs = ([greedy(folder, prompt)[0] for prompt in PROMPTS] for folder in (other, checkpoint("olmoe")))
    for side, texts in (("model", ours), ("source", theirs)):
        assert found[side]["repetition"]["value"] == pytest.approx(mean([repetition(each) for each in texts]))
        assert found[side]["distinct_2"]["value"] == pytest.approx(mean([distinct(each, 2) for each in texts]))
        assert found[side]["length"]["value"] == mean([len(each) for each in texts])
    away = torch.tensor([distinct(a, 1) - distinct(b, 1) for a, b in zip(ours, theirs, strict=True)]).double()
    assert found["difference"]["distinct_1"]["value"] == pytest.approx(float(away.mean()), abs=1e-6)
    assert found["difference"]["distinct_1"]["stderr"] == pytest.approx(float(away.std() / 2), abs=1e-6)
    both = [agreed(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert found["agreement"]["equal_tokens"]["value"] == mean(both)
    assert found["prompts"] == len(PROMPTS)
    json.dumps(found, allow_nan=False)


def test_generations_end_where_the_model_ends_them(checkpoint, tmp_path):
    stop = greedy(checkpoint("olmoe"), PROMPTS[0])[0][3]
    folder = tmp_path / "ends"
    shutil.copytree(checkpoint("olmoe"), folder)
    for name in ("config.json", "generation_config.json"):
        record = json.loads((folder / name).read_text())
        hidden = {"repetition_penalty": 9.0, "do_sample": True} if name == "generation_config.json" else {}
        (folder / name).write_text(json.dumps({**record, **hidden, "eos_token_id": [stop, 254]}))
    found = conmoe.evaluate_generation(folder, PROMPTS, against=checkpoint("olmoe"), options=OPTIONS)
    texts = [greedy(folder, prompt, stop=stop) for prompt in PROMPTS]
    assert found["model"]["ended"]["value"] == mean([ended for _, ended in texts])
    assert found["model"]["length"]["value"] == mean([len(tokens) for tokens, _ in texts])
    assert found["difference"]["length"]["value"] < 0
    assert found["agreement"]["equal_tokens"]["value"] == found["model"]["length"]["value"]
    assert found["agreement"]["identical"]["value"] == 1 - found["model"]["ended"]["value"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_against_itself_writes_the_same(checkpoint, temperature):
    options = conmoe.GenerationOptions(12, temperature, seed=5, batch_size=4)
    state = torch.get_rng_state()
    found = conmoe.evaluate_generation(checkpoint("olmoe"), PROMPTS, against=checkpoint("olmoe"), options=options)
    assert all(each == {"value": 0.0, "stderr": 0.0} for each in found["difference"].values())
    assert found["agreement"]["identical"]["value"] == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_temperature_draws_from_all_tokens(checkpoint):
    """At a high one every token of the vocabulary is as likely as any other."""
    options = conmoe.GenerationOptions(1, 1e6, batch_size=2048)
    written = _continue(load_whole(checkpoint("olmoe")), [[5]] * 2048, options, 254, lambda done: None)
    assert len({each.closed for each in written}) > 250


def test_alone_there_is_nothing_to_differ_from(checkpoint):
    found = conmoe.evaluate_generation(checkpoint("olmoe"), PROMPTS[:1], options=OPTIONS)
    assert (found["source"], found["difference"], found["agreement"]) == (None, None, None)
    assert found["model"]["length"]["stderr"] is None


def test_prompts_are_lines_or_records(tmp_path):
    tokenizer = tiny_tokenizer()
    plain, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\ntwo words\n")
    records.write_text('{"prompt": "one"}\n{"text": "two words"}\n"three"\n')
    read = [tokenizer(text)["input_ids"] for text in ("one", "two words", "three")]
    assert conmoe.read_prompts(plain, tokenizer) == read[:2]
    assert conmoe.read_prompts(records, tokenizer) == read
    breaks = "one\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029two"  # str.splitlines() splits at each
    plain.write_bytes(f"{breaks}\r\n\r\nthree\r\n".encode())
    records.write_bytes((json.dumps({"prompt": breaks}, ensure_ascii=False) + '\r\n"three"').encode())
    assert conmoe.read_prompts(plain, tokenizer) == [tokenizer(text)["input_ids"] for text in (breaks, "three")]
    assert conmoe.read_prompts(records, tokenizer) == conmoe.read_prompts(plain, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    records.write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    assert conmoe.read_prompts(records, tokenizer) == [tokenizer("<user>one")["input_ids"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ('{"question": "?"}\n', "prompt 1 holds no text"), ("{\n", "no JSON")],
)
def test_prompts_that_are_none_are_refused(tmp_path, text, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(conmoe.UsageError, match=message):
        conmoe.read_prompts(file, tiny_tokenizer())
    with pytest.raises(conmoe.UsageError, match="does not exist"):
        conmoe.read_prompts(tmp_path / "nothing", tiny_tokenizer())


def test_prompts_that_do_not_fit_are_refused(checkpoint):
    with pytest.raises(conmoe.UsageError, match="lower --max-new-tokens"):
        conmoe.evaluate_generation(checkpoint("olmoe"), PROMPTS, options=conmoe.GenerationOptions(1000))
    with pytest.raises(conmoe.UsageError, match="beyond the model's vocabulary"):
        conmoe.evaluate_generation(checkpoint("olmoe"), [[300]], options=OPTIONS)


def test_prompts_are_cut_from_the_beginnings_of_text():
    data = token_data(sequences=3, seq_len=24).ids_NS
    assert conmoe.cut_prompts(data, count=2, length=5) == data[:2, :5].tolist()
    assert conmoe.cut_prompts(token_data(9, 24).ids_NS, count=3, length=1) == token_data(9, 24).ids_NS[::3, :1].tolist()
    assert [len(each) for each in conmoe.cut_prompts(data)] == [12, 12, 12]


def test_the_command_line_shows_what_was_written(checkpoint, other, tmp_path, capsys):
    run = runner(capsys)
    asked = ["evaluate", other, "--against", checkpoint("olmoe"), "--no-fidelity", "--generate", "--max-new-tokens", 6]
    text = ["--data", write_text(tmp_path), "--tokens", 256, "--seq-len", 32]
    done = run(*asked, *text, "--json")
    assert (done.code, done.json["generation"]["prompts"]) == (0, 8)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick\nThe slow\n")
    shown = run(*asked, "--prompts", prompts)
    assert "2 prompts, up to 6 new tokens, greedy" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
