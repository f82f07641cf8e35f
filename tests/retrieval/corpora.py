"""Small corpora of made-up prose, sets built from them with the hashing embedder, and a BERT of 16 dimensions."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from retro_kernels.data.corpus import Document
from retro_kernels.retrieval.build import build_retrieval_set
from retro_kernels.retrieval.store import MANIFEST

WORDS = [a + b for a in "ba de fi go lu mi no pa re su ti vo".split() for b in "n r s l k m".split()]


def documents(seed: int, count: int = 12, words: int = 120) -> list[Document]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        topic = rng.sample(WORDS, 12)
        text = " ".join(
            rng.choice(topic if rng.random() < 0.7 else WORDS) for _ in range(rng.randint(1, 2 * words))
        )
        made.append(Document(f"title {i}", f"{i} {text}\n"))
    return made


def build(corpus: Any, out: Path, **options: Any) -> dict[str, Any]:
    defaults = dict(embedder="hashing:64", vocab_size=400, chunk_size=16, shard_chunks=60, progress=False)
    if "tokenizer" in options:
        del defaults["vocab_size"]
    return build_retrieval_set(corpus, out, **{**defaults, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a set by its hash; of the manifest what does not tell how long it took."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("seconds")
    for key in ("queries_per_second", "build_seconds"):
        manifest["index"].pop(key)
    return {**found, MANIFEST: manifest}


def tiny_bert(folder: Path, seed: int = 3, kind: str = "Bert") -> Path:
    """One with random weights, in a folder."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + letter for letter in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), vocab=str(folder / "vocab.txt")
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder
