"""Whatever finds the neighbours finds them in squared L2, ascending, with −1 and +inf where there are none."""

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval.corpora import build, documents
from retrieval.sets import Largest, MemoryStore

from retro_kernels.config import InputError
from retro_kernels.ops._backend import numbered
from retro_kernels.retrieval import index as index_module
from retro_kernels.retrieval import store as store_module
from retro_kernels.retrieval.index import (
    GroundTruth,
    Index,
    check_factory,
    choose_factory,
    exact_search,
    least,
)
from retro_kernels.retrieval.merge import tune_retrieval_set
from retro_kernels.retrieval.retriever import Retriever
from retro_kernels.retrieval.store import INDEX, ChunkStore, file_sha256

faiss = pytest.importorskip("faiss")
FACTORIES = [
    "Flat",
    "SQfp16",
    "HNSW16,SQ8",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ16x4fs,Refine(SQfp16)",
    "IVF16,PQ16x4fs,RFlat",
    "PCAR20,IVF16,PQ10x4fs,RFlat",
    "RaBitQ8",
    "IVF16,RaBitQ4",
]


def clustered(seed: int, n: int = 2000, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, dim))
    return (centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, dim))).astype(np.float16)


def definition(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.square(queries[:, None].astype(np.float64) - vectors[None].astype(np.float64)).sum(-1)
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, 1), ids


@pytest.fixture(params=["faiss", "torch"])
def searcher(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(index_module, "_faiss", lambda: None)
    return request.param


@pytest.mark.parametrize("count", [1, 5, 70])
def test_exact_search_is_exact(searcher, count, seed, monkeypatch):
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 300)
    monkeypatch.setattr(index_module, "_BLOCK_QUERIES", 7)
    vectors, queries = clustered(seed), clustered(seed + 1, count)
    index = Index.build(vectors)
    assert (
        index.is_exact
        and len(index) == 2000
        and type(index._searcher).__name__.lower().startswith("_" + searcher)
    )
    distances, ids = index.search(torch.from_numpy(queries), 10)
    expected, _ = definition(vectors, queries, 10)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)
    # each once, and those of the definition, but for ties to within rounding
    np.testing.assert_array_equal(np.diff(np.sort(ids.numpy())) > 0, True)
    difference = vectors[ids.numpy()].astype(np.float64) - queries[:, None].astype(np.float64)
    np.testing.assert_allclose((difference**2).sum(-1), expected, rtol=1e-4, atol=1e-4)
    assert distances.dtype == torch.float32 and ids.dtype == torch.int64


def test_an_exact_index_keeps_its_vectors_where_they_are(monkeypatch):
    """A first search that brought them together would need their memory twice; of two searches on two streams of a GPU,
    the second would read what the first has yet to write."""
    monkeypatch.setattr(index_module, "_faiss", lambda: None)
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 300)
    vectors = clustered(0)
    index = Index.build(vectors[:1100])
    index.add(vectors[1100:])
    with Largest() as largest:
        _, ids = index.search(vectors[1500:1503], 1)
    assert ids[:, 0].tolist() == [1500, 1501, 1502] and largest.elements <= 300 * vectors.shape[1]


def test_own_vector_is_at_distance_zero(searcher, seed):
    vectors = clustered(seed, 100)
    distances, ids = Index.build(vectors).search(vectors, 1)
    assert ids[:, 0].tolist() == list(range(100))
    assert (distances >= 0).all() and (distances < 1e-3).all()


def test_more_neighbours_than_vectors(searcher, seed):
    vectors = clustered(seed, 5)
    distances, ids = Index.build(vectors).search(clustered(seed + 1, 3), 9)
    assert (ids[:, 5:] == -1).all() and distances[:, 5:].isinf().all() and distances[:, :5].isfinite().all()
    assert ids[:, :5].sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_kind_finds_neighbours(factory, seed):
    vectors = clustered(seed)
    seen = []
    index = Index.build(vectors, factory, progress=seen.append)
    assert sum(seen) == len(index) == 2000
    result = index.tune(vectors, 0.9)
    assert result["recall"] > 0.8 and result["queries"] == 1000 and result["queries_per_second"] > 0, factory
    distances, ids = index.search(vectors[:50], 12)
    assert (distances[:, 1:] >= distances[:, :-1]).all() and (
        ids < 2000
    ).all()  # +inf, where fewer are found, too
    filled = ids >= 0
    assert distances[filled].isfinite().all() and (distances[~filled] == math.inf).all()


def test_lists_that_are_not_probed_leave_places_empty(seed):
    vectors = clustered(seed, 400)
    index = Index.build(vectors, "IVF16,Flat")
    index.configure("nprobe=1")
    distances, ids = index.search(vectors[:20], 300)
    assert (ids == -1).any() and ((ids == -1) == distances.isinf()).all()


