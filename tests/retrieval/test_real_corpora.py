"""Real text, indexed and searched: editions of a text find one another where each text itself is excluded.

With the hashing embedder, for which near means common words; a few dozen beginnings of documents of each corpus.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.corpora import build

from retro_kernels.data.corpus import document_hash
from retro_kernels.retrieval.retriever import Retriever

CORPORA = {  # which entries of a file are versions of one text
    "rfc/rfc-families-dev.jsonl.xz": "family",
    "factbook/factbook-2016-2020-2023.jsonl.xz": "title",
    "dclaw/dclaw-code.jsonl.xz": "",  # none
}


def beginnings(path: Path, versions_of: str, chars: int = 5000) -> list[dict[str, str]]:
    """36 documents, each titled by the text of which it is a version; three versions of a text where it has them."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    texts: defaultdict[str, list[str]] = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            entry = json.loads(line)
            texts[entry[versions_of] if versions_of else f"text {number}"].append(entry["text"][:chars])
    versions = 3 if versions_of else 1
    chosen = [title for title in texts if len(texts[title]) >= versions][: 36 // versions]
    return [{"title": title, "text": text} for title in chosen for text in texts[title][:versions]]


@pytest.fixture(scope="module", params=list(CORPORA))
def searched(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(corpus, documents, a retriever over the set of them, the neighbours of every chunk outside its document)"""
    folder = tmp_path_factory.mktemp("real")
    entries = beginnings(data / request.param, CORPORA[request.param])
    (folder / "text.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    build([folder / "text.jsonl"], folder / "set", chunk_size=64, vocab_size=1000, shard_chunks=4096)
    retriever = Retriever.from_pretrained(folder / "set", verify="full")
    tokens = torch.from_numpy(retriever.store.chunks.astype(np.int64))
    own = torch.from_numpy(retriever.store.document_ids.copy())[:, None]
    return request.param, entries, retriever, retriever(tokens, num_neighbours=3, exclude_documents=own)


def test_documents_are_in_the_set_as_they_were(searched: Any) -> None:
    _, entries, retriever, _ = searched
    store, unique = retriever.store, {document_hash(entry["text"]): entry for entry in entries}
    assert store.num_documents == len(unique) > 25
    for (number, entry), i in zip(
        unique.items(), retriever.find_documents(list(unique)).tolist(), strict=True
    ):
        assert store.titles([i]) == [entry["title"]] and number == store.document_hashes[i]
        tokens = store.chunks[list(store.document_chunks(i))].reshape(-1)
        assert store.tokenizer.decode(tokens) == entry["text"]


def test_neighbours_are_the_nearest_chunks_of_other_documents(searched: Any) -> None:
    _, _, retriever, near = searched
    store = retriever.store
    owners = torch.from_numpy(store.document_ids.copy())
    assert (near.ids >= 0).all() and not (retriever.documents(near.ids) == owners[:, None, None]).any()
    keys = torch.from_numpy(store.embeddings.astype(np.float64))
    distances = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.masked_fill_(owners == owners[:, None], torch.inf)
    want = distances.topk(3, largest=False).values
    torch.testing.assert_close(near.distances[:, 0].double(), want, rtol=1e-4, atol=1e-4)


def test_versions_of_a_text_find_one_another(searched: Any) -> None:
    corpus, _, retriever, near = searched
    titles = np.array(retriever.titles(range(retriever.num_documents)))
    owners = retriever.store.document_ids
    if CORPORA[corpus]:
        found = titles[retriever.documents(near.ids[:, 0, 0]).numpy()]
        # 6 % of the chunks would by chance; 45 % of an RFC's do, and 62 % of a country's
        assert (found == titles[owners]).mean() > 0.3
        most = [Counter(found[owners == i]).most_common(1)[0][0] for i in range(retriever.num_documents)]
        assert (np.array(most) == titles).mean() > 0.5
    text = retriever.store.texts([owners.size // 2])[0]
    hit = retriever.search_text(text, k=1)[0]
    assert hit.text == text and hit.distance < 1e-3
