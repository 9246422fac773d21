"""Calibration text: what a packed sequence is made of, and what bad input gets."""

import gzip
import json
import lzma
from collections import Counter

import pytest
from tokenizers.processors import TemplateProcessing

from conmoe.builtin_text import BUILTIN_NAME, builtin_documents
from conmoe.data import DataSpec, check_tokenizer, load_tokenizer, load_tokens, overlap, parse_spec
from conmoe.documents import PIECE_CHARACTERS, hub_address, read_pieces
from conmoe.types import UsageError
from tests.families import EOS, tiny_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<|end|>{{ '\\n' }}"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()  # one token per byte


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Three hundred documents, each recognisable by its own sign."""
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(story(i) for i in range(300)))
    return path


def story(number):
    return f"Story {number:03}: " + f"{number:03} " * 20


def load(tokenizer, *sources, tokens=640, seq_len=64, **options):
    return load_tokens(tokenizer, [parse_spec(str(s)) for s in sources], tokens=tokens, seq_len=seq_len, **options)


def numbers(tokenizer, data):
    """How often each story's number occurs."""
    text = " ".join(tokenizer.decode(row) for row in data.ids_NS)
    return Counter(word for word in text.split() if word.isdigit() and len(word) == 3)


def write_records(path, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as handle:
        handle.write(lines)
    return path


@pytest.mark.parametrize(("tokens", "seq_len", "sequences"), [(640, 64, 10), (700, 64, 10), (10, 64, 1)])
def test_as_many_full_sequences_as_fit_and_at_least_one(tokenizer, stories, tokens, seq_len, sequences):
    data = load(tokenizer, stories, tokens=tokens, seq_len=seq_len)
    assert data.ids_NS.shape == (sequences, seq_len)
    assert not (data.ids_NS == tokenizer.pad_token_id).any()
    assert data.tokens == sequences * seq_len


def test_documents_are_whole_and_each_is_followed_by_the_end_token(tokenizer, stories):
    data = load(tokenizer, stories)
    documents = tokenizer.decode(data.ids_NS.flatten()).split("<|end|>")
    known = {story(i) + "\n" for i in range(299)} | {story(299)}
    assert set(documents[:-1]) <= known
    assert len(set(documents)) == len(documents)


def test_the_seed_decides_which_documents(tokenizer, stories):
    first, again, other = (load(tokenizer, stories, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert first.documents == again.documents
    assert first.fingerprint != other.fingerprint
    assert overlap(first.documents, again.documents) == 1
    assert overlap(first.documents, other.documents) < 0.5


def test_every_document_of_the_file_has_a_chance(tokenizer, stories):
    seen = Counter()
    for seed in range(60):
        seen.update(int(word) // 100 for word in set(numbers(tokenizer, load(tokenizer, stories, seed=seed))))
    assert all(count > 0.7 * max(seen.values()) for count in seen.values())


def test_text_in_order_is_the_text(tokenizer, stories):
    data = load(tokenizer, stories, tokens=4096, shuffle=False)
    text = stories.read_text().replace("<|endoftext|>\n", "<|end|>")
    assert tokenizer.decode(data.ids_NS.flatten()) == text[: len(tokenizer.decode(data.ids_NS.flatten()))]


def test_a_small_draw_begins_a_large_one(tokenizer, stories):
    small, large = load(tokenizer, stories, tokens=64), load(tokenizer, stories, tokens=64 * 300)
    assert small.ids_NS[0].equal(large.ids_NS[0])


def test_a_long_document_is_drawn_from_all_over(tokenizer, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {number:06}\n" for number in range(20_000)))
    data = load(tokenizer, book, tokens=4 * PIECE_CHARACTERS, seq_len=256)
    lines = [int(word) for word in tokenizer.decode(data.ids_NS.flatten()).split() if word.isdigit()]
    assert max(lines) - min(lines) > 5000
    in_order = load(tokenizer, book, tokens=4 * PIECE_CHARACTERS, seq_len=256, shuffle=False)
    assert tokenizer.decode(in_order.ids_NS.flatten()) == book.read_text()[: 4 * PIECE_CHARACTERS]


def test_pieces_put_together_are_the_document(tmp_path):
    text = (
        "".join(f"word{number} " for number in range(9000)) + "\n" + "x" * 3 * PIECE_CHARACTERS + "\n" + "line\n" * 9000
    )
    (tmp_path / "long.txt").write_text(text)
    write_records(tmp_path / "long.jsonl", [{"text": text}])
    for name in ("long.txt", "long.jsonl"):
        pieces = list(read_pieces(str(tmp_path / name)))
        assert "".join(str(piece.content) for piece in pieces) == text
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("weights", [(1, 1), (0.3, 0.7), (2, 1), (1, 9)])
def test_weights_hold_to_within_one_sequence(tokenizer, tmp_path, weights):
    paths = []
    for letter in "ab":
        paths.append(tmp_path / f"{letter}.txt")
        paths[-1].write_text(letter * 20_000)
    specs = [f"{path}@{weight}" for path, weight in zip(paths, weights, strict=True)]
    data = load(tokenizer, *specs, tokens=64 * 21)
    share = sum(tokenizer.decode(row).count("a") > 0 for row in data.ids_NS)
    assert abs(share - 21 * weights[0] / sum(weights)) < 1
    assert [source.sequences for source in data.sources] == [share, 21 - share]
    assert [source.weight for source in data.sources] == list(weights)


def test_a_source_that_would_give_nothing_is_refused(tokenizer, stories):
    with pytest.raises(UsageError, match=r"stories.txt@0.01 would give none of the 10 sequences"):
        load(tokenizer, f"{stories}@0.01", f"{stories}@1")


def test_too_little_text_says_how_much_there_was(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 3111)
    with pytest.raises(UsageError, match=r"short.txt holds 3,112 tokens, but 16,384 are needed of it .*lower --tokens"):
        load(tokenizer, tmp_path / "short.txt", tokens=16_384)


def test_empty_files_hold_nothing(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("<|endoftext|>\n\n<|endoftext|>\n")
    with pytest.raises(UsageError, match="holds 0 tokens"):
        load(tokenizer, tmp_path / "empty.txt")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.xz", "d.parquet", "d.txt", "d.txt.gz", "d.txt.xz"])
def test_every_format_gives_the_same_tokens(tokenizer, tmp_path, name):
    texts = [f"Text {number} of this file." for number in range(40)]
    path = tmp_path / name
    if name == "d.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"id": list(range(40)), "text": texts})
        parquet.write_table(table, path)
    elif "jsonl" in name:
        write_records(path, [{"text": text} for text in texts])
    else:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wt") as handle:
            handle.write("<|endoftext|>\n".join(text + "\n" for text in texts))
    ids = load(tokenizer, path, tokens=128).ids_NS
    shown = tokenizer.decode(ids.flatten()).replace("\n", "").split("<|end|>")
    assert set(shown[:-1]) <= set(texts)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"content": "abc"}, "abc"),
        ("abc", "abc"),
        ({"prompt": "p", "response": "r"}, "p\nr"),
        ({"prompt": "p", "completion": "c"}, "p\nc"),
        ({"question": "q", "answer": "a"}, "q\na"),
        ({"instruction": "i", "input": "", "output": "o"}, "i\no"),
    ],
)
def test_fields_in_common_use(tmp_path, record, text):
    (piece,) = read_pieces(str(write_records(tmp_path / "d.jsonl", [record])))
    assert piece.content == text


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    ],
)
def test_chats_go_through_the_chat_template(tmp_path, record):
    path = write_records(tmp_path / "chat.jsonl", [record] * 9)
    with_template = tiny_tokenizer()
    with_template.chat_template = CHAT_TEMPLATE
    data = load(with_template, path, tokens=64)
    # The template ends a chat by itself: no second end token.
    assert with_template.decode(data.ids_NS[0]).startswith("<user>Hi<assistant>Ho<|end|>\n<user>")
    with pytest.raises(UsageError, match="no chat template"):
        load(tiny_tokenizer(), path, tokens=64)