def test_recall_is_that_of_the_definition(seed):
    vectors = np.random.default_rng(seed).standard_normal((500, 8)).astype(np.float16)
    index = Index.build(vectors, "IVF16,Flat")
    index.configure("nprobe=2")
    truth = GroundTruth(vectors, k=5, num_queries=100, seed=seed)
    _, exact = definition(vectors, vectors[truth.rows], 6)
    _, found = index.search(vectors[truth.rows], 6)
    recall = np.mean(
        [
            len(set(e.tolist()) - {row}) and len((set(e.tolist()) & set(f)) - {row}) / 5
            for e, f, row in zip(exact, found.tolist(), truth.rows.tolist(), strict=True)
        ]
    )
    assert truth.measure(index)["recall"] == pytest.approx(recall, abs=0.02) and recall < 0.99


def test_copies_of_a_vector_stand_for_each_other(seed):
    vectors = np.repeat(clustered(seed, 50), 20, axis=0)
    assert Index.build(vectors).measure(vectors)["recall"] == 1.0


def test_tuning_takes_the_fastest_that_reaches_the_target(seed):
    vectors = clustered(seed)
    index = Index.build(vectors, "IVF64,Flat")
    low, high = index.tune(vectors, 0.5), index.tune(vectors, 0.999)
    assert low["reached"] and high["reached"] and high["recall"] >= 0.999 and index.setting == high["search"]
    assert int(low["search"].split("=")[1]) < int(high["search"].split("=")[1])
    codes = Index.build(vectors, "IVF16,PQ4x4fs").tune(vectors, 0.999)
    assert not codes["reached"] and codes["target"] == 0.999
    with pytest.raises(InputError, match="recall is 1.5"):
        index.tune(vectors, 1.5)


def test_lists_and_candidates_are_tuned_together(seed, monkeypatch):
    """The cheapest pair that reaches the target is taken, whichever of the two costs more."""
    vectors = np.random.default_rng(seed).standard_normal((2000, 16)).astype(np.float16)
    index = Index.build(vectors, "IVF64,PQ8x4fs,RFlat")
    measured, chosen = GroundTruth.measure, {}

    def cost(setting, costly):
        values = dict(part.split("=") for part in setting.split(","))
        return sum(int(value) * (100 if name == costly else 1) for name, value in values.items())

    for costly in ("nprobe", "k_factor_rf"):
        reached = []

        def measure(self, index, costly=costly, reached=reached):
            result = {**measured(self, index), "queries_per_second": 1e6 / cost(index.setting, costly)}
            if result["recall"] >= 0.9:
                reached.append(index.setting)
            return result

        monkeypatch.setattr(GroundTruth, "measure", measure)
        result = index.tune(vectors, 0.9, num_queries=200)
        assert result["reached"] and index.setting == result["search"]
        assert cost(result["search"], costly) == min(cost(setting, costly) for setting in reached)
        chosen[costly] = result["search"]
    assert len({setting.split(",")[0] for setting in reached}) > 1
    assert cost(chosen["nprobe"], "k_factor_rf") >= cost(chosen["k_factor_rf"], "k_factor_rf")


@pytest.mark.parametrize("limit", [1, 2, 3, 16, 17, 40, 63, 64, 1000])
def test_the_least_value_is_closed_in_upon(limit):
    tried = []

    def reaches(value):
        tried.append(value)
        return value >= limit

    found = least([1, 2, 4, 8, 16, 32, 64], reaches)
    if limit > 64:
        assert found is None and len(tried) == 7
        return
    # three halvings of a ratio of 2 leave one of 2^(1/8), rounding aside
    assert limit <= found <= max(limit * 2**0.125 + 1, 1) and found in tried


def test_few_vectors():
    for n in (1, 2, 3):
        result = Index.build(np.eye(4, dtype=np.float16)[:n]).measure(np.eye(4, dtype=np.float16)[:n])
        assert result["recall"] == 1.0
    with pytest.raises(InputError, match="no vectors"):
        Index.build(np.zeros((0, 4), np.float16))


def test_added_vectors_are_found(searcher, seed):
    vectors = clustered(seed)
    index = Index.build(vectors[:1500])
    index.search(vectors[:3], 2)
    index.add(vectors[1500:])
    assert index.search(vectors[1990:], 1)[1][:, 0].tolist() == list(range(1990, 2000))


def test_queries_of_any_kind(seed):
    vectors = clustered(seed, 300)
    index = Index.build(vectors)
    expected = index.search(torch.from_numpy(vectors[:4].astype(np.float32)), 3)[1]
    transposed = torch.from_numpy(vectors[:4].astype(np.float64).T.copy()).T
    for queries in (
        torch.from_numpy(vectors[:4]),
        torch.from_numpy(vectors[:4]).bfloat16(),
        transposed,
        vectors[:4],
    ):
        assert torch.equal(index.search(queries, 3)[1][:, 0], expected[:, 0])
    distances, ids = index.search(torch.zeros(0, 32), 3)
    assert distances.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    "queries, k, message", [((2, 31), 1, r"\[2, 31\]"), ((32,), 1, r"\[32\]"), ((2, 32), 0, "k is 0")]
)
def test_wrong_queries(queries, k, message):
    with pytest.raises(ValueError, match=message):
        Index.build(clustered(0, 50)).search(torch.zeros(queries), k)


