"""The tokenizer.json of a pretrained model: lossless, ids as the model knows them, 0 and the end of text exchanged."""

from __future__ import annotations

import json
import lzma
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from retro_kernels import InputError, Tokenizer
from retro_kernels.data import tokenizer_json

tokenizers = pytest.importorskip("tokenizers")
WORDS = "a neighbour, and another one: it's 1984!\n\tif x == y:\n        return naïve\n" * 20


def made(
    path: Path, *, special: tuple[str, ...] = ("<|endoftext|>",), first: bool = False, **parts: Any
) -> Any:
    """A byte-level BPE learnt from a few words, in `path`; `first`: special tokens have the first ids."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special) if first else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    backend.add_special_tokens(list(special))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(path))
    return backend


def made_with_fallback(path: Path, metaspace: bool) -> Any:
    """As Llama 2 and its kin: spaces as U+2581, one put before the text, bytes for letters that are not known."""
    pieces = tokenizers.pre_tokenizers, tokenizers.normalizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = pieces[1].Replace(" ", "\u2581")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(WORDS.splitlines(), trainer)
    values = json.loads(backend.to_str())
    vocabulary = values["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    if metaspace:
        backend.normalizer = None
        backend.pre_tokenizer = pieces[0].Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = pieces[1].Sequence([pieces[1].Prepend("\u2581"), backend.normalizer])
    added = (
        "\u2581\u2581\u2581",
        "<tool>",
    )  # the first as Gemma has it: meant for spaces, matched in the raw text
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    backend.save(str(path))
    return backend


def some_text(seed: int, length: int = 3000) -> str:
    rng = random.Random(seed)
    points = [
        rng.choice([rng.randrange(0x100), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        for _ in range(length)
    ]
    return "".join(map(chr, points)) + WORDS


def test_nothing_is_lost(seed: int, tmp_path: Path) -> None:
    made(tmp_path / "t.json", normalizer=tokenizers.normalizers.NFC())
    tokenizer = Tokenizer(tmp_path / "t.json")
    for text in ("", " ", "e\u0301 <|endoftext|> \u2581 <pad>", some_text(seed)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.encode_array(text).tolist() == ids
        assert 0 not in ids and tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode_bytes(tokenizer.encode("🙂")[:1]) == "🙂".encode()[:1]
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("metaspace", [False, True])
def test_byte_fallback(seed: int, tmp_path: Path, metaspace: bool) -> None:
    """Lossless, a literal U+2581 too; the file's ids but for 0, the end and the space before a text."""
    backend = made_with_fallback(tmp_path / "t.json", metaspace)
    tokenizer = Tokenizer(tmp_path / "t.json")
    for text in ("", " ", "\u2581", " \u2581\u2581  </s> <0x41> <unk>", "a    b<tool>   ", some_text(seed)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.encode_array(text).tolist() == ids
        assert 0 not in ids and tokenizer.token_bytes[ids].sum() == len(text.encode())
    end = backend.token_to_id("</s>")
    assert tokenizer.file_pad_id == end == 2 and tokenizer.unk_id == -1
    # with a space before it, it is what the model reads after any other word
    theirs = backend.encode(WORDS.strip(), add_special_tokens=False).ids
    assert tokenizer.encode(" " + WORDS.strip()) == theirs and 0 not in theirs and end not in theirs
    assert tokenizer.decode_bytes(tokenizer.encode("\U0001f642")[:1]) == "\U0001f642".encode()[:1]


@pytest.mark.parametrize("kind", ["byte-level", "no words", "fallback", "metaspace"])
def test_a_long_text_is_encoded_in_segments(
    seed: int, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bounded length, which decides how much memory is taken, and with the ids of the whole."""
    if kind == "byte-level":
        made(tmp_path / "t.json")
    elif kind == "no words":  # tokens reach over spaces
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(WORDS.splitlines(), trainer)
        backend.add_special_tokens(["<|endoftext|>"])
        backend.save(str(tmp_path / "t.json"))
    else:
        made_with_fallback(tmp_path / "t.json", kind == "metaspace")
    tokenizer = Tokenizer(tmp_path / "t.json")
    if kind == "no words":
        assert any(b" " in piece[1:-1] for piece in tokenizer._pieces)
    rng = random.Random(seed)
    words = [*WORDS.split(" "), "naïve", "имя", "字。\n字\n", "a\u2581b", "  ", "12", "x\n\ny", "it's"]
    texts = [" ".join(rng.choices(words, k=4000)), "a" * 3000, some_text(seed)]
    whole = [tokenizer.encode(text) for text in texts]
    backend, longest = tokenizer._backend._backend, 0
    monkeypatch.setattr(tokenizer_json, "_SEGMENT_CHARS", 100)

    class Watched:
        def encode(self, part: str, **options: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(part))
            return backend.encode(part, **options)

    monkeypatch.setattr(tokenizer._backend, "_backend", Watched())
    assert tokenizer.encode(texts[0]) == whole[0]
    assert longest < 1500
    assert [tokenizer.encode(text) for text in texts[1:]] == whole[1:]


@pytest.mark.parametrize("first", [False, True])
def test_ids_are_those_of_the_file_but_two(seed: int, tmp_path: Path, first: bool) -> None:
    special = ("<|endoftext|>", "<|other|>")
    backend = made(tmp_path / "t.json", special=special, first=first)
    tokenizer = Tokenizer(tmp_path / "t.json")
    end = backend.token_to_id("<|endoftext|>")
    assert (end == 0) == first and tokenizer.file_pad_id == end
    assert tokenizer.vocab_size == backend.get_vocab_size() and tokenizer.pad_id == tokenizer.eos_id == 0
    text = some_text(seed)
    theirs = backend.encode(text).ids
    assert tokenizer.encode(text) == [end if i == 0 else 0 if i == end else i for i in theirs]
    if not first:
        assert 0 in theirs  # "!" is the first letter
        assert tokenizer.encode("!") == [end]
    for name in special:
        i = backend.token_to_id(name)
        assert tokenizer.decode([0 if i == end else i]) == ""


def test_other_tokens_of_the_file(tmp_path: Path) -> None:
    """Added ones that are not special are text, and the first known end of a text counts."""
    backend = made(tmp_path / "t.json", special=("<|im_end|>", "</s>"))
    backend.add_tokens(["        ", "<tool>", "café"])  # é is a letter for a byte, too
    backend.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.file_pad_id == backend.token_to_id("</s>")
    for token in ("        ", "<tool>", "café"):
        assert len(tokenizer.encode(token)) == 1 and tokenizer.decode(tokenizer.encode(token)) == token
    assert tokenizer.decode(tokenizer.encode("a        <tool></s>")) == "a        <tool></s>"
    # nor is a text cut off or filled up, as files of models with few positions ask for
    backend.enable_truncation(7)
    backend.enable_padding(length=900)
    backend.save(str(tmp_path / "cut.json"))
    assert Tokenizer(tmp_path / "cut.json").encode(WORDS) == tokenizer.encode(WORDS)
    assert len(backend.encode(WORDS).ids) == 900 and len(tokenizer.encode(WORDS)) > 7


def test_a_token_before_every_text_is_named_but_not_put_there(seed: int, tmp_path: Path) -> None:
    backend = made(tmp_path / "t.json", special=("<|begin|>", "<|endoftext|>"))
    plain = Tokenizer(tmp_path / "t.json")
    assert plain.file_bos_id is None
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=False)
    ids = [(name, backend.token_to_id(name)) for name in ("<|begin|>", "<|endoftext|>")]
    before, behind = (
        tokenizers.processors.TemplateProcessing(single=single, special_tokens=ids)
        for single in ("<|begin|> $A", "$A <|endoftext|>")
    )
    for processor, named in [
        (byte_level, False),
        (behind, False),
        (before, True),
        (tokenizers.processors.Sequence([byte_level, before]), True),
    ]:
        backend.post_processor = processor
        backend.save(str(tmp_path / "t.json"))
        tokenizer = Tokenizer(tmp_path / "t.json")
        assert (backend.encode("a").ids[0] == ids[0][1]) == named
        assert tokenizer.file_bos_id == (ids[0][1] if named else None)
        assert tokenizer.encode(WORDS) == plain.encode(WORDS)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            Tokenizer(tmp_path / "t.json")

    for content in (b"{", b'{"a": 1}', b'{"added_tokens": [], "model": 3}'):
        (tmp_path / "t.json").write_bytes(content)
        refused("no tokenizer.json")
    made(tmp_path / "t.json", special=("<mask>",))
    refused("no special token that ends a text")
    made(tmp_path / "t.json", pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True))
    refused("loses characters")
    for side in ("lstrip", "rstrip"):
        backend = made(tmp_path / "t.json")
        backend.add_tokens([tokenizers.AddedToken("<word>", **{side: True})])
        backend.save(str(tmp_path / "t.json"))
        refused("swallow white space")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "t.json"))
    refused("no BPE that can spell every byte .byte 0")
    values = json.loads(made_with_fallback(tmp_path / "t.json", metaspace=True).to_str())
    del values["model"]["vocab"]["<0xFF>"]
    (tmp_path / "t.json").write_text(json.dumps(values))
    refused("byte 255 has no token")


def test_travels_to_other_processes_and_folders(tmp_path: Path) -> None:
    """Under any name: what a file holds is seen in it."""
    made(tmp_path / "t.json")
    tokenizer = Tokenizer(tmp_path / "t.json")
    tokenizer.save(tmp_path / "tokenizer.model")
    for copy in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer(tmp_path / "tokenizer.model")):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(WORDS) == tokenizer.encode(WORDS)


def test_gpt2(data: Path, seed: int, tmp_path: Path) -> None:
    """The real one, put together from its two files; a few ids that are generally known."""
    files = data / "tokenizers"
    vocabulary = json.loads(lzma.decompress((files / "gpt2.vocab.json.xz").read_bytes()))
    lines = lzma.decompress((files / "gpt2.merges.txt.xz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 50_257 and tokenizer.file_pad_id == 50_256
    assert tokenizer.encode("Hello world!") == [15496, 995, 50_256]
    text = some_text(seed)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_that_drops_merges_encodes_one_way(tmp_path: Path) -> None:
    """BPE with dropout, as it may be left in a file after training."""
    made(tmp_path / "t.json")
    values = json.loads((tmp_path / "t.json").read_text())
    expected = Tokenizer(tmp_path / "t.json").encode(WORDS)
    values["model"]["dropout"] = 0.5
    (tmp_path / "d.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(tmp_path / "d.json")
    assert all(tokenizer.encode(WORDS) == expected for _ in range(5))