def test_a_template_that_refuses_a_chat_is_a_usage_error(tmp_path):
    path = write_records(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="refuses a chat of the data: roles must alternate"):
        load(strict, path)


def test_a_tokenizer_that_begins_documents_itself_gets_no_end_token(stories):
    begins = tiny_tokenizer()
    begins._tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", EOS)])
    text = begins.decode(load(begins, stories).ids_NS.flatten())
    assert text.startswith("<|end|>Story")
    assert "<|end|><|end|>" not in text
    assert text.count("<|end|>") == text.count("Story")


def test_builtin_parts_are_disjoint_and_repeatable(tokenizer):
    calibration, evaluation = (list(builtin_documents(part)) for part in ("calibration", "evaluation"))
    assert calibration == list(builtin_documents("calibration"))
    assert not set(calibration) & set(evaluation)
    share = sum(map(len, evaluation)) / sum(map(len, calibration + evaluation))
    assert 0.03 < share < 0.25
    assert max(map(len, calibration)) <= 40_000
    left, right = (load(tokenizer, tokens=30_000, part=part) for part in ("calibration", "evaluation"))
    assert overlap(right.documents, left.documents) == 0
    assert left.sources[0].source == f"{BUILTIN_NAME}, calibration part"


def test_a_python_without_its_library_asks_for_data(monkeypatch, tmp_path):
    monkeypatch.setattr("conmoe.builtin_text._help_topics", dict)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="pass --data"):
        list(builtin_documents("calibration"))