def test_queries_that_are_none():
    index = Index.build(clustered(0, 50))
    with pytest.raises(TypeError, match="queries must be a tensor or an array .*not list"):
        index.search([[0.0] * 32], 1)
    with pytest.raises(InputError, match="k is 2.0"):
        index.search(torch.zeros(1, 32), 2.0)


@pytest.mark.parametrize(
    "factory, message",
    [
        ("Nonsense", "knows no index 'Nonsense'"),
        ("IVF64,Flat", "so few vectors.*50"),
        ("PQ7", "PQ7"),
        ("CAGRA", "cuVS"),
    ],
)
def test_factories_that_do_not_work(factory, message):
    with pytest.raises(InputError, match=message):
        Index.build(clustered(0, 50), factory)


@pytest.mark.parametrize(
    "factory, why",
    [
        *((factory, "Leave IDMap out") for factory in ("IDMap,Flat", "IDMap2,HNSW32", "IDMap,IVF64,Flat")),
        *((factory, "it counts differing bits") for factory in ("LSH", "ITQ16,LSH", "IVF4,ITQ16,SH1.2")),
        *((factory, "it normalises vectors") for factory in ("L2norm,Flat", "L2norm,SQ8", "ITQ16,Flat")),
        ("PCAW16,Flat", "take PCA or PCAR"),
        ("SQ8_direct", "not near the squared L2 distances"),
        *((factory, "PCA makes 64 dimensions out of 32") for factory in ("PCA64,Flat", "PCAR64,IVF4,SQ8")),
        ("OPQ7,IVF4,PQ8", "OPQ cuts 32 dimensions into 7"),
        *(
            (factory, "can be 0")
            for factory in ("PQ8x0", "IVF16,PQ8x4fs_0", "HNSW0", "HNSW1,Flat", "RR0,SQ8")
        ),
    ],
)
def test_factories_that_are_none_of_vectors_by_squared_l2(factory, why):
    with pytest.raises(InputError, match=f"The index {factory} cannot be used: .*{why}"):
        check_factory(factory, 32)


@pytest.mark.parametrize(
    "factory", [*FACTORIES, "PCAW16,Flat,RFlat", "LSH,RFlat", "NSG16,Flat", "Pad64,Flat"]
)
def test_factories_that_work_are_let_through(factory, seed):
    check_factory(factory, 32)
    vectors = clustered(seed)
    index = Index.build(vectors, factory)
    distances, ids = index.search(vectors[:50], 3)
    exact = torch.from_numpy(((vectors[ids.clamp(min=0)] - vectors[:50, None]).astype("f4") ** 2).sum(-1))
    typical = float(((vectors[:50] - vectors[50:100]).astype("f4") ** 2).sum(-1).mean())
    assert float((distances - exact)[ids >= 0].abs().median()) < 0.25 * typical


def test_a_graph_that_takes_its_vectors_at_once_gets_them_so(seed, monkeypatch):
    vectors, told = clustered(seed), []
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 100)
    index = Index.build(vectors, "NSG16,Flat", progress=told.append)
    found = index.search(vectors[:50], 1)[1][:, 0]
    assert told == [len(vectors)] == [len(index)] and (found == torch.arange(50)).float().mean() > 0.9


def test_what_faiss_refuses_while_it_is_filled_is_bad_input():
    with pytest.raises(InputError, match="These vectors cannot be added to IndexNSG.*Without --index"):
        Index.build(clustered(0, 50), "NSG16,Flat")


@pytest.mark.parametrize("name", ["IVF32", "IVF2k", "PCAR16,IVF1k,PQ8x4fs,RFlat", "HNSW32,SQ8"])
def test_number_of_lists(name):
    index = faiss.index_factory(32, name if "," in name else f"{name},Flat")
    parts = index_module._nested(index)
    assert index_module._lists_of(name) == next((part.nlist for part in parts if hasattr(part, "nlist")), 0)
    assert index_module._lists_of("IVF2M,Flat") == 2 << 20


def test_settings_out_of_range(seed):
    vectors = clustered(seed)
    index = Index.build(vectors, "IVF16,PQ16x4fs,RFlat")
    for setting in ("nprobe=0", "k_factor_rf=0", "nprobe=2,k_factor_rf=1001"):
        with pytest.raises(InputError, match="it must be at least 1"):
            index.configure(setting)
    index.configure("nprobe=16,k_factor_rf=1000")
    expected = index.search(vectors[:5], 3)
    index.configure("nprobe=999999999,k_factor_rf=1000")  # all lists, and no memory for more
    for a, b in zip(index.search(vectors[:5], 3), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "factory", ["IVF16,PQ16x4fs,RFlat", "HNSW8,SQ8,Refine(SQfp16)", "PCAR16,IVF4,SQ8,RFlat"]
)
def test_queries_are_refined_some_at_a_time(factory, seed, monkeypatch):
    vectors, queries = clustered(seed), clustered(seed + 1, 50)
    index = Index.build(vectors, factory)
    index.configure("k_factor_rf=7")
    expected, calls = index.search(queries, 5), []
    searched = type(index._searcher.index).search_c

    def search(self, n, *args):
        calls.append(n)
        return searched(self, n, *args)

    monkeypatch.setattr(type(index._searcher.index), "search_c", search)
    monkeypatch.setattr(index_module, "_CANDIDATES", 5 * 7 * 12)
    for a, b in zip(index.search(queries, 5), expected, strict=True):
        assert torch.equal(a, b)
    assert calls == [12, 12, 12, 12, 2]


