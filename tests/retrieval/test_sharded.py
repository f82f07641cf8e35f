"""A set on two ranks against one set: two gloo processes; what fails on one of them fails on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import torch
from retrieval import sharded_worker
from retrieval.sets import BagEmbedder, M, MemoryStore, dense

from retro_kernels.config import InputError
from retro_kernels.retrieval.sharded import ShardedRetriever

WORLD = 2


def test_two_ranks_find_what_one_set_finds(seed: int, tmp_path: Path) -> None:
    small.run_ranks("retrieval/sharded_worker.py", tmp_path, seed, world=WORLD)
    documents = sharded_worker.corpus(seed)
    one = dense(MemoryStore(documents, BagEmbedder()))
    counted = ("calls", "queries", "padding", "looked_up", "embedded")
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert found["num"] == (one.num_chunks, one.num_documents)
        one.stats.reset()
        for call, sizes in enumerate(sharded_worker.BATCHES):
            tokens, exclude = sharded_worker.batch(documents, rank, call, sizes[rank])
            want = one(tokens, num_neighbours=sharded_worker.K, exclude_documents=exclude)
            got_tokens, lengths, ids, distances, owners = found[f"call {call}"]
            # of copies in either shard, equally near up to rounding, one may come before the other
            assert torch.equal(got_tokens[..., :M], want.tokens[..., :M]) and torch.equal(
                ids < 0, want.ids < 0
            )
            assert (ids == want.ids).sum() >= 0.7 * ids.numel()
            assert torch.equal(got_tokens, one.gather(ids)[0]) and torch.equal(lengths, one.gather(ids)[1])
            torch.testing.assert_close(distances, want.distances, rtol=1e-4, atol=1e-4)
            assert torch.equal(owners, one.documents(ids))
            if call == 0:
                assert torch.equal(found["prefetched"], ids)
        assert [found["stats"][name] for name in counted] == [getattr(one.stats, name) for name in counted]
        if rank == 0:
            ids, *gathered = found["evaluated"]
            assert (ids >= 0).all() and all(map(torch.equal, gathered, one.gather(ids)))
        last = one.num_documents - 1
        # the shards' own stores name their documents from 0 on
        local = last - -(-one.num_documents // WORLD)
        assert found["titles"] == (["document 0", ""] if rank else [f"document {local}"])
        assert found["documents"].tolist() == ([40, -1, 0] if rank else [1])
        ranked = [(hit["distance"], hit["chunk"]) for hit in found["hits"]]
        assert ranked == sorted(ranked)
        want_hits = one.search_text(" ".join(map(str, documents[-1][:M])), k=3)
        assert [h["text"] for h in found["hits"]] == [h.text for h in want_hits]
        assert {h["continuation"] for h in found["hits"][:2]} == {h.continuation for h in want_hits[:2]}
        assert "different numbers of neighbours, [2, 3]" in found["different k"]
        for what in ("candidates", "chunk_size", "tokenizer", "embedder"):
            assert "ranks 0 and 1 have different" in found[what], what
        assert found["names"] == ["dense", "dense"] and found["opened"] == ("set", {"device": "cpu"})
        assert "drop_copies is not available for a sharded set" in found["drop_copies"]
        for what in ("embed_unknown", "searcher"):
            assert "a dense retriever with its embedder is needed" in found[what], what
        whole = f"the retrieval set on 2 ranks holds {one.num_chunks:,} chunks"
        assert f"There is no chunk {one.num_chunks}" in found["no chunk"]
        assert whole in found["too many"] and found["after failures"][0] == sharded_worker.BATCHES[0][rank]
        for name, failing, said in (
            *((name, 0, "OSError: the disk is gone") for name in ("lookup", "store", "open")),
            *((name, 1, "OSError: the disk is gone") for name in ("embed", "search", "hashes")),
            ("tokens", 1, "InputError: Retriever: token id"),
            ("text", 0, "InputError: search_text: the text is empty"),
            (
                "titles",
                1,
                f"InputError: There is no document {last + 1}: the retrieval set on 2 ranks has documents 0 to {last}",
            ),
        ):
            kind = "InputFailedElsewhere" if "InputError" in said else "FailedElsewhere"
            other = f"{kind}: ShardedRetriever: rank {failing} failed: {said}"
            assert found["failures"][name].startswith(said if rank == failing else other), name


def test_one_process_is_told_what_to_do(seed: int) -> None:
    with pytest.raises(InputError, match="init_process_group"):
        ShardedRetriever.of(dense(MemoryStore(sharded_worker.corpus(seed), BagEmbedder())))
    with pytest.raises(InputError, match="init_process_group"):
        ShardedRetriever.from_pretrained("x")
    with pytest.raises(InputError, match="only the dense"):
        ShardedRetriever.from_pretrained("x", retriever="bm25")
    for name, value in {"cache": 4, "neighbours": "file", "drop_copies": 0.5}.items():
        with pytest.raises(InputError, match=f"{name} is not available"):
            ShardedRetriever.from_pretrained("x", **{name: value})