def test_a_local_data_set_folder_is_read_like_a_hub_one(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write_records(folder / "train.jsonl", [{"text": story(number)} for number in range(30)])
    spec = parse_spec(f"hub:{folder}:train@2")
    assert spec == DataSpec(f"hub:{folder}:train", 2.0)
    data = load_tokens(tokenizer, [spec], tokens=640, seq_len=64)
    assert set(numbers(tokenizer, data)) <= {f"{number:03}" for number in range(30)}
    assert data.fingerprint == load_tokens(tokenizer, [spec], tokens=640, seq_len=64).fingerprint


def test_a_hub_set_that_cannot_be_loaded_is_one_sentence(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"hub:nobody/nothing: cannot be loaded; the hub is in offline mode") as caught:
        load(tokenizer, "hub:nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "address"),
    [
        ("hub:a/b", ("a/b", None, "train")),
        ("hub:a/b:validation", ("a/b", None, "validation")),
        ("hub:a/b:en", ("a/b", "en", "train")),
        ("hub:a/b:en:test", ("a/b", "en", "test")),
        ("hub:a/b::held_out", ("a/b", None, "held_out")),
    ],
)
def test_hub_addresses(spec, address):
    assert hub_address(spec) == address


def test_a_spec_may_carry_a_weight(stories, tmp_path):
    assert parse_spec(str(stories)) == DataSpec(str(stories), 1.0)
    assert parse_spec(f"{stories}@0.3") == DataSpec(str(stories), 0.3)
    odd = tmp_path / "a@2.txt"
    odd.write_text("x")
    assert parse_spec(str(odd)).source == str(odd)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much", ""])
def test_bad_weights(stories, weight):
    with pytest.raises(UsageError, match="weight after @ must be a number above 0"):
        parse_spec(f"{stories}@{weight}")


def test_a_missing_file_names_the_nearest(stories):
    with pytest.raises(UsageError, match=r"no such file; did you mean .*stories\.txt\?"):
        parse_spec(str(stories.with_name("storys.txt")))
    with pytest.raises(UsageError, match=r"no such file\.$"):
        parse_spec(str(stories.parent / "nowhere" / "x.txt"))
    with pytest.raises(UsageError, match="is a folder"):
        parse_spec(str(stories.parent))


def test_unknown_kinds_of_file(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"must end in one of \.txt"):
        parse_spec(str(tmp_path / "data.csv"))
    with pytest.raises(UsageError, match="is written hub:name"):
        parse_spec("hub:a:b:c:d")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', r"d\.jsonl:2 is not JSON"),
        ("d.jsonl", b'{"label": 1}\n', r"d\.jsonl:1 has no text: none of text, .*its fields \(label\)"),
        ("d.jsonl", b"[1]\n", r"d\.jsonl:1 is neither a text nor"),
        ("d.jsonl", b'{"messages": ["Hi"]}\n', r"d\.jsonl:1 holds a chat message without role"),
        ("d.jsonl", b'{"messages": [{"role": "user"}]}\n', r"d\.jsonl:1 holds a chat message without role"),
        ("d.txt", b"caf\xe9", r"d\.txt is not UTF-8 text"),
        ("d.txt.xz", b"not xz at all", r"d\.txt\.xz cannot be read"),
        ("d.txt.xz", lzma.compress(b"x" * 10_000)[:-20], r"d\.txt\.xz cannot be read"),
        ("d.txt.gz", gzip.compress(bytes(range(65, 90)) * 50)[:-20], r"d\.txt\.gz cannot be read"),
        ("d.parquet", b"PAR1 and no more", r"d\.parquet cannot be read as Parquet"),
    ],
)
def test_damaged_files(tokenizer, tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load(tokenizer, tmp_path / name)


def test_tokenizers_that_do_not_fit(tokenizer, stories, tmp_path):
    check_tokenizer(tokenizer, 256)
    with pytest.raises(UsageError, match="does not fit the model: it has 256 tokens, the model's embedding 200"):
        check_tokenizer(tokenizer, 200)
    with pytest.raises(UsageError, match=f"does not fit the model: the text holds token {EOS}"):
        load(tokenizer, stories, vocab_size=EOS)
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_loads(tokenizer, stories, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load(load_tokenizer(tmp_path), stories)
    assert again.fingerprint == load(tokenizer, stories).fingerprint


def test_memory_holds_the_text_wanted_and_not_the_file(tmp_path, tokenizer, monkeypatch):
    path = write_records(tmp_path / "d.jsonl", [{"text": story(number % 300)} for number in range(5000)])
    kept = []
    monkeypatch.setattr("conmoe.data.encode", spy(kept))
    load(tokenizer, path, tokens=640)
    assert sum(kept) <= 2 * 8 * 640


def spy(kept):
    from conmoe.encode import encode

    def watched(tokenizer, pieces, wanted, *, apart):
        kept.append(sum(piece.characters for piece in pieces))
        return encode(tokenizer, pieces, wanted, apart=apart)

    return watched


def test_sizes_must_make_sense(tokenizer, stories):
    with pytest.raises(UsageError, match="At least 1 token"):
        load(tokenizer, stories, tokens=0)


def test_the_rest_of_a_text_is_that_which_was_not_taken(tokenizer, stories):
    taken = load(tokenizer, stories, tokens=64 * 64, seed=3)
    rest = load(tokenizer, stories, tokens=64 * 200, seed=3, without=taken.documents)
    assert overlap(rest.documents, taken.documents) == 0
    seen, other = numbers(tokenizer, taken), numbers(tokenizer, rest)
    whole = [number for number, times in seen.items() if times > 2]  # a sequence may end within a story's first word
    assert whole
    assert not set(whole) & {number for number, times in other.items() if times > 2}
    assert rest.sources[0].source == f"{stories}, calibration part"
    with pytest.raises(UsageError, match="lower --tokens"):
        load(tokenizer, stories, tokens=64 * 600, without=taken.documents)