def test_settings_that_do_not_exist(seed):
    index = Index.build(clustered(seed, 100), "HNSW8,Flat")
    for setting in ("nprobe=3", "nprobe", "efSearch=3;quit", "", "efSearch=-1", 3):
        with pytest.raises(InputError):
            index.configure(setting)
    index.configure("efSearch=50")
    assert index.setting == "efSearch=50"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("n", [1, 1000, 100_001, 2_000_000, 50_000_000, 2_000_000_000])
@pytest.mark.parametrize("dim", [64, 384, 768, 33])
def test_the_chosen_factory_exists(n, dim, device):
    factory = choose_factory(n, dim, device)
    faiss.index_factory(dim, factory)
    assert (factory == "Flat") == (n <= (100_000 if device == "cpu" else 20_000_000))


def test_the_factory_is_that_of_the_table():
    for device, n, factory in (
        ("cpu", 100_000, "Flat"),
        ("cpu", 100_001, "PCAR256,IVF1024,PQ128x4fs,RFlat"),
        ("cpu", 2_000_000, "PCAR256,IVF4096,PQ128x4fs,RFlat"),
        ("cpu", 2_000_001, "PCAR256,IVF4096,PQ128x4fs,Refine(SQfp16)"),
        ("cpu", 20_000_000, "PCAR256,IVF16384,PQ128x4fs,Refine(SQfp16)"),
        ("cpu", 20_000_001, "IVF16384,RaBitQ4"),
        ("cuda", 20_000_000, "Flat"),
        ("cuda", 20_000_001, "IVF16384,SQfp16"),
        ("cuda", 100_000_000, "IVF32768,SQfp16"),
        ("cuda", 100_000_001, "IVF32768,PQ48"),
    ):
        assert choose_factory(n, 384, device) == factory
    assert choose_factory(100_000_001, 33, "cuda") == "IVF32768,SQfp16"  # whose codes would not divide it


def test_what_is_trained_on_is_a_sample_of_all_rows(seed):
    vectors = np.arange(70_000, dtype=np.float32)[:, None]
    for factory, count in (
        ("PQ1", 65_536),
        ("IVF16,Flat", 65_536),
        ("IVF1050,Flat", 67_200),
        ("IVF2k,Flat", 70_000),
    ):
        sample = index_module._training_sample(vectors, factory, seed)[:, 0]
        assert len(sample) == count and (np.diff(sample) > 0).all()
        if count < 70_000:
            assert sample[0] < 1000 and sample[-1] > 69_000
            assert not np.array_equal(sample, index_module._training_sample(vectors, factory, seed + 1)[:, 0])


@pytest.mark.parametrize("recall", [0.0, -0.1, 1.01, math.nan])
def test_recalls_that_cannot_be_asked(recall):
    index_module.check_recall(1.0)
    with pytest.raises(InputError, match="above 0 and up to 1"):
        index_module.check_recall(recall)


def test_without_faiss(monkeypatch):
    monkeypatch.setattr(index_module, "_faiss", lambda: None)
    with pytest.raises(ImportError, match=r"faiss-cpu.*faiss-gpu.*Never both"):
        Index.build(clustered(0, 50), "HNSW8")
    assert choose_factory(10**6, 384) == "Flat"


def test_blocks_are_merged_in_order(monkeypatch):
    monkeypatch.setattr(index_module, "_BLOCK_ROWS", 3)
    vectors = np.zeros((10, 4), np.float16)
    vectors[7] = 1
    distances, ids = exact_search(vectors, torch.ones(1, 4), 4)
    assert ids[0, 0] == 7 and distances[0].tolist() == [0, 4, 4, 4] and (ids[0, 1:] < 3).all()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "set"
    build(documents(3, 40), out, index="IVF4,SQfp16", recall=0.9)
    return out


