"""calibration.py, textsource.py, textfiles.py: rows are honest slices of text, and every refusal says why."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compress import assets, textfiles, textsource
from compress.calibration import calibration_rows, evaluation_tokens
from compress.errors import CompressError

WORDS = ["weight", "scale", "group", "grid", "round", "block", "layer", "token", "outlier", "sparse", "rank"]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def prose(words: int, seed: int = 0) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) + str(pick.randrange(1000)) for _ in range(words))


def make_tokenizer(bos: bool = False, eos: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained in a moment; a short model_max_length, which must neither cut nor warn."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([prose(300)], trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    made = make_tokenizer(bos=True, adds_bos=True)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def calib(tmp_path, monkeypatch):
    """A folder calib/ with the real recipes and texts of our own."""
    folder = tmp_path / "calib"
    (folder / "text").mkdir(parents=True)
    for recipe in assets.folder("calib").glob("*.toml"):
        (folder / recipe.name).write_bytes(recipe.read_bytes())
    (folder / "text" / "calibration.txt").write_text(prose(600, 1))
    (folder / "text" / "heldout.txt").write_text(prose(200, 2))
    monkeypatch.setattr(assets, "folder", lambda name: folder)
    return folder


def jsonl(path: Path, documents, column: str = "text") -> str:
    path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in documents))
    return str(path)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def starts_of(rows: torch.Tensor, ids: list[int]) -> list[int]:
    """Where each row begins in the text; fails when one is not a slice of it."""
    text = torch.tensor(ids).unfold(0, rows.shape[1], 1)
    starts = [(text == row).all(1).nonzero().flatten().tolist() for row in rows]
    assert all(starts), "a row is not a contiguous slice of the text"
    return [found[0] for found in starts]


def refused(*says: str):
    """The CompressError whose one line holds all of `says`."""
    return pytest.raises(CompressError, match="".join(f"(?=.*{re.escape(part)})" for part in says))


# --- one long text


@pytest.mark.parametrize("spare", [0, 1, 700])
def test_joined_rows_are_distinct_ordered_slices(tmp_path, tokenizer, spare):
    text = prose(400)
    ids = ids_of(tokenizer, text)
    seq_len = 32
    samples = (len(ids) - spare) // seq_len
    path = tmp_path / "a.txt"
    path.write_text(text)
    rows = calibration_rows(str(path), tokenizer, samples=samples, seq_len=seq_len)
    assert rows.tokens.shape == (samples, seq_len)
    assert rows.tokens.dtype == torch.int64
    starts = starts_of(rows.tokens, ids)
    assert all(b - a >= seq_len for a, b in pairwise(starts))
    assert rows.source == str(path)


def test_seed_decides_the_rows_and_the_hash(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(400))
    source = jsonl(tmp_path / "b.jsonl", [prose(60, i) for i in range(30)])
    for name in (str(path), source):
        first, again, other = (
            calibration_rows(name, tokenizer, samples=8, seq_len=40, seed=seed) for seed in (3, 3, 4)
        )
        assert torch.equal(first.tokens, again.tokens)
        assert first.sha256 == again.sha256 != other.sha256
        assert not torch.equal(first.tokens, other.tokens)
        assert first.sha256 == hashlib.sha256(first.tokens.numpy().astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(("samples", "part"), [(2, 0.9), (7, 0.5), (7, 0.99), (16, 0.6)])
def test_short_text_overlaps_evenly_and_says_so(tmp_path, tokenizer, samples, part):
    text = prose(300)
    ids = ids_of(tokenizer, text)
    seq_len = int(len(ids) / samples / part)
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert samples * seq_len / 2 <= len(ids) < samples * seq_len
    rows = calibration_rows(str(path), tokenizer, samples=samples, seq_len=seq_len)
    starts = starts_of(rows.tokens, ids)
    assert starts[0] == 0
    assert starts[-1] == len(ids) - seq_len
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) - min(gaps) <= 1
    assert 0 < min(gaps) <= max(gaps) <= seq_len
    shared = re.search(r"share (\d+)%", rows.notes[0])
    assert abs(int(shared[1]) / 100 - (1 - sum(gaps) / len(gaps) / seq_len)) < 0.01


@pytest.mark.parametrize(("samples", "seq_len"), [(100, 1000), (1, 3000), (2, 1500), (300, 16), (10**6, 64)])
def test_too_short_text_proposes_what_fits(tmp_path, tokenizer, samples, seq_len):
    path = tmp_path / "a.txt"
    path.write_text(prose(300))
    total = len(ids_of(tokenizer, prose(300)))
    with refused(str(path), f"{total} tokens", f"need {samples * seq_len}", "--calib bundled") as caught:
        calibration_rows(str(path), tokenizer, samples=samples, seq_len=seq_len)
    for option, number in re.findall(r"--(samples|seq-len) (\d+)", caught.value.remedy):
        proposed = {"samples": samples, "seq_len": seq_len, option.replace("-", "_"): int(number)}
        assert calibration_rows(str(path), tokenizer, **proposed).tokens.shape[1] == proposed["seq_len"]


def test_one_text_exactly_two_rows_apart_is_not_the_same_row_twice(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(100))
    total = len(ids_of(tokenizer, prose(100)))
    with refused("--samples 1"):
        calibration_rows(str(path), tokenizer, samples=2, seq_len=total)
    assert calibration_rows(str(path), tokenizer, samples=1, seq_len=total).tokens.shape == (1, total)


def test_bos_policy_is_what_the_tokenizer_did(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(prose(200))
    for made, said in (
        (tokenizer, "no BOS: the tokenizer has none"),
        (make_tokenizer(bos=True), "no BOS: the tokenizer does not add its <s>"),
        (make_tokenizer(bos=True, adds_bos=True), "one BOS (<s>) at the start of the text"),
    ):
        rows = calibration_rows(str(path), made, samples=2, seq_len=50)
        assert said in rows.notes
        text = evaluation_tokens(str(path), made)
        assert text.bos == said
        assert text.tokens.tolist().count(0) == said.startswith("one")
    documents = jsonl(tmp_path / "b.jsonl", [prose(50), prose(60)])
    made = make_tokenizer(bos=True, adds_bos=True)
    assert (
        "one BOS (<s>) at the start of each document" in calibration_rows(documents, made, samples=2, seq_len=20).notes
    )


# --- documents


def test_long_documents_give_one_crop_each(tmp_path, tokenizer):
    texts = [prose(30 + 40 * (i % 3), i) for i in range(24)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    long = [ids for ids in (ids_of(tokenizer, text) for text in texts) if len(ids) >= 200]
    rows = calibration_rows(source, tokenizer, samples=len(long), seq_len=200)
    owners = [[i for i, ids in enumerate(long) if str(row)[1:-1] in str(ids)[1:-1]] for row in rows.tokens.tolist()]
    assert sorted(owner for (owner,) in owners) == list(range(len(long)))
    assert owners != sorted(owners), "the seed shuffles the documents"


def test_crops_start_anywhere(tmp_path, tokenizer):
    text = prose(60)
    ids = ids_of(tokenizer, text)
    rows = calibration_rows(jsonl(tmp_path / "a.jsonl", [text] * 60), tokenizer, samples=60, seq_len=len(ids) - 3)
    assert set(starts_of(rows.tokens, ids)) == {0, 1, 2, 3}


def test_short_documents_are_packed_with_eos_between(tmp_path, tokenizer):
    texts = [prose(10, i) for i in range(40)] + [prose(200, 99)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    rows = calibration_rows(source, tokenizer, samples=5, seq_len=100)
    long = ids_of(tokenizer, texts[-1])
    starts_of(rows.tokens[:1], long)
    stream = rows.tokens[1:].flatten().tolist()
    documents = [ids_of(tokenizer, text) for text in texts[:-1]]
    pieces = "".join(chr(i) for i in stream).split(chr(tokenizer.eos_token_id))
    assert len(pieces) > 4
    for piece in pieces[:-1]:
        assert [ord(c) for c in piece] in documents
    assert "4 rows are shorter documents packed with EOS (</s>) between" in rows.notes[0]
    bare = calibration_rows(source, make_tokenizer(eos=False), samples=5, seq_len=100)
    assert "packed with nothing between" in bare.notes[0]


def test_too_few_documents_propose_what_fits(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [prose(10, i) for i in range(30)] + [prose(300, 99)])
    with refused("in 31 documents, 1 of them", "--samples", "--seq-len", "--calib bundled") as caught:
        calibration_rows(source, tokenizer, samples=20, seq_len=256)
    for option, number in re.findall(r"--(samples|seq-len) (\d+)", caught.value.remedy):
        proposed = {"samples": 20, "seq_len": 256, option.replace("-", "_"): int(number)}
        rows = calibration_rows(source, tokenizer, **proposed)
        assert rows.tokens.shape == (proposed["samples"], proposed["seq_len"])


def test_no_more_documents_are_tokenised_than_needed(tmp_path, tokenizer, monkeypatch):
    long = jsonl(tmp_path / "long.jsonl", [prose(30, i) for i in range(300)])
    assert "(4 documents looked at)" in calibration_rows(long, tokenizer, samples=4, seq_len=16).notes[0]
    monkeypatch.setattr("compress.calibration.SCAN", 0)
    rows = calibration_rows(long, tokenizer, samples=2, seq_len=500)  # none is long enough
    assert int(re.search(r"\((\d+) documents", rows.notes[0])[1]) < 50


def test_empty_documents_are_counted(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [None, "", "  \n", prose(50), prose(50)])
    total = 2 * len(ids_of(tokenizer, prose(50)))
    rows = calibration_rows(source, tokenizer, samples=1, seq_len=total)  # both, so all are looked at
    assert rows.notes[-2:] == ("2 documents skipped: empty", "1 documents skipped: no value")


# --- chats


CHAT = [{"role": "user", "content": "how " + prose(20)}, {"role": "assistant", "content": prose(40)}]


def test_chats_are_rendered_by_the_template(tmp_path, chat_tokenizer):
    for column in ("messages", "conversations", "dialogue"):
        named = column if column == "dialogue" else None
        source = jsonl(tmp_path / "a.jsonl", [CHAT] * 3, column)
        rows = calibration_rows(source, chat_tokenizer, samples=3, seq_len=64, chat_template=True, column=named)
        text = chat_tokenizer.apply_chat_template(CHAT, tokenize=False)
        starts_of(rows.tokens, chat_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        assert any("chat template" in note for note in rows.notes)
    whole = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    options = {"samples": 3, "seq_len": len(whole), "chat_template": True, "column": "dialogue"}
    assert calibration_rows(source, chat_tokenizer, **options).tokens.tolist() == [whole] * 3
    sharegpt = [[{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]]
    source = jsonl(tmp_path / "b.jsonl", sharegpt * 3, "conversations")
    same = calibration_rows(source, chat_tokenizer, samples=3, seq_len=64, chat_template=True)
    assert torch.equal(same.tokens, rows.tokens)


def test_chats_that_cannot_be_rendered(tmp_path, tokenizer, chat_tokenizer):
    options = {"samples": 2, "seq_len": 64, "chat_template": True}
    with refused("--chat-template", "has no chat template"):
        calibration_rows("bundled", tokenizer, **options)
    with refused("line 1", 'not a list of {"role", "content"}', "--calib-column"):
        calibration_rows(jsonl(tmp_path / "a.jsonl", ["hello"], "messages"), chat_tokenizer, **options)
    with refused("no column messages or conversations", "id, text"):
        calibration_rows(jsonl(tmp_path / "a.jsonl", ["hello"]), chat_tokenizer, **options)
    with refused("holds list, not text", "--chat-template"):
        calibration_rows(jsonl(tmp_path / "a.jsonl", [CHAT]), chat_tokenizer, samples=2, seq_len=64)
    refusing = make_tokenizer()
    refusing.chat_template = REFUSING
    with refused("no text in it"):
        calibration_rows(jsonl(tmp_path / "a.jsonl", [CHAT], "messages"), refusing, **options)


# --- files


def test_every_file_type_and_folder_holds_the_same_documents(tmp_path, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    texts = [prose(40, i) for i in range(8)]
    folder = tmp_path / "folder"
    folder.mkdir()
    records = [{"text": text} for text in texts]
    jsonl(folder / "a.jsonl", texts[:3])
    jsonl(folder / "b.jsonl", texts[3:])
    whole = jsonl(tmp_path / "whole.jsonl", texts)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(record) for record in records))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    names = (whole, folder, *(tmp_path / n for n in ("list.json", "lines.json", "a.parquet")))
    made = [calibration_rows(str(name), tokenizer, samples=4, seq_len=50) for name in names]
    assert len({rows.sha256 for rows in made}) == 1
    (folder / "notes.md").write_text("# not text")
    (folder / "c.txt").write_text(prose(100, 50))
    mixed = calibration_rows(str(folder), tokenizer, samples=9, seq_len=50)
    assert "3 files of the folder read, 1 other entries skipped" in mixed.notes
    with refused("a.parquet", "no column body", "the columns are text"):
        calibration_rows(str(tmp_path / "a.parquet"), tokenizer, column="body")
    (tmp_path / "bad.parquet").write_text("junk")
    with refused("bad.parquet", "cannot be loaded (Arrow", "is it a parquet file?"):
        calibration_rows(str(tmp_path / "bad.parquet"), tokenizer)


def test_folder_of_txt_is_one_text_in_order_of_names(tmp_path, tokenizer):
    for name in "ba":
        (tmp_path / f"{name}.txt").write_text(prose(100, ord(name)))
    text = evaluation_tokens(str(tmp_path), tokenizer)
    assert text.tokens.tolist() == ids_of(tokenizer, prose(100, 97) + "\n\n" + prose(100, 98))
    rows = calibration_rows(str(tmp_path), tokenizer, samples=5, seq_len=30)
    starts_of(rows.tokens, text.tokens.tolist())


def test_byte_order_marks_are_no_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + prose(50).encode())
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": prose(50)}).encode())
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": prose(50)}]).encode())
    for name in ("a.txt", "a.jsonl", "a.json"):
        assert evaluation_tokens(str(tmp_path / name), tokenizer).tokens.tolist() == ids_of(tokenizer, prose(50))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", ("no text in it",)),
        ("a.txt", b" \n\t ", ("no text in it",)),
        ("a.txt", b"gr\xfc\xdfe", ("not UTF-8", "0xfc at offset 2", "iconv")),
        ("a.jsonl", b"", ("no text in it",)),
        ("a.jsonl", b'{"text": ""}\n', ("no text in it",)),
        ("a.jsonl", b'\n{"text": "a"}\n{"text": \n', ("line 3", "not JSON")),
        ("a.jsonl", b'{"text": "gr\xfc"}', ("line 1", "not JSON in UTF-8")),
        ("a.jsonl", b'"text"', ("line 1", "a str instead of an object")),
        ("a.jsonl", b'{"body": "a", "id": 1}', ("line 1", "no column text", "body, id", "--calib-column")),
        ("a.jsonl", b'{"text": 5}', ("line 1", "holds int, not text", "--calib-column")),
        ("a.jsonl", b'{"text": "\\ud800"}', ("line 1", "half a character")),
        ("a.json", b"[1]", ("item 1", "a int instead of an object")),
        ("a.json", b"[{", ("a.json", "not JSON")),
        ("a.json", b"[]", ("no text in it",)),
        ("a.csv", b"text\n", (".csv is not read", ".parquet")),
        ("a", b"text\n", ("a file without suffix is not read",)),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (calibration_rows, evaluation_tokens):
        with refused(str(path), *says):
            read(str(path), tokenizer)


def test_what_is_not_there_is_refused(tmp_path, tokenizer, calib):
    (tmp_path / "empty").mkdir()
    with refused("empty", "no .txt, .jsonl", "directly in this folder"):
        calibration_rows(str(tmp_path / "empty"), tokenizer)
    for missing in ("data/gone.txt", "./gone", str(tmp_path / "gone")):
        with refused(missing, "no such file or folder"):
            calibration_rows(missing, tokenizer)
    with refused(
        "wikitext3", "neither a recipe", "bundled, c4, c4-new, c4-old, pile, ptb, ptb-new, ptb-old, wikitext2, self"
    ):
        calibration_rows("wikitext3", tokenizer)
    with refused("no column body", "the columns are text"):
        calibration_rows("bundled", tokenizer, column="body")
    for bad in ({"samples": 0}, {"seq_len": 0}, {"seed": -1}):
        with refused("is too small"):
            calibration_rows("bundled", tokenizer, **bad)
    (calib / "text" / "calibration.txt").unlink()
    with refused("bundled", "is missing", "reinstall"):
        calibration_rows("bundled", tokenizer)


def test_unreadable_file_is_refused(tmp_path, tokenizer, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", denied)
    with refused(str(tmp_path), "cannot be read (Permission denied)"):
        textfiles.read_files(tmp_path, ("text",))


def test_too_long_a_text_is_refused_before_it_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(textfiles, "MAX_JOINED", 1000)
    monkeypatch.setattr("compress.calibration.MAX_JOINED", 1000)
    (tmp_path / "a.txt").write_text(prose(300))
    for source in (str(tmp_path / "a.txt"), jsonl(tmp_path / "a.jsonl", [prose(60), prose(60)])):
        with refused("MB of text", "pass a part of it"):
            evaluation_tokens(source, tokenizer)


# --- self, bundled


def test_self_is_what_the_model_writes(tokenizer):
    asked = []

    def generate(samples, seq_len, seed):
        asked.append((samples, seq_len, seed))
        return torch.full((samples, seq_len), 7, dtype=torch.int32)

    rows = calibration_rows("self", tokenizer, samples=3, seq_len=5, seed=9, generate=generate)
    assert asked == [(3, 5, 9)]
    assert rows.tokens.dtype == torch.int64
    assert rows.source == "self"
    with refused("self", "--calib bundled"):
        calibration_rows("self", tokenizer)
    with refused("self", "neither a recipe"):
        evaluation_tokens("self", tokenizer)


def test_bundled_reads_its_two_texts(calib, tokenizer):
    rows = calibration_rows("bundled", tokenizer, samples=4, seq_len=64)
    starts_of(rows.tokens, ids_of(tokenizer, prose(600, 1)))
    assert rows.source == "bundled (text/calibration.txt)"
    text = evaluation_tokens("bundled", tokenizer)
    assert text.tokens.tolist() == ids_of(tokenizer, prose(200, 2))
    assert "held-out" in text.protocol


# --- evaluation


def test_evaluation_of_documents_joins_them_in_order(tmp_path, tokenizer):
    texts = [prose(20, i) for i in range(50)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    whole = ids_of(tokenizer, "\n\n".join(texts))
    text = evaluation_tokens(source, tokenizer)
    assert text.tokens.tolist() == whole
    assert text.tokens.dtype == torch.int64
    assert r"joined by '\n\n'" in text.protocol
    for cap in (1, 10, 500, len(whole), len(whole) + 5):
        cut = evaluation_tokens(source, tokenizer, max_tokens=cap)
        assert cut.tokens.tolist() == whole[:cap]
        assert ("only the first" in cut.protocol) == (cap <= len(whole))
    with refused("--max-tokens"):
        evaluation_tokens(source, tokenizer, max_tokens=0)


def test_a_cap_reads_no_more_documents_than_it_takes(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    jsonl(source, [prose(20, i) for i in range(50)])
    with source.open("a") as file:
        file.write("broken\n")
    assert len(evaluation_tokens(str(source), tokenizer, max_tokens=50).tokens) == 50
    with refused("line 51"):
        evaluation_tokens(str(source), tokenizer)
    terse = make_tokenizer()  # more characters a token than expected: more is read until it is enough
    terse.add_tokens(["internationalisation"])
    jsonl(source, ["internationalisation" * 10] * 50)
    assert len(evaluation_tokens(str(source), terse, max_tokens=300).tokens) == 300


# --- the hub, which is faked: `datasets` is asked for the right thing, and its answer is read rightly


@pytest.fixture
def hub(monkeypatch):
    """load_dataset records its arguments and returns `hub.rows`; HfApi knows one revision."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        rows = {"text": [prose(60, i) for i in range(40)]}  # noqa: RUF012
        asked: list[tuple[str, dict]] = []  # noqa: RUF012

        def load_dataset(self, path, **options):
            self.asked.append((path, options))
            made = datasets.Dataset.from_dict(self.rows)
            return made.to_iterable_dataset() if options.get("streaming") else made

    made = Hub()
    made.asked = []
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    info = type("Info", (), {"sha": "f" * 40})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: info)
    return made


