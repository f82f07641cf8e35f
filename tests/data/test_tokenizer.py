"""The tokenizer loses nothing, learns white space, and refuses what it cannot do."""

import io
import pickle
import random
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_kernels.config import InputError
from retro_kernels.data import tokenizer as tokenizer_module
from retro_kernels.data.tokenizer import MIN_VOCAB_SIZE, TextSampler, Tokenizer, token_dtype

CODE = "def f(x):\n    if x:\n        return '\u00e9t\u00e9'\n\treturn None\n\n\n" * 100
WORDS = "retrieval of neighbours from a large set of chunks helps the model to continue a document".split()


def some_text(seed: int, words: int = 3000) -> str:
    rng = random.Random(seed)
    return CODE + " ".join(rng.choice(WORDS) + rng.choice(["", "s", ".", ",\n"]) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train([some_text(1)], tmp_path_factory.mktemp("tokenizer") / "t.model", 400)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=300)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i > 3 for i in ids)
    assert sum(int(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())


MARKS = [
    "\u2581",
    " ",
    "\0",
    "\t",
    "\n",
    "\r",
    "<s>",
    "</s>",
    "<pad>",
    "<0x41>",
    "a",
    "\u2585",
    "\ufffd",
    "\ufeff",
]


@given(st.lists(st.sampled_from(MARKS)).map("".join))
@settings(deadline=None, max_examples=300)
def test_marks_of_sentencepiece_are_ordinary_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_comes_back(tokenizer):
    everything = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(everything), 4096):
        text = "x".join(everything[start : start + 4096])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_white_space_is_cheap(tokenizer):
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("\t\t")) == 1
    assert len(tokenizer.encode("\r\n")) == 1
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode(some_text(2))) < len(some_text(2)) / 2


def test_long_texts_are_cut_where_it_makes_no_difference(tokenizer, seed):
    text = some_text(seed, 40_000)
    assert len(text) > 3 * (1 << 16)
    assert tokenizer.encode(text) == tokenizer._backend._processor.encode(text)
    np.testing.assert_array_equal(tokenizer.encode_array(text), tokenizer.encode(text))
    assert tokenizer.encode_array("").shape == (0,)


IDS = dict(pad_id=0, unk_id=1, bos_id=2, eos_id=3)