class TestInASet:
    def test_opened_as_it_was_tuned(self, path):
        store = ChunkStore.open(path)
        index = Index.open(store)
        assert index.factory == "IVF4,SQfp16" and index.setting == store.manifest["index"]["search"] != ""
        assert index.measure(store.embeddings)["recall"] == store.manifest["index"]["recall"] >= 0.9
        index.configure("nprobe=4")
        exact = exact_search(store.embeddings, torch.from_numpy(store.embeddings[:9].astype(np.float32)), 1)
        torch.testing.assert_close(index.search(store.embeddings[:9], 1)[0], exact[0], atol=1e-3, rtol=0)

    def test_a_changed_file_never_reaches_faiss(self, path, monkeypatch):
        content = bytearray((path / INDEX).read_bytes())
        monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("parsed"))
        try:
            (path / INDEX).write_bytes(content[:50] + b"\xff" + content[51:])
            with pytest.raises(InputError, match="index.faiss has changed"):
                Index.open(path)
        finally:
            (path / INDEX).write_bytes(content)

    def test_lists_in_another_file_are_not_read(self, path, tmp_path):
        store = ChunkStore.open(path)
        content = (path / INDEX).read_bytes()
        index = faiss.read_index(str(path / INDEX))
        lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "lists"))
        lists.merge_from(index.invlists, 0)
        index.replace_invlists(lists)
        try:
            faiss.write_index(index, str(path / INDEX))
            entry = store.manifest["files"][INDEX]
            entry["sha256"] = index_module.check_checksum.__globals__["file_sha256"](path / INDEX)
            with pytest.raises(InputError, match=f"could not open {path}/lists in mode r:"):
                Index.open(store)
            (path / "lists").write_bytes((tmp_path / "lists").read_bytes())
            with pytest.raises(InputError, match="keeps its lists in another file"):
                Index.open(store)
        finally:
            (path / INDEX).write_bytes(content)
            (path / "lists").unlink(missing_ok=True)

    @pytest.mark.parametrize("moment", ["before it is checked", "before it is read"])
    @pytest.mark.parametrize("replacements", [["Flat"], ["IVF2,SQfp16"], ["IVF2,SQfp16", "IVF3,SQfp16"]])
    def test_a_set_that_is_replaced_before_its_index_is_read(
        self, path, tmp_path, monkeypatch, moment, replacements
    ):
        copy = shutil.copytree(path, tmp_path / "copy")
        where, name = (
            (index_module, "check_checksum") if "checked" in moment else (index_module._FaissSearcher, "read")
        )
        usual, left = getattr(where, name), list(replacements)

        def replace_first(*args, **options):
            if left:
                with monkeypatch.context() as patch:
                    patch.setattr(where, name, usual)
                    build(documents(4, 40), copy, index=left.pop(0), recall=0.9, overwrite=True)
            return usual(*args, **options)

        monkeypatch.setattr(where, name, replace_first)
        if len(replacements) == 2:
            with pytest.raises(InputError, match="was replaced while it was being opened. Open it again"):
                Index.open(copy)
            return
        retriever = Retriever.from_pretrained(copy)
        assert retriever.searcher.index.factory == replacements[0] and not left
        vectors = ChunkStore.open(copy).embeddings
        assert np.array_equal(retriever.store.embeddings, vectors)
        nearest = retriever.searcher.index.search(vectors[:50], 1)[0]
        torch.testing.assert_close(nearest, torch.zeros(50, 1), atol=1e-2, rtol=0)

    def test_a_file_that_goes_while_a_set_is_opened(self, path, tmp_path, monkeypatch):
        copy = shutil.copytree(path, tmp_path / "copy")
        usual, left = store_module.check_checksum, ["Flat"]  # which has no index file

        def replace_first(folder, name, entry):
            if name == INDEX and left:
                build(documents(4, 40), copy, index=left.pop(), overwrite=True)
            usual(folder, name, entry)

        monkeypatch.setattr(store_module, "check_checksum", replace_first)
        assert ChunkStore.open(copy).manifest["index"]["factory"] == "Flat" and not left

    def test_a_set_that_was_replaced_since_it_was_opened_is_not_called_damaged(self, path, tmp_path):
        copy = shutil.copytree(path, tmp_path / "copy")
        store = ChunkStore.open(copy)
        build(documents(4, 40), copy, index="Flat", overwrite=True)
        with pytest.raises(InputError, match="was replaced while it was being opened"):
            Index.open(store)
        tuned = shutil.copytree(path, tmp_path / "tuned")
        store = ChunkStore.open(tuned)
        tune_retrieval_set(tuned, 0.5, progress=False)  # which exchanges the manifest alone
        assert len(Index.open(store)) == store.num_chunks

    def test_another_index_is_refused(self, path):
        store = ChunkStore.open(path)
        content = (path / INDEX).read_bytes()
        try:
            for other in (faiss.IndexFlatL2(64), faiss.IndexFlatL2(8), faiss.IndexFlatIP(64)):
                if other.d == 8 or other.metric_type == faiss.METRIC_INNER_PRODUCT:  # else there are too few
                    other.add(store.embeddings[:, : other.d].astype(np.float32))
                faiss.write_index(other, str(path / INDEX))
                entry = store.manifest["files"][INDEX]
                entry["sha256"] = index_module.check_checksum.__globals__["file_sha256"](path / INDEX)
                with pytest.raises(InputError, match="belong there"):
                    Index.open(store)
        finally:
            (path / INDEX).write_bytes(content)


def test_a_file_appears_whole_or_not_at_all(tmp_path, seed, monkeypatch):
    index = Index.build(clustered(seed, 100), "HNSW8,Flat")
    with pytest.raises(OSError, match="could not be written"):
        index.save(tmp_path / "missing" / "x")
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    index.save(tmp_path / "index.faiss")
    assert (tmp_path / "index.faiss").stat().st_ino in synced  # on the disk, before it has that name
    (tmp_path / "index.faiss").unlink()

    def full(index, path):
        open(path, "wb").close()
        raise RuntimeError("Error: write error (No space left on device)")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match="No space left"):
        index.save(tmp_path / "index.faiss")
    assert list(tmp_path.iterdir()) == []


def stored(folder, index: Index, vectors: np.ndarray, trained: str | None) -> ChunkStore:
    """A set that has `index`, which is as good as one built from text."""
    store = MemoryStore.of_arrays(np.ones((len(vectors), 8), np.uint16), np.arange(len(vectors)), vectors)
    store.path = folder
    folder.mkdir()
    index.save(folder / INDEX)
    store.manifest["index"] = {"factory": index.factory, "trained": trained}
    store.manifest["files"][INDEX] = {"sha256": file_sha256(folder / INDEX)}
    return store


def parts_and_whole(
    folder, factory: str, vectors: np.ndarray, ends: Sequence[int] = (903, 950)
) -> tuple[list[ChunkStore], Index]:
    """Sets whose indexes began with the same trained one, and that one with the vectors of all of them."""
    whole = Index.train(vectors, factory)
    trained = whole.trained_state()
    whole.save(folder / "trained")
    first = Index.load(folder / "trained", factory)
    assert first.trained_state() == trained
    stores: list[ChunkStore] = []
    for i, rows in enumerate(np.split(vectors, ends)):
        index = Index.open_trained(stores[0]) if stores else first
        assert len(index) == 0
        index.add(rows)
        if index.setting == "" and "IVF" in factory:
            index.configure("nprobe=3")  # a setting is no part of what was trained
        stores.append(stored(folder / str(i), index, rows, trained))
        whole.add(rows)
    return stores, whole


CHOSEN = [re.sub(r"IVF\d+", "IVF16", choose_factory(n, 32)) for n in (10**6, 10**7, 10**8)]
JOINABLE = [
    *CHOSEN,
    *(
        "IVF16,Flat",
        "IVF16,SQ8",
        "IVF16,SQfp16",
        "IVF16,PQ8np",
        "IVF16_HNSW8,SQ8",
        "OPQ16,IVF16,PQ16x4fs,RFlat",
    ),
    *("SQ8", "PQ8np", "RaBitQ4", "PQ8np,RFlat", "PCA16,SQ8"),
]


def kinds(index: Index) -> set[str]:
    return {type(part).__name__ for part in index_module._nested(index._searcher.index)}


@pytest.mark.parametrize("factory", JOINABLE)
def test_joined_indexes_find_what_one_index_finds(factory, seed, tmp_path):
    vectors, queries = clustered(seed), clustered(seed + 1, 200)
    stores, whole = parts_and_whole(tmp_path, factory, vectors)
    joined = Index.join(stores)
    assert len(joined) == len(vectors) and joined.factory == factory
    joined.save(tmp_path / "joined")
    for index in (joined, Index.load(tmp_path / "joined", factory)):
        for probes in ("nprobe=1", "nprobe=5", "nprobe=16") if "IVF" in factory else (None,):
            for factor in (
                ("k_factor_rf=1", "k_factor_rf=6") if "Refine" in factory or "RFlat" in factory else (None,)
            ):
                for setting in filter(None, (probes, factor)):
                    index.configure(setting)
                    whole.configure(setting)
                for found, expected in zip(index.search(queries, 10), whole.search(queries, 10), strict=True):
                    assert torch.equal(found, expected)
    joined.add(vectors[:5])
    assert len(joined) == len(vectors) + 5


@pytest.mark.parametrize("per_block", [32, 64, 96])
def test_lists_of_blocks_are_joined_at_every_place_in_a_block(seed, tmp_path, per_block):
    """One list: joined within a block, at its end, and where the vectors before are as many as the bytes of one or
    several blocks. The file is the same too, so no memory is left in it where there is no vector."""
    vectors = clustered(seed, 300, 8)
    factory = f"IVF1,PQ3x4fs_{per_block}" if per_block > 32 else "IVF1,PQ4x4fs"
    vectors = vectors if per_block == 32 else clustered(seed, 300, 6)
    stores, whole = parts_and_whole(tmp_path, factory, vectors, (31, 32, 64, 65, 128, 192, 197, 256))
    joined = Index.join(stores)
    lists = faiss.downcast_InvertedLists(joined._searcher.index.invlists)
    assert (lists.n_per_block, lists.block_size) == (per_block, 2 * per_block)
    joined.configure("nprobe=1"), whole.configure("nprobe=1")
    assert np.array_equal(
        faiss.serialize_index(joined._searcher.index), faiss.serialize_index(whole._searcher.index)
    )
    for found, expected in zip(joined.search(vectors, 300), whole.search(vectors, 300), strict=True):
        assert torch.equal(found, expected)


JOINED_AT_WHOLE_BLOCKS = """
    import sys, numpy as np
    from pathlib import Path
    from retrieval.test_index import clustered, parts_and_whole
    from retro_kernels.retrieval import Index

    vectors = clustered(int(sys.argv[2]), 64 * 3000 + 5, 8)
    stores, whole = parts_and_whole(Path(sys.argv[1]), "IVF1,PQ4x4fs", vectors, (64 * 3000,))
    joined = Index.join(stores)
    for found, expected in zip(joined.search(vectors[-5:], 10), whole.search(vectors[-5:], 10)):
        assert np.array_equal(found, expected)
"""


def test_joining_writes_nothing_past_a_list(seed, tmp_path):
    """FAISS's own way copies 384 kB behind the end of such a list, which ends the process: so in one of its own."""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(JOINED_AT_WHOLE_BLOCKS), tmp_path, str(seed)],
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kind_that_is_said_to_be_joinable_is_tested(tmp_path):
    tested = set()
    for factory in JOINABLE:
        index = Index.train(clustered(0), factory)
        index.save(tmp_path / "index")
        tested |= kinds(index) | kinds(
            Index.load(tmp_path / "index", factory)
        )  # RFlat has another name in a file
    assert tested == set(index_module._JOINABLE)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,SQ8", "PQ16x4fs"])
def test_kinds_that_are_not_joined(factory):
    assert Index.train(clustered(0), factory).trained_state() is None


def test_what_was_trained_apart_is_told_apart(seed):
    vectors = clustered(seed)
    for factory in ("IVF16,Flat", "IVF16,PQ16x4fs,RFlat"):
        first, second = (Index.train(part, factory) for part in (vectors[:1900], vectors[100:]))
        assert first.trained_state() != second.trained_state()
    index = Index.build(vectors, "IVF16,Flat")
    with pytest.raises(ValueError, match="holds vectors"):
        index.trained_state()


def test_one_part_is_in_memory_at_a_time(seed, tmp_path, monkeypatch):
    stores, _ = parts_and_whole(tmp_path, "IVF16,PQ16x4fs,RFlat", clustered(seed))
    opened: list[weakref.ref[Index]] = []
    usual = Index.open

    def open_alone(store, **options):
        assert all(ref() is None for ref in opened)
        index = usual(store, **options)
        opened.append(weakref.ref(index))
        return index

    monkeypatch.setattr(Index, "open", open_alone)
    Index.join(stores)
    assert len(opened) == 4  # the first lends its training, too


def test_room_is_made_once(seed, tmp_path):
    """What lies in one piece is not copied when a part is added: it would be there twice."""
    stores, _ = parts_and_whole(tmp_path, "IVF16,PQ16x4fs,RFlat", clustered(seed))
    index = Index.open_trained(stores[0])
    index._searcher.reserve(2000)
    places = set()
    for store in stores:
        index._take(store)
        places.add(int(index_module._nested(index._searcher.index)[2].codes.data()))
    assert len(index) == 2000 and len(places) == 1


@pytest.mark.parametrize(
    "factory, other",
    [
        *(("IVF16,Flat", other) for other in ("IVF16,SQ8", "IVF8,Flat", "IVF16,Flat", "IVF16,Flat,RFlat")),
        ("PCAR8,Flat", "PCAR8,Flat"),  # which FAISS joins, whatever the two PCAs are
    ],
)
def test_a_manifest_that_is_wrong_about_the_training_is_noticed(factory, other, seed, tmp_path):
    vectors = clustered(seed)
    (first, *_), _ = parts_and_whole(tmp_path, factory, vectors)
    wrong = stored(
        tmp_path / "wrong",
        Index.build(vectors[5:500], other),
        vectors[5:500],
        first.manifest["index"]["trained"],
    )
    for stores in ([first, wrong], [wrong, first]):
        with pytest.raises(InputError, match="wrong.*(not what its manifest says|cannot join)"):
            Index.join(stores)


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQfp16", "IVF16,PQ16", "CAGRA"])
def test_on_a_gpu(factory, seed, tmp_path):
    if factory != "Flat" and not index_module._has_gpu_faiss():
        pytest.skip("this FAISS has no GPU code")
    if factory == "CAGRA" and not hasattr(faiss, "GpuIndexCagra"):
        pytest.skip("this FAISS has no cuVS")
    vectors = clustered(seed, 20_000)
    index = Index.build(vectors, factory, device="cuda")
    # the graph of separate clusters is not connected: it takes many candidates to begin in the right one
    tuned = index.tune(vectors, 0.99, num_queries=200)
    assert tuned["recall"] > (0.6 if "PQ" in factory else 0.95), tuned
    queries = torch.from_numpy(vectors[:64]).cuda().float()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            distances, ids = index.search(queries, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert ids.is_cuda and (ids[:, 0].cpu() == torch.arange(64)).float().mean() > 0.9
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    if factory not in ("Flat",):
        index.save(tmp_path / "index.faiss")
        assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == 20_000
        loaded = Index.load(tmp_path / "index.faiss", factory, device="cuda")
        loaded.configure(index.setting)
        assert len(loaded) == 20_000 and (loaded.search(queries, 5)[1] == ids).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 100, 600, 1024])