def test_every_hub_recipe_is_pinned_and_complete():
    for name in textsource.recipes():
        for evaluation in (False, True) if name != "pile" else (False,):
            text = (assets.folder("calib") / f"{name}.toml").read_text()
            assert name == "bundled" or re.search(r'^revision = "[0-9a-f]{40}"$', text, re.M)
            assert not evaluation or "\nprotocol = " in text
    assert not list(assets.folder("calib").rglob("*.py"))


def test_wikitext2_is_joined_with_its_empty_lines(hub, tokenizer):
    hub.rows = {"text": ["", " = Title = \n", "", *(prose(50, i) + " \n" for i in range(6))]}
    rows = calibration_rows("wikitext2", tokenizer, samples=3, seq_len=64)
    path, options = hub.asked[0]
    assert path == "Salesforce/wikitext"
    assert (options["name"], options["split"]) == ("wikitext-2-raw-v1", "train")
    assert rows.source == f"wikitext2 (Salesforce/wikitext @ {options['revision']}, train)"
    starts_of(rows.tokens, ids_of(tokenizer, "\n\n".join(hub.rows["text"])))
    text = evaluation_tokens("wikitext2", tokenizer)
    assert hub.asked[1][1] == options | {"split": "test"}
    assert text.tokens.tolist() == ids_of(tokenizer, "\n\n".join(hub.rows["text"]))
    assert "wikitext-2-raw-v1 test" in text.protocol


def test_c4_crops_one_shard_and_evaluates_the_first_documents(hub, tokenizer):
    calibration_rows("c4", tokenizer, samples=3, seq_len=64)
    path, options = hub.asked[0]
    assert path == "allenai/c4"
    assert options["name"] is None
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert options["verification_mode"] == "no_checks"
    hub.rows = {"text": [f"t{i}" for i in range(1200)]}
    text = evaluation_tokens("c4", tokenizer)
    assert hub.asked[1][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert text.tokens.tolist() == ids_of(tokenizer, " ".join(hub.rows["text"][:1100]))
    hub.rows = {"text": [prose(200, i) for i in range(1100)]}
    assert len(evaluation_tokens("c4", tokenizer).tokens) == 256 * 2048


def test_ptb_and_pile(hub, tokenizer):
    hub.rows = {"sentence": [prose(9, i) for i in range(60)]}
    calibration_rows("ptb", tokenizer, samples=3, seq_len=64)
    text = evaluation_tokens("ptb", tokenizer)
    assert hub.asked[1][1]["data_files"] == {"test": "penn_treebank/test/0000.parquet"}
    assert text.tokens.tolist() == ids_of(tokenizer, " ".join(hub.rows["sentence"]))
    with refused("no column text", "sentence", "--calib-column"):
        calibration_rows("pile", tokenizer)
    with refused("pile", "no text to evaluate on"):
        evaluation_tokens("pile", tokenizer)


def test_a_stale_cache_is_reported(hub, tokenizer, monkeypatch):
    monkeypatch.setattr(textsource, "_cached_revision", lambda data: "0" * 40)
    assert any("NOT the pinned revision" in n for n in evaluation_tokens("wikitext2", tokenizer).notes)


def test_a_named_data_set_is_streamed(hub, tokenizer):
    hub.rows = {"body": [prose(60, i) for i in range(40)], "id": list(range(40))}
    first, again, other = (
        calibration_rows("org/name:en:part", tokenizer, samples=4, seq_len=64, seed=seed, column="body")
        for seed in (0, 0, 1)
    )
    assert first.sha256 == again.sha256 != other.sha256
    assert first.source == f"org/name:en @ {'f' * 40}, part"
    expected = {"name": "en", "split": "part", "revision": "f" * 40, "streaming": True}
    assert hub.asked[0] == ("org/name", expected)
    assert any("streamed" in note for note in first.notes)
    texts = [ids_of(tokenizer, text) for text in hub.rows["body"]]
    for row in first.tokens.tolist():
        assert any(str(row)[1:-1] in str(ids) for ids in texts)
    evaluation_tokens("org/name", tokenizer, column="body", max_tokens=10)
    assert (hub.asked[-1][1]["name"], hub.asked[-1][1]["split"]) == (None, "test")
    with refused("no column text", "body, id"):
        calibration_rows("org/name", tokenizer)


def test_what_the_hub_raises_becomes_one_line(hub, tokenizer, monkeypatch):
    import datasets
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    for error in (
        ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"),
        OfflineModeIsEnabled("offline"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        EntryNotFoundError("no file"),
        ValueError("BuilderConfig 'en' not found.\nAvailable: ['a']"),
        RuntimeError("Dataset scripts are no longer supported"),
    ):

        def load_dataset(path, error=error, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        for source in ("wikitext2", "org/name"):
            with refused(source, type(error).__name__, "no hub access? pass a local file or --calib bundled") as e:
                calibration_rows(source, tokenizer)
            assert "\n" not in str(e.value)
            assert e.value.__cause__ is error


def test_a_stream_that_breaks_off_becomes_one_line(hub, tokenizer, monkeypatch):
    import datasets

    def broken():
        yield {"text": prose(60)}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: stream)
    with refused("org/name", "reset by peer", "--calib bundled"):
        calibration_rows("org/name", tokenizer, samples=2, seq_len=32)


OFFLINE = """
import sys
from compress.calibration import calibration_rows
from compress.errors import CompressError
assert "transformers" not in sys.modules and "datasets" not in sys.modules
class NoTokenizer: chat_template = None
for source in ("wikitext2", "org/name"):
    try: calibration_rows(source, NoTokenizer())
    except CompressError as error: print(error.line())
"""


def test_offline_is_refused_at_once_and_nothing_heavy_is_imported(tmp_path):
    pytest.importorskip("datasets")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=root, env=environment, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line, name in zip(lines, ("wikitext2 (Salesforce/wikitext @", "org/name"), strict=True):
        assert line.startswith(name)
        assert "OfflineModeIsEnabled" in line
        assert "--calib bundled" in line


def test_without_datasets_only_what_needs_it_fails(tmp_path, tokenizer, calib, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    calibration_rows("bundled", tokenizer, samples=4, seq_len=64)
    calibration_rows(jsonl(tmp_path / "a.jsonl", [prose(50)] * 4), tokenizer, samples=4, seq_len=64)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in ("wikitext2", "org/name", str(tmp_path / "a.parquet")):
        with refused(source, "needs the package datasets", "pip install compress-llm[data]"):
            calibration_rows(source, tokenizer)
