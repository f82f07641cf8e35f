"""One rank of test_sharded.py: `sharded_worker.py RANK WORLD FOLDER SEED`. Writes what it found to
FOLDER/rank-RANK.pt."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from retrieval.sets import BagEmbedder, M, MemoryStore, dense, make_documents
from torch import Tensor

from retro_kernels.config import InputError
from retro_kernels.data.packing import TokenDocuments
from retro_kernels.evaluate import find_neighbours
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.search import DeviceStore
from retro_kernels.retrieval.sharded import ShardedRetriever

BATCHES = ((3, 2), (0, 4), (1, 0))  # sequences of ranks 0 and 1 in each call
K = 5


def corpus(seed: int) -> list[list[int]]:
    torch.manual_seed(seed)
    text = torch.randint(1, 5000, (3 * M,)).tolist()
    documents = make_documents(60, shared=False)
    return [text, *documents, text]  # a copy on either rank: equal distances


def share(documents: list[Any], rank: int, world: int) -> list[Any]:
    size = -(-len(documents) // world)
    return documents[rank * size : (rank + 1) * size]


def batch(documents: list[list[int]], rank: int, call: int, num: int) -> tuple[Tensor, Tensor | None]:
    """Chunks of both shards, one unknown and one of padding; excluded documents of both shards."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    rows = []
    for _ in range(num):
        picked = torch.randint(len(documents), (3,), generator=generator).tolist()
        chunks = [(documents[i][:M] + [0] * M)[:M] for i in picked]
        chunks += [torch.randint(1, 5000, (M,), generator=generator).tolist(), [0] * M]
        rows.append(sum(chunks, []))
    tokens = torch.tensor(rows, dtype=torch.int64).reshape(num, 5 * M)
    if call == 2:
        return tokens, None
    return tokens, torch.randint(-1, len(documents), (num, 2 + rank), generator=generator)


def to_evaluate(documents: list[list[int]]) -> TokenDocuments:
    """The first chunks of some documents, as those of others."""
    chunks = np.array([(document[:M] + [0] * M)[:M] for document in documents[:7]], dtype=np.int32)
    none = np.zeros(7, np.int64)
    return TokenDocuments(chunks, np.arange(8), none, [""] * 7, none, none)


def broken(*_: Any, **__: Any) -> Any:
    raise OSError("the disk is gone")


def failures(retriever: ShardedRetriever, documents: list[Any], rank: int) -> dict[str, str]:
    """What each rank is told where one of them fails alone; without an end where it waits for the other."""
    tokens = batch(documents, rank, 0, 2)[0]
    searcher: Any = retriever.searcher
    attempts: dict[str, tuple[int, Any, str, Any]] = {  # the rank, the part of it that fails, the call
        "lookup": (0, searcher, "known_keys", lambda: retriever(tokens)),
        "embed": (1, searcher, "embed", lambda: retriever(tokens)),
        "search": (1, searcher, "search_keys", lambda: retriever(tokens)),
        "store": (0, retriever.store, "titles", lambda: retriever.titles([0])),
        "hashes": (1, retriever.store, "find_documents", lambda: retriever.find_documents([7])),
        "tokens": (1, None, "", lambda: retriever(tokens * (1000 * rank + 1))),
        "text": (0, None, "", lambda: retriever.search_text("1" if rank else " ")),
        "titles": (1, None, "", lambda: retriever.titles([retriever.num_documents] if rank else [0])),
        "open": (0, Retriever, "from_pretrained", lambda: ShardedRetriever.from_pretrained("set")),
    }
    told = {}
    for name, (failing, part, method, call) in attempts.items():
        with contextlib.ExitStack() as patches:
            if part is Retriever:
                patches.enter_context(mock.patch.object(part, method, lambda *_, **__: retriever))
            if rank == failing and part is not None:
                patches.enter_context(mock.patch.object(part, method, broken))
            try:
                call()
            except Exception as error:
                told[name] = f"{type(error).__name__}: {error}"
    return told


def main(rank: int, world: int, folder: Path, seed: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    documents = corpus(seed)
    embedder = BagEmbedder()
    store = MemoryStore(share(documents, rank, world), embedder)
    store.document_hashes += rank * 1000 * len(share(documents, 0, world))  # as in one set
    if rank:
        store.document_hashes[-1] = 1007  # which the other has, too
    on_device = DeviceStore(store, torch.device("cpu"))
    local = dense(store, embedder=embedder, device_store=on_device)
    local.name = local.candidates = "dense"  # as from_pretrained says
    retriever = ShardedRetriever.of(local)
    found: dict[str, Any] = {"num": (retriever.num_chunks, retriever.num_documents)}
    found["names"] = [retriever.name, retriever.candidates]
    assert retriever.collective and retriever.group is not dist.group.WORLD
    assert retriever.stats is local.stats and retriever.device_store is on_device
    with mock.patch.object(Retriever, "from_pretrained", return_value=local) as opened:
        ShardedRetriever.from_pretrained("set", device="cpu")
    found["opened"] = (*opened.call_args.args, opened.call_args.kwargs)
    for call, sizes in enumerate(BATCHES):
        tokens, exclude = batch(documents, rank, call, sizes[rank])
        near = retriever(tokens, num_neighbours=K, exclude_documents=exclude)
        found[f"call {call}"] = (*near, retriever.documents(near.ids))
    found["stats"] = retriever.stats.to_dict()
    found["titles"] = retriever.titles([0, -1] if rank else [len(documents) - 1])
    found["documents"] = retriever.find_documents([40007, 8, 7] if rank else [1007])
    found["hits"] = [
        hit.to_dict() for hit in retriever.search_text(" ".join(map(str, documents[-1][:M])), k=3)
    ]
    prefetched = list(retriever.prefetch([batch(documents, rank, 0, BATCHES[0][rank])], num_neighbours=K))
    found["prefetched"] = prefetched[0][1].ids
    scored = find_neighbours(to_evaluate(documents), retriever, 2, seed, progress=False)
    if rank == 0:  # alone: the other may have no batch left
        found["evaluated"] = (scored.ids, *scored.gather(torch.arange(len(scored.ids))))
    try:
        retriever(tokens, num_neighbours=2 + rank)
    except ValueError as error:
        found["different k"] = str(error)
    found["failures"] = failures(retriever, documents, rank)
    for name, check in (
        ("too many", lambda: retriever.check_num_neighbours(10**9)),
        ("no chunk", lambda: retriever.documents(torch.tensor([retriever.num_chunks]))),
    ):
        try:
            check()
        except InputError as error:
            found[name] = str(error)
    again = retriever(*batch(documents, rank, 0, BATCHES[0][rank])[:1], num_neighbours=K)
    found["after failures"] = again.ids.shape
    for option, value in (
        *(("drop_copies", 0.5), ("candidates", "dense, inner product"), ("chunk_size", 2 * M)),
        *(("embed_unknown", False), ("searcher", None), ("tokenizer", "other"), ("embedder", "other")),
    ):
        other: Any = dense(MemoryStore(documents, embedder), embedder=embedder)
        if rank:
            if option in ("tokenizer", "embedder"):
                other.store.manifest[option]["fingerprint"] = value
            else:
                place = {"embed_unknown": other.searcher, "chunk_size": other.store}.get(option, other)
                setattr(place, option, value)
        try:
            ShardedRetriever.of(other)
        except InputError as error:
            found[option] = str(error)
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