def test_a_graph_on_a_gpu_finds_more_than_it_keeps_by_itself(k, seed):
    if not index_module._has_gpu_faiss() or not hasattr(faiss, "GpuIndexCagra"):
        pytest.skip("this FAISS has no cuVS")
    vectors = np.random.default_rng(seed).standard_normal((20_000, 32)).astype(np.float16)
    index = Index.build(vectors, "CAGRA", device="cuda")
    distances, ids = index.search(torch.from_numpy(vectors[:64]).cuda(), k)
    expected = definition(vectors, vectors[:64], k)[1]
    found = [len(np.intersect1d(*both)) / k for both in zip(ids.cpu().numpy(), expected, strict=True)]
    assert np.mean(found) > 0.8
    assert (distances[:, 1:] >= distances[:, :-1]).all()


def test_a_graph_of_cuvs_is_asked_for_as_many_candidates_as_it_has_to_keep(monkeypatch):
    asked = []

    class Graph:
        ntotal, d = 1000, 8

        def search_c(self, n, queries, k, distances, ids, parameters):
            asked.append(parameters.itopk_size)

    monkeypatch.setattr(faiss, "SearchParametersCagra", types.SimpleNamespace, raising=False)
    searcher = index_module._CagraSearcher(Graph(), torch.device("cpu"))
    monkeypatch.setattr(searcher, "_factor", lambda: 1)
    index = Index(searcher, "CAGRA", 8)
    for setting, k in ((None, 10), ("efSearch=100", 10), ("efSearch=16", 40), ("efSearch=1", 3)):
        if setting:
            index.configure(setting)
        index.search(torch.zeros(5, 8), k)
    assert asked == [64, 128, 64, 32]
    for setting in ("nprobe=3", "efSearch=0", "efSearch=3,nprobe=3"):
        with pytest.raises(InputError, match="CAGRA has no search setting"):
            index.configure(setting)
    Graph.ntotal = 2000
    with pytest.raises(ValueError, match="k is 1,025; the index CAGRA on cpu finds at most 1,024"):
        index.search(torch.zeros(5, 8), 1025)


@pytest.mark.gpu
def test_kinds_that_stay_on_the_cpu(seed):
    if not index_module._has_gpu_faiss():
        pytest.skip("this FAISS has no GPU code")
    with pytest.raises(InputError, match="cannot run on a GPU"):
        Index.build(clustered(seed), "HNSW8,Flat", device="cuda")


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on it say cuda:1, and "cuda" is not equal to that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert numbered("cuda") == torch.device("cuda:1") == numbered(torch.device("cuda"))
    assert numbered("cuda:0") == torch.device("cuda:0") and numbered(None) == torch.device("cpu")


@pytest.mark.parametrize("why", ["FAISS without GPUs", "a kind that no GPU has", "cuVS is missing"])
def test_what_cannot_run_on_a_gpu_is_searched_on_the_cpu_where_that_is_allowed(
    why, tmp_path, seed, monkeypatch
):
    build(documents(seed), tmp_path / "set", index="IVF2,SQ8")
    monkeypatch.setattr(index_module, "_has_gpu_faiss", lambda: why != "FAISS without GPUs")
    monkeypatch.setattr(index_module, "_gpu_resources", lambda device: None)
    monkeypatch.setattr(index_module, "_device_number", lambda device: 0)
    if why == "cuVS is missing":
        monkeypatch.setattr(faiss, "IndexHNSWCagra", faiss.IndexIVF, raising=False)
        monkeypatch.delattr(faiss, "GpuIndexCagra", raising=False)

    def refuse(*_):
        raise RuntimeError(
            "Error in file.cpp:12: Error: 'false' failed: not implemented for this kind of Index"
        )

    monkeypatch.setattr(faiss, "GpuClonerOptions", lambda: type("Options", (), {})(), raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse, raising=False)
    with pytest.raises((InputError, ImportError), match="IVF2,SQ8"):
        Index.open(tmp_path / "set", device="cuda")
    said = {"FAISS without GPUs": "needs FAISS with GPUs", "cuVS is missing": "without cuVS"}.get(
        why, "not implemented"
    )
    with pytest.warns(UserWarning, match=f"is searched on the CPU, the rest stays on cuda.*IVF2,SQ8.*{said}"):
        index = Index.open(tmp_path / "set", device="cuda", or_cpu=True)
    assert index.device.type == "cpu"
    store = ChunkStore.open(tmp_path / "set")
    on_cpu = Index.open(store)
    for a, b in zip(
        index.search(store.embeddings[:9], 3), on_cpu.search(store.embeddings[:9], 3), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("version", "threshold"),
    [
        ("1.12.0", 6),
        ("1.14.3", 6),
        ("1.14.1.post1", 6),
        ("1.9", 6),
        ("1.15.0", 2304),
        ("1.15.1", 2304),
        ("2.0.0", 2304),
    ],
)
def test_blas_is_used_from_six_queries_on_in_every_faiss(version, threshold, seed, monkeypatch):
    vectors = np.random.default_rng(seed).standard_normal((50, 384)).astype(np.float16)
    index = Index.build(vectors, "Flat")
    monkeypatch.setattr(faiss, "__version__", version)
    index.search(vectors[:2], 1)
    assert faiss.cvar.distance_compute_blas_threshold == threshold