def trained_elsewhere(text, **options):
    """A model's file, of SentencePiece's own options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]),
        model_writer=model,
        model_type="bpe",
        minloglevel=3,
        max_sentence_length=1 << 20,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "letters",
    ["aeinorst", "abcdefghij0123456789+/", "ab\n,.;", "\u4e00\u4e01\u4e02a", "a", "\t\r\na", "\ufffd\u00e9e"],
)
def test_long_texts_without_a_space_are_cut_too(tokenizer, seed, letters, monkeypatch):
    text = "".join(random.Random(seed).choices(letters, k=20_000)) + " " + "e" * 2000
    backend = tokenizer._backend
    want, longest = backend._processor.encode(text), 0
    monkeypatch.setattr(tokenizer_module, "_SEGMENT_CHARS", 256)

    class Watched:
        def encode(self, part):
            nonlocal longest
            longest = max(longest, len(part))
            return processor.encode(part)

    processor, backend._processor = backend._processor, Watched()
    try:
        assert tokenizer.encode(text) == want
    finally:
        backend._processor = processor
    if len(letters) > 3:  # else all may be joined to all
        assert longest < 2500


def test_a_model_with_spaces_inside_its_pieces_is_cut_beside_them(seed, monkeypatch):
    model = trained_elsewhere(
        some_text(1),
        vocab_size=500,
        split_by_whitespace=False,
        **IDS,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        required_chars="\u2581\n",
    )
    tokenizer = tokenizer_module._from_model(model, "model")
    assert any(b" " in piece[1:] and piece.strip() for piece in tokenizer._pieces)
    monkeypatch.setattr(tokenizer_module, "_SEGMENT_CHARS", 64)
    text = some_text(seed)
    assert tokenizer.encode(text) == tokenizer._backend._processor.encode(text)


def test_batches_are_the_single_calls(tokenizer):
    texts = ["", "one", "two  three\n", "\u2581"]
    ids = tokenizer.encode_batch(texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode_batch(ids) == texts
    assert tokenizer.decode_batch(np.array([[0, 0], [0, 0]])) == ["", ""]


def test_half_a_character_is_replaced_not_raised(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:2]) == "\U0001f600".encode()[:2]
    assert tokenizer.token_bytes[:4].tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("ids", [[-1], [400], [5, 10**9]])
def test_ids_out_of_range_are_refused(tokenizer, ids):
    with pytest.raises(InputError, match="ids 0 to 399"):
        tokenizer.decode(ids)


def test_surrogates_and_other_types_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+D800, at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"ab")


def test_same_text_gives_the_same_file(tmp_path):
    for name in "ab":
        Tokenizer.train([some_text(3), some_text(4)], tmp_path / name, 350)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Tokenizer(tmp_path / "a").fingerprint == Tokenizer(tmp_path / "b").fingerprint
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]


def test_training_says_nothing(tmp_path, capfd):
    Tokenizer.train([some_text(5)], tmp_path / "t", 320)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_two_bytes_where_they_hold_every_id():
    sizes = (288, 1 << 16, (1 << 16) + 1, 131_072)
    assert [token_dtype(size) for size in sizes] == [np.uint16, np.uint16, np.int32, np.int32]


@pytest.mark.parametrize("size", [0, MIN_VOCAB_SIZE - 1, 131_073])
def test_sizes_out_of_range(tmp_path, size):
    with pytest.raises(InputError, match="288 to 131,072"):
        Tokenizer.train(["text"], tmp_path / "t", size)


@pytest.mark.parametrize("size", [300.0, "300", True])
def test_sizes_that_are_no_numbers(tmp_path, size):
    with pytest.raises(InputError, match="vocab_size is .*; it must be an integer"):
        Tokenizer.train(["text"], tmp_path / "t", size)


def test_one_text_is_not_taken_for_its_letters(tmp_path):
    with pytest.raises(TypeError, match="in a list"):
        Tokenizer.train("a text", tmp_path / "t")


def test_too_large_a_vocabulary_names_the_largest(tmp_path):
    with pytest.raises(InputError, match="at most ([0-9,]+) entries") as error:
        Tokenizer.train(["a small text, a very small text\n" * 3], tmp_path / "t", 5000)
    assert not (tmp_path / "t").exists()
    largest = int(str(error.value).split("at most ")[1].split()[0].replace(",", ""))
    text = ["a small text, a very small text\n" * 3]
    assert Tokenizer.train(text, tmp_path / "t", largest).vocab_size == largest
    assert Tokenizer.train(text, tmp_path / "u").vocab_size == largest
    with pytest.raises(InputError):
        Tokenizer.train(text, tmp_path / "t", largest + 1)


def test_many_letters_fit_a_small_vocabulary(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x5E00)))
    tokenizer = Tokenizer.train([text], tmp_path / "t", 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(text + " \n")) == text + " \n"


def test_a_vocabulary_of_128k(tmp_path, seed):
    rng = random.Random(seed)
    letters = [chr(c) for c in range(0x4E00, 0x9F00)]
    text = "".join(rng.choice(letters) for _ in range(400_000))
    tokenizer = Tokenizer.train([text], tmp_path / "t", 128_000)
    assert tokenizer.vocab_size == 128_000
    assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]


@pytest.mark.parametrize("texts", [[], ["", ""], ["\0\t"]])
def test_no_text(tmp_path, texts):
    with pytest.raises(InputError, match="no text"):
        Tokenizer.train(texts, tmp_path / "t")


def test_sample_is_bounded_and_spread(seed):
    sampler = TextSampler(100_000)
    documents = [some_text(seed + i, 2000) for i in range(60)]
    for document in documents:
        sampler.add(document)
    sample = sampler.sample()
    assert 80_000 < sum(len(piece.encode()) for piece in sample) <= 100_000
    origins = {i for piece in sample for i, document in enumerate(documents) if piece in document}
    assert len(origins) > 10


@pytest.mark.parametrize("line", [0, 70, 20_000])
def test_text_without_spaces_is_sampled_too(seed, line):
    """Of a language that has none, in lines or without."""
    rng = random.Random(seed)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(300_000))
    if line:
        text = "\n".join(text[i : i + line] for i in range(0, len(text), line))
    sampler = TextSampler(100_000)
    sampler.add(text)
    sample = sampler.sample()
    assert 80_000 < sum(len(piece.encode()) for piece in sample) <= 100_000 and len(sample) >= 6
    assert all(piece in text for piece in sample)
    whole = TextSampler()
    whole.add(text)
    assert "".join(whole.sample()).replace("\n", "") == text.replace("\n", "")


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        Tokenizer(path)
    path.write_bytes(b"certainly not a protobuf" * 100)
    with pytest.raises(
        InputError, match="not a SentencePiece model and no tokenizer.json.*Give another, or none"
    ):
        Tokenizer(path)
    with pytest.raises(InputError, match=r"Is a directory\.$"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"Is a directory\. Give the file in it: .*tokenizer\.json$"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options, promise",
    [
        (dict(pad_id=-1, byte_fallback=True), "padding id"),
        (IDS, "byte fallback"),
        (dict(**IDS, byte_fallback=True), "loses characters"),
    ],
)
def test_models_that_lose_text_are_refused(tmp_path, options, promise):
    model = trained_elsewhere(some_text(6), vocab_size=400, hard_vocab_limit=False, **options)
    (tmp_path / "t").write_bytes(model)
    with pytest.raises(InputError, match=promise):
        Tokenizer(tmp_path / "t")


def test_travels_to_other_processes_and_folders(tokenizer, tmp_path):
    for copy in (pickle.loads(pickle.dumps(tokenizer)), _saved(tokenizer, tmp_path / "new" / "t.model")):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("some neighbours") == tokenizer.encode("some neighbours")


def _saved(tokenizer, path):
    tokenizer.save(path)
    return Tokenizer(path)
