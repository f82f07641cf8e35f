"""Nearest neighbours by squared L2: FAISS by factory string, or an exact search in PyTorch where FAISS is absent.

This is the one place where FAISS is imported. Which index a set gets (`choose_factory`; the choice rests on
measurements with 384 dimensions, of which bench/results/retrieval.json has some):

    CPU   up to 100,000 vectors   Flat: exact; at 100,000 1.4 ms of a core for a query
          up to 2 million         PCAR{p},IVF{4 sqrt n},PQ{p/2}x4fs,RFlat with p = 2/3 d: candidates are sought in fewer
                                  dimensions, where a third less has to be read, and compared in all of them
          up to 20 million        the same with Refine(SQfp16): half the memory
          over 20 million         IVF…,RaBitQ4: half a byte a dimension, no vectors kept, no codebook to train
    GPU   up to 20 million        Flat, stored in fp16
          more                    IVF…,SQfp16; over 100 million IVF…,PQ{d/8}

Any other factory string of FAISS can be given: "HNSW32,SQ8" where vectors are added one by one, "IVF4096,SQfp16",
"RaBitQ2", … and "CAGRA" on a GPU with a FAISS that was built with cuVS. Refining in fp16 loses nothing, since that is
what embeddings.npy holds.

An exact index has no file: it is made of embeddings.npy when the set is opened.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import numbers
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch  # before FAISS: the other order mixes up their OpenMP libraries (faiss issue 2126)

from retro_kernels.config import InputError, as_count, staged
from retro_kernels.ops._backend import numbered
from retro_kernels.retrieval.store import INDEX, ChunkStore, check_checksum, opened_again

EXACT = "Flat"
_EXACT_UP_TO = {"cpu": 100_000, "cuda": 20_000_000}
_BLOCK_ROWS = 1 << 16
_BLOCK_QUERIES = 1 << 10  # 256 MB of scores
_GPU_TEMP_BYTES = 256 << 20
_MOST_ON_GPU = 2048
_MOST_OF_CAGRA = 1024
_CANDIDATES = 1 << 22
"""Which FAISS may keep at a time where it refines: 12 bytes each, and as much again to choose from them."""
_MOST_CANDIDATES = 1000
"""For each neighbour."""
_SEARCH_SETTING = re.compile(r"[A-Za-z_]{1,32}=[0-9]{1,9}(,[A-Za-z_]{1,32}=[0-9]{1,9}){0,3}")
_MISSING = (
    "FAISS is not installed. On the CPU: pip install 'retro-kernels[faiss-cpu]' (or faiss-cpu); with an NVIDIA GPU: "
    "pip install 'retro-kernels[faiss-gpu]' (or faiss-gpu). Never both: they overwrite each other's files. "
    "Without FAISS only the exact index works: --index Flat."
)

Progress = Callable[[int], object]


@lru_cache
def _faiss() -> Any:
    """The faiss module, or None."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def require_faiss() -> Any:
    """The faiss module. ImportError, with the commands to run, where it is missing."""
    if (faiss := _faiss()) is None:
        raise ImportError(_MISSING)
    return faiss


def _has_gpu_faiss() -> bool:
    faiss = _faiss()
    return faiss is not None and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def choose_factory(n: int, dim: int, device: Any = None) -> str:
    """The factory string for `n` vectors of `dim` numbers on a device (default CPU); see the table above."""
    cuda = device is not None and torch.device(device).type == "cuda"
    if n <= _EXACT_UP_TO["cuda" if cuda else "cpu"] or _faiss() is None:
        return EXACT
    lists = 1 << round(math.log2(4 * math.sqrt(n)))
    if cuda:
        return f"IVF{lists},SQfp16" if n <= 100_000_000 or dim % 8 else f"IVF{lists},PQ{dim // 8}"
    if n > 20_000_000:
        return f"IVF{lists},RaBitQ4"
    codes = max(1, dim // 3)  # of two dimensions each
    return f"PCAR{2 * codes},IVF{lists},PQ{codes}x4fs,{'RFlat' if n <= 2_000_000 else 'Refine(SQfp16)'}"


def check_factory(factory: str | None, dim: int) -> None:
    """InputError where FAISS makes no such index, or none of vectors by squared L2; to be known before hours go into
    the vectors for it.

    What can be filled untrained is tried with a few random vectors; of the rest it is looked at what it consists of.
    """
    if factory is None or factory in (EXACT, "CAGRA"):
        return
    # FAISS divides by some of these, reads what is not there, or never ends
    if re.search(r"(?<![\d.])0+(?![\d.])|HNSW1(?!\d)", factory):
        raise InputError(
            f"The index {factory} cannot be used: none of its numbers can be 0, nor a graph's 1. {_BY_SIZE}"
        )
    index = _empty_index(factory, dim)
    if why := _why_not_l2(index) or _why_not_trained(index):
        raise InputError(f"The index {factory} cannot be used: {why}.")
    if not index.is_trained:
        return
    vectors = np.random.default_rng(0).standard_normal((_TRIED, dim)).astype(np.float32)
    vectors /= np.sqrt(dim)  # about as long as an embedder's, and not all of one length
    searcher = _FaissSearcher(index, torch.device("cpu"))
    queries = torch.from_numpy(vectors[:16] * 1.5)
    searcher.add(vectors)
    with _refusals(f"The index {factory} cannot be searched"):
        distances, ids = searcher.search(queries, 8)
    found = torch.from_numpy(vectors)[ids.clamp(min=0)]
    exact = (found - queries.unsqueeze(1)).square().sum(-1)
    if not bool((ids >= 0).all()) or float(((distances - exact).abs() / exact).median()) > 0.2:
        raise InputError(
            f"The index {factory} cannot be used: what it returns is not near the squared L2 distances of the vectors. "
            f"{_BY_SIZE}"
        )


_TRIED = 256
"""Vectors with which an index is tried; FAISS makes some graphs of at least 100."""


def _why_not_l2(index: Any) -> str | None:
    """Why this FAISS index cannot be filled with vectors and searched by squared L2; None where nothing speaks against
    it."""
    faiss = require_faiss()
    if any(type(part).__name__.startswith("IndexIDMap") for part in _nested(index)):
        return "IDMap keeps ids of its own, and a chunk's id is its place. Leave IDMap out"
    # where candidates are refined, the distances are those of the index that refines
    outer = faiss.downcast_index(index)
    while isinstance(outer, faiss.IndexRefine):
        outer = faiss.downcast_index(outer.refine_index)
    deciding = _nested(outer)
    if any(isinstance(part, (faiss.IndexLSH, faiss.IndexIVFSpectralHash)) for part in deciding):
        return "it counts differing bits, which are no squared L2 distances. Refine it (…,RFlat), or take another"
    for step in _transforms(deciding):
        if isinstance(step, (faiss.NormalizationTransform, faiss.ITQTransform)):
            return "it normalises vectors, so its distances are not the squared L2 distances of what it was given"
        if isinstance(step, faiss.PCAMatrix) and step.eigen_power:
            return "it whitens vectors (PCAW), so its distances are not squared L2 ones; take PCA or PCAR"
    return None


def _why_not_trained(index: Any) -> str | None:
    """Why training will fail, however many vectors there are; None where nothing speaks against it."""
    faiss = require_faiss()
    for step in _transforms(_nested(index)):
        if isinstance(step, faiss.PCAMatrix) and step.d_out > step.d_in:
            return f"PCA makes {step.d_out} dimensions out of {step.d_in}; ask for as many or fewer"
        if isinstance(step, faiss.OPQMatrix) and step.d_out % step.M:
            return f"OPQ cuts {step.d_out} dimensions into {step.M}; take a number that divides them"
    return None


def _transforms(parts: list[Any]) -> Iterator[Any]:
    """What FAISS does to vectors before those of `parts` that are for it get them."""
    faiss = require_faiss()
    for part in parts:
        if isinstance(part, faiss.IndexPreTransform):
            yield from (faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size()))


def check_recall(recall: float) -> float:
    """A recall, which may be a number of numpy's, as one of Python's, which JSON can hold. InputError where
    `Index.tune` could not even try; to be known before hours go into the vectors, too."""
    if not isinstance(recall, numbers.Real) or not 0.0 < recall <= 1.0:
        raise InputError(f"recall is {recall!r}; above 0 and up to 1 can be asked.")
    return float(recall)


class _Searcher(Protocol):
    """One way to search. `search` writes ids −1 where there are fewer than k vectors."""

    device: torch.device

    @property
    def size(self) -> int: ...

    @property
    def most(self) -> int | None: ...

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]: ...
    def add(self, vectors: np.ndarray) -> None: ...


class Index:
    """Vectors that can be searched. Attributes: factory, dim, device; `len(index)`.

    Made by `Index.build` (from vectors) or `Index.open` (a retrieval set). `setting` holds the search parameters, for
    example "nprobe=32"; "" where there are none.
    """

    def __init__(self, searcher: _Searcher, factory: str, dim: int) -> None:
        self._searcher = searcher
        self.factory = factory
        self.dim = dim
        self.device = searcher.device
        self.setting = ""

    def __len__(self) -> int:
        return self._searcher.size

    @property
    def is_exact(self) -> bool:
        return self.factory == EXACT

    @property
    def most(self) -> int | None:
        """How many neighbours of a query a search finds at most; None where only the index's size is a limit."""
        return self._searcher.most

    @classmethod
    def train(cls, vectors: np.ndarray, factory: str, *, device: Any = None, seed: int = 0) -> Index:
        """An empty index, trained on a sample of `vectors` [n, E]. Arguments and errors are those of `build`."""
        device = numbered(device)
        dim = vectors.shape[1]
        searcher: _Searcher
        if factory == EXACT and (_faiss() is None or (device.type == "cuda" and not _has_gpu_faiss())):
            searcher = _TorchSearcher(device)
        else:
            sample = functools.partial(_training_sample, vectors, factory, seed)
            searcher = _FaissSearcher.new(factory, dim, device, sample)
        return cls(searcher, factory, dim)

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        factory: str | None = None,
        *,
        device: Any = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Index:
        """An index of all rows of `vectors` [n, E], fp16 or fp32, also memory-mapped: they are read in blocks.

        factory: a FAISS factory string; None lets `choose_factory` choose.  seed: of the sample used for training.
        progress: is told how many vectors were added.
        Raises InputError for a factory that FAISS refuses (its reason is quoted), ImportError where FAISS is needed and
        missing.
        """
        n, dim = vectors.shape
        if n == 0:
            raise InputError("Index.build: there are no vectors.")
        index = cls.train(vectors, factory or choose_factory(n, dim, device), device=device, seed=seed)
        index.add(vectors, progress)
        return index

    @classmethod
    @opened_again
    def open(
        cls, store: ChunkStore | str | os.PathLike[str], *, device: Any = None, or_cpu: bool = False
    ) -> Index:
        """The index of a retrieval set, on `device` (default CPU).

        or_cpu: where this index, or this FAISS, cannot run on that GPU, it is searched on the CPU, and a warning says
            so and why.

        The checksum of an index file is compared before FAISS parses it, since a damaged file can make it crash.
        Raises InputError where file and manifest do not fit, where `store` was opened before its folder was given to
        another set (of a path that set is opened), or where this kind of index cannot run on a GPU; ImportError where
        FAISS is missing, or has no GPUs.
        """
        if not isinstance(store, ChunkStore):
            store = ChunkStore.open(store)
        described = store.manifest["index"]
        factory, dim = described["factory"], store.manifest["embedder"]["dim"]
        if factory == EXACT:
            return cls.build(store.embeddings, EXACT, device=device)
        entry = store.manifest["files"].get(INDEX)
        if entry is None:
            raise InputError(
                f"Retrieval set {store.path}: its index {factory[:80]} has no {INDEX}. Build it again."
            )
        require_faiss()
        device = numbered(device)
        try:
            check_checksum(store.path, INDEX, entry)
            searcher = _FaissSearcher.read(store.path / INDEX, factory, device, or_cpu)
        except (InputError, OSError):
            store.check_index_is_its_own()
            raise
        store.check_index_is_its_own()  # it may have been exchanged after its checksum was compared
        if searcher.index.d != dim or searcher.size != store.num_chunks or not searcher.is_l2:
            found = f"{searcher.size:,} vectors of {searcher.index.d}"
            raise InputError(
                f"Retrieval set {store.path}: {INDEX} holds {found}, but {store.num_chunks:,} of {dim} by squared L2 "
                "belong there. Build it again."
            )
        index = cls(searcher, factory, dim)
        if setting := described.get("search"):
            index.configure(setting)
        return index

    @classmethod
    def open_trained(cls, store: ChunkStore | str | os.PathLike[str], *, device: Any = None) -> Index:
        """The index of a retrieval set without its vectors, on `device`: what training left, to be filled with others.

        For a set whose manifest says how its index was trained (`trained_state`). Errors are those of `open`; and
        InputError where the index is not what the manifest says.
        """
        if not isinstance(store, ChunkStore):
            store = ChunkStore.open(store)
        made = cls.open(store)._emptied(numbered(device))
        made._check_trained(store)
        return made

    @classmethod
    def join(cls, stores: Sequence[ChunkStore]) -> Index:
        """One index of all vectors of several sets, on the CPU, with ids in the order of the sets. FAISS moves the
        vectors as they are encoded, so it finds what an index would to which they were added set after set.

        For sets whose manifests name the same trained state. The sets' indexes are in memory one at a time, beside the
        result. Errors are those of `open_trained`.
        """
        joined = cls.open_trained(stores[0])
        assert isinstance(joined._searcher, _FaissSearcher)
        joined._searcher.reserve(sum(store.num_chunks for store in stores))
        for store in stores:
            joined._take(store)
        return joined

    def _take(self, store: ChunkStore) -> None:
        part = Index.open(store)
        assert isinstance(self._searcher, _FaissSearcher) and isinstance(part._searcher, _FaissSearcher)
        try:
            self._searcher.take(part._searcher)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"Retrieval set {store.path}: FAISS cannot join its index to the others: {_reason(error)}."
            ) from None
        part._emptied(part.device)._check_trained(store)

    def _emptied(self, device: torch.device) -> Index:
        """A copy on `device`, without vectors and search setting, of an index on the CPU, which loses its own."""
        assert isinstance(self._searcher, _FaissSearcher)
        return Index(self._searcher.emptied(self.factory, device), self.factory, self.dim)

    def _check_trained(self, store: ChunkStore) -> None:
        if self.trained_state() != store.manifest["index"].get("trained"):
            raise InputError(
                f"Retrieval set {store.path}: {INDEX}, emptied on {self.device}, is not what its manifest says was "
                "trained. Make its index again."
            )

    def trained_state(self) -> str | None:
        """SHA-256, in hexadecimal, of this index, which is empty: of all that training left. Sets whose indexes began
        with the same can be joined (`join`). None for an exact index, and for kinds that FAISS cannot join."""
        if len(self):
            raise ValueError("Index.trained_state: the index holds vectors.")
        if self.is_exact or not isinstance(self._searcher, _FaissSearcher):
            return None
        return self._searcher.trained_state()

    def search(self, queries: torch.Tensor | np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest of each query: (distances fp32 [Q, k], squared L2, ascending; ids int64 [Q, k]).

        queries: [Q, E] of any floating dtype and device; results come back on that device. On a GPU everything is
            queued on torch's current stream without waiting for it. k beyond the size of the index leaves −1 and +inf.
        """
        if isinstance(queries, np.ndarray):
            queries = torch.from_numpy(np.array(queries, dtype=np.float32))
        if not isinstance(queries, torch.Tensor):
            raise TypeError(
                f"Index.search: queries must be a tensor or an array [Q, {self.dim}], not {type(queries).__name__}."
            )
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"Index.search: queries have shape {list(queries.shape)}; [Q, {self.dim}] is needed."
            )
        k = as_count("Index.search", "k", k)
        origin = queries.device
        queries = queries.to(self.device, torch.float32).contiguous()
        reachable = min(k, len(self))
        if self.most is not None and reachable > self.most:
            raise ValueError(
                f"Index.search: k is {k:,}; the index {self.factory} on {self.device} finds at most {self.most:,}."
            )
        if len(queries) == 0:
            distances, ids = (
                queries.new_zeros(0, reachable),
                queries.new_zeros(0, reachable, dtype=torch.int64),
            )
        else:
            distances, ids = self._searcher.search(queries, reachable)
        distances = distances.clamp_(min=0).masked_fill_(ids < 0, math.inf)
        if reachable < k:
            distances = torch.nn.functional.pad(distances, (0, k - reachable), value=math.inf)
            ids = torch.nn.functional.pad(ids, (0, k - reachable), value=-1)
        return distances.to(origin), ids.to(origin)

    def add(self, vectors: np.ndarray, progress: Progress | None = None) -> None:
        """Adds rows [n, E]; they get the next ids. Centroids and codebooks stay as they were trained."""
        # FAISS makes these graphs of all their vectors at once
        rows = max(1, len(vectors)) if "NSG" in self.factory else _BLOCK_ROWS
        for start in range(0, len(vectors), rows):
            block = vectors[start : start + rows]
            self._searcher.add(block)
            if progress:
                progress(len(block))

    def configure(self, setting: str) -> None:
        """Sets search parameters, for example "nprobe=32,k_factor_rf=4". InputError where the index has no such one."""
        if not isinstance(setting, str) or not _SEARCH_SETTING.fullmatch(setting):
            raise InputError(
                f'Index: the search setting {str(setting)[:80]!r} is not of the form "nprobe=32".'
            )
        if not isinstance(self._searcher, _FaissSearcher):
            raise InputError(f"Index: an exact index has nothing to set, but {setting!r} was given.")
        self._searcher.configure(setting)
        self.setting = setting

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the FAISS file, whole or not at all. Not for an exact index, which has none. OSError: disk full, …"""
        if not isinstance(self._searcher, _FaissSearcher):
            raise ValueError("Index.save: an exact index has no file; embeddings.npy is the index.")
        with staged(Path(path)) as temporary:
            self._searcher.write(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], factory: str, *, device: Any = None) -> Index:
        """What `save` wrote on this machine, of an index made by `factory`. For a set there is `open`, which checks."""
        searcher = _FaissSearcher.read(Path(path), factory, numbered(device))
        return cls(searcher, factory, int(searcher.index.d))

    def measure(
        self, vectors: np.ndarray, *, k: int = 10, num_queries: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """Recall against exact search, and queries/s, on a sample of the set's own vectors.

        A vector does not count as its own neighbour. A result counts as found if it is no farther than the k-th of the
        exact ones, so copies of one text stand for each other.
        """
        truth = GroundTruth(vectors, k=k, num_queries=num_queries, seed=seed)
        return truth.measure(self)

    def tune(
        self,
        vectors: np.ndarray,
        recall: float = 0.95,
        *,
        k: int = 10,
        num_queries: int | None = None,
        seed: int = 0,
        progress: Callable[[dict[str, Any]], object] | None = None,
    ) -> dict[str, Any]:
        """Sets the fastest search parameters (nprobe, efSearch, refinement) that reach `recall`@k, by measurement.

        progress: is told of each setting that was tried, as what is returned.
        Returns what `measure` does, with "search" (the setting), "target" and "reached": where no setting reaches the
        target, the best one is taken.
        """
        recall = check_recall(recall)
        truth = GroundTruth(vectors, k=k, num_queries=num_queries, seed=seed)
        best: dict[str, Any] | None = None

        def reaches(form: str, value: int) -> bool:
            nonlocal best
            setting = form.format(value)
            self.configure(setting)
            result = {**truth.measure(self), "search": setting}
            result["reached"] = result["recall"] >= recall
            if progress is not None:
                progress(result)
            if best is None or _better(result, best):
                best = result
            return result["reached"]

        lists, refined, graph = (0, False, False)
        if isinstance(self._searcher, _FaissSearcher):
            lists, refined, graph = self._searcher.tunable()
        if lists:
            thorough = f"nprobe={{}},k_factor_rf={_FACTOR}" if refined else "nprobe={}"
            probes = least(_doubled(1, lists), functools.partial(reaches, thorough))
            if refined and probes is not None:
                # fewer lists need more candidates, more lists fewer: neither end of that trade is always the faster
                for wider in dict.fromkeys(min(round(probes * 2 ** (i / 8)), lists) for i in (0, 1, 2, 4)):
                    least(
                        _doubled(1, _FACTOR), functools.partial(reaches, f"nprobe={wider},k_factor_rf={{}}")
                    )
        elif graph:
            least(_doubled(8, 1024), functools.partial(reaches, "efSearch={}"))
        elif refined:
            least(_doubled(1, 128), functools.partial(reaches, "k_factor_rf={}"))
        if best is None:
            best = {**truth.measure(self), "search": ""}
            best["reached"] = best["recall"] >= recall
        else:
            self.configure(best["search"])
        return {**best, "target": recall}


_FACTOR = 32
"""How many times k candidates of the probed lists are compared by their whole vectors at most."""


def _doubled(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, … and `last`."""
    return [first << i for i in range(math.ceil(math.log2(last / first)))] + [last]


def least(values: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The first of ascending `values` with which the target is reached, then brought down towards the value before it
    by halving the ratio between the two three times; None where none reaches it."""
    below, found = None, None
    for value in values:
        if reaches(value):
            found = value
            break
        below = value
    if found is None or below is None:
        return found
    for _ in range(3):
        middle = round(math.sqrt(below * found))
        if middle in (below, found):
            break
        if reaches(middle):
            found = middle
        else:
            below = middle
    return found


def _better(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["reached"] != b["reached"]:
        return a["reached"]
    key = "queries_per_second" if a["reached"] else "recall"
    return a[key] > b[key]


class GroundTruth:
    """Exact neighbours of a sample of rows, to measure indexes against."""

    def __init__(
        self, vectors: np.ndarray, *, k: int = 10, num_queries: int | None = None, seed: int = 0
    ) -> None:
        n, k = len(vectors), as_count("recall@k", "k", k)
        if num_queries is None:
            num_queries = max(100, min(1000, 1_000_000_000 // n))
        generator = np.random.default_rng(seed)
        self.rows = np.sort(generator.choice(n, size=min(num_queries, n), replace=False))
        self.vectors = vectors
        self.k = min(k, max(n - 1, 1))
        self.queries = torch.from_numpy(np.ascontiguousarray(vectors[self.rows], dtype=np.float32))
        distances, ids = exact_search(vectors, self.queries, min(self.k + 1, n))
        distances, _ = self._without_self(distances, ids)
        self.border = distances[:, -1:]  # [Q, 1] distance of the k-th neighbour

    def _without_self(self, distances: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = ids == torch.from_numpy(self.rows).unsqueeze(1)
        order = own.to(torch.int8).argsort(dim=1, stable=True)[
            :, : self.k
        ]  # itself, if found at all, goes last
        return distances.gather(1, order), ids.gather(1, order)

    def measure(self, index: Index) -> dict[str, Any]:
        index.search(self.queries[:1], 1)  # threads and tables are made in the first call
        times: list[float] = []
        while (
            len(times) < 3 and sum(times) < 0.5
        ):  # a short time is easily disturbed, and settings are chosen by it
            start = time.perf_counter()
            distances, ids = index.search(self.queries, self.k + 1)
            times.append(time.perf_counter() - start)
        seconds = min(times)
        _, ids = self._without_self(distances, ids)
        found = torch.from_numpy(self.vectors[ids.clamp(min=0).numpy()].astype(np.float32))  # [Q, k, E]
        exact = (found - self.queries.unsqueeze(1)).square().sum(-1).masked_fill(ids < 0, math.inf)
        rounding = 1e-5 * (self.queries.square().sum(1, keepdim=True) + 1e-3)
        recall = (exact <= self.border + rounding).float().mean().item() if len(self.vectors) > 1 else 1.0
        return {
            "k": self.k,
            "recall": round(recall, 4),
            "queries": len(self.rows),
            "queries_per_second": round(len(self.rows) / max(seconds, 1e-9), 1),
            "threads": torch.get_num_threads(),
        }


def exact_search(
    vectors: np.ndarray | list[torch.Tensor], queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k ≤ n nearest rows of `vectors` [n, E] to `queries` [Q, E], block by block, in fp32 on the queries' device.

    vectors: an array, or a tensor for each block.
    ‖x − q‖² = ‖x‖² − 2 x·q + ‖q‖². Of equally near rows in different blocks the one with the smaller id comes first.
    """
    best_distances = queries.new_empty(len(queries), 0)
    best_ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for some_vectors in vectors if isinstance(vectors, list) else _blocks(vectors):
        block = some_vectors.to(queries.device, torch.float32)
        norms, nearest = block.square().sum(1), min(k, len(block))
        with torch.autocast(queries.device.type, enabled=False):  # that of a caller's training step
            found = [
                torch.addmm(norms, some, block.T, alpha=-2).topk(nearest, dim=1, largest=False)
                for some in queries.split(_BLOCK_QUERIES)
            ]
        candidates = torch.cat([best_distances, torch.cat([part.values for part in found])], 1)
        candidate_ids = torch.cat([best_ids, torch.cat([part.indices for part in found]) + start], 1)
        best_distances, order = candidates.sort(dim=1, stable=True)
        best_distances, best_ids = best_distances[:, :k], candidate_ids.gather(1, order[:, :k])
        start += len(block)
    return best_distances + queries.square().sum(1, keepdim=True), best_ids


class _TorchSearcher:
    """Exact search without FAISS. On a GPU the vectors are kept in fp16, and widened block by block."""

    most = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        # as they came: brought together, they would take twice the memory, and another stream could read them too soon
        self._blocks: list[torch.Tensor] = []

    @property
    def size(self) -> int:
        return sum(map(len, self._blocks))

    def add(self, vectors: np.ndarray) -> None:
        self._blocks.append(torch.from_numpy(np.array(vectors)).to(self.device, self._dtype))

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return exact_search(self._blocks, queries, k)


class _FaissSearcher:
    """A FAISS index, given raw addresses of torch tensors, on the CPU or on one GPU."""

    def __init__(self, index: Any, device: torch.device, resources: Any = None) -> None:
        self.index = index
        self.device = device
        self._resources = resources

    @property
    def size(self) -> int:
        return int(self.index.ntotal)

    @property
    def most(self) -> int | None:
        return _MOST_ON_GPU if self.device.type == "cuda" else None

    @property
    def is_l2(self) -> bool:
        return self.index.metric_type == require_faiss().METRIC_L2

    @classmethod
    def new(
        cls, factory: str, dim: int, device: torch.device, sample: Callable[[], np.ndarray]
    ) -> _FaissSearcher:
        if factory == "CAGRA":
            return _CagraSearcher.new_cagra(dim, device)
        index = _empty_index(factory, dim)
        searcher = cls.on_device(index, factory, device)
        if not index.is_trained:
            with _refusals(f"The index {factory} cannot be trained on so few vectors"):
                searcher.index.train(sample())
        return searcher

    @classmethod
    def on_device(cls, index: Any, factory: str, device: torch.device) -> _FaissSearcher:
        if device.type != "cuda":
            return cls(index, device)
        faiss = require_faiss()
        if not _has_gpu_faiss():
            raise ImportError(f"The index {factory} on {device} needs FAISS with GPUs. {_MISSING}")
        resources, number = _gpu_resources(device), _device_number(device)
        if hasattr(faiss, "IndexHNSWCagra") and isinstance(index, faiss.IndexHNSWCagra):
            if not hasattr(faiss, "GpuIndexCagra"):
                raise InputError(
                    f"The index {factory} cannot run on a GPU (this FAISS is built without cuVS). Search it on the CPU."
                )
            cagra = faiss.GpuIndexCagra(resources, index.d, faiss.METRIC_L2, _cagra_config(number))
            cagra.copyFrom(index)
            return _CagraSearcher(cagra, device, resources, index)
        options = faiss.GpuClonerOptions()
        options.useFloat16 = True
        try:
            return cls(faiss.index_cpu_to_gpu(resources, number, index, options), device, resources)
        except RuntimeError as error:
            raise InputError(
                f"The index {factory} cannot run on a GPU ({_reason(error)}). Search it on the CPU, or build the set "
                "with --index Flat, IVF4096,SQfp16 or IVF4096,PQ48."
            ) from None

    @classmethod
    def read(cls, path: Path, factory: str, device: torch.device, or_cpu: bool = False) -> _FaissSearcher:
        faiss = require_faiss()
        try:
            # lists that say they lie in another file are looked for in the set's folder and nowhere else
            index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            version = faiss.__version__
            raise InputError(
                f"{path} is no index that this FAISS {version} reads: {_reason(error)}"
            ) from None
        held = (getattr(part, "invlists", None) for part in _nested(index))
        for lists in (faiss.downcast_InvertedLists(lists) for lists in held if lists is not None):
            if isinstance(lists, faiss.OnDiskInvertedLists):
                raise InputError(
                    f"{path} keeps its lists in another file, {lists.filename}, which is not read."
                )
        try:
            return cls.on_device(index, factory, device)
        except (InputError, ImportError) as error:
            if not or_cpu:
                raise
            warnings.warn(
                f"{path} is searched on the CPU, the rest stays on {device}: {str(error).split('. ')[0]}.",
                stacklevel=2,
            )
            return cls(index, torch.device("cpu"))

    def add(self, vectors: np.ndarray) -> None:
        if self.device.type != "cuda":
            with _refusals(f"These vectors cannot be added to {type(self.index).__name__}"):
                self.index.add(np.array(vectors, dtype=np.float32, order="C"))
            return
        block = torch.from_numpy(np.array(vectors)).to(self.device).float()  # fp16 on the way, widened there
        with (
            self._on_stream() as faiss,
            _refusals(f"These vectors cannot be added to {type(self.index).__name__}"),
        ):
            self.index.add_c(len(block), faiss.cast_integer_to_float_ptr(block.data_ptr()))

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[Any]:
        """FAISS, which works on torch's current stream meanwhile, for this thread alone."""
        faiss = require_faiss()
        with _gpu_lock, torch.cuda.device(self.device):
            stream = faiss.cast_integer_to_cudastream_t(torch.cuda.current_stream(self.device).cuda_stream)
            self._resources.setDefaultStream(_device_number(self.device), stream)
            yield faiss

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        faiss = require_faiss()
        distances = torch.empty(len(queries), k, dtype=torch.float32, device=self.device)
        ids = torch.empty(len(queries), k, dtype=torch.int64, device=self.device)

        def find(some: slice) -> None:
            self.index.search_c(
                len(queries[some]),
                faiss.cast_integer_to_float_ptr(queries[some].data_ptr()),
                k,
                faiss.cast_integer_to_float_ptr(distances[some].data_ptr()),
                faiss.cast_integer_to_idx_t_ptr(ids[some].data_ptr()),
                self._parameters(k),
            )

        if self.device.type != "cuda":
            faiss.cvar.distance_compute_blas_threshold = _blas_threshold(faiss.__version__, self.index.d)
            at_once = 1 if len(queries) == 1 else max(1, int(_CANDIDATES / (k * self._factor())))
            for first in range(0, len(queries), at_once):
                find(slice(first, first + at_once))
            return distances, ids
        with self._on_stream():
            find(slice(None))
        return distances, ids

    def _parameters(self, k: int) -> Any:
        """FAISS's search parameters of a call; None for those that the index holds."""
        return None

    def _factor(self) -> float:
        """How many candidates a neighbour is chosen from, all of which FAISS keeps for all queries of a call."""
        return math.prod(float(part.k_factor) for part in _nested(self.index) if hasattr(part, "k_factor"))

    def configure(self, setting: str) -> None:
        faiss = require_faiss()
        values = {name: int(value) for name, value in (pair.split("=") for pair in setting.split(","))}
        for name, most in (("nprobe", math.inf), ("k_factor_rf", _MOST_CANDIDATES)):
            if not 1 <= values.get(name, 1) <= most:
                limit = "" if most == math.inf else f" and at most {most:,}"
                raise InputError(f"Index: {name} is {values[name]:,}; it must be at least 1{limit}.")
        # some kinds of lists keep a place for each that is asked for
        if "nprobe" in values and (lists := self.tunable()[0]):
            values["nprobe"] = min(values["nprobe"], lists)
        space = faiss.GpuParameterSpace() if self.device.type == "cuda" else faiss.ParameterSpace()
        try:
            space.set_index_parameters(self.index, ",".join(f"{name}={x}" for name, x in values.items()))
        except RuntimeError:
            kind = type(self.index).__name__
            raise InputError(
                f"{kind} has no search setting {setting!r} (nprobe: IVF, efSearch: HNSW)."
            ) from None

    def tunable(self) -> tuple[int, bool, bool]:
        """(number of inverted lists or 0, whether it refines, whether it is a graph)"""
        faiss, indexes = require_faiss(), _nested(self.index)
        lists = next((int(index.nlist) for index in indexes if hasattr(index, "nlist")), 0)
        refined = isinstance(indexes[0], faiss.IndexRefine)
        return lists, refined, any(isinstance(index, faiss.IndexHNSW) for index in indexes)

    def trained_state(self) -> str | None:
        index = self.on_cpu()
        if not all(type(part).__name__ in _JOINABLE for part in _nested(index)):
            return None
        return hashlib.sha256(_serialised(index).data).hexdigest()

    def emptied(self, factory: str, device: torch.device) -> _FaissSearcher:
        """A copy, in which nothing is left of the memory that the vectors had."""
        self.index.reset()
        return self.on_device(require_faiss().deserialize_index(_serialised(self.index)), factory, device)

    def reserve(self, n: int) -> None:
        """Room for n vectors where they lie in one piece, which would else be copied to ever larger ones."""
        for index in _nested(self.index):
            if hasattr(index, "codes"):
                used = index.codes.size()
                index.codes.resize(n * index.code_size)
                index.codes.resize(used)

    def take(self, other: _FaissSearcher) -> None:
        """Moves the vectors of `other`, of the same kind, behind those that are here."""
        for mine, theirs in zip(_nested(self.index), _nested(other.index), strict=True):
            kind = type(mine).__name__
            if kind == "IndexIVFPQFastScan":
                mine.check_compatible_for_merge(theirs)
                _move_blocks(mine.invlists, theirs.invlists, mine.ntotal)
            elif kind not in _WRAPPERS:  # inverted lists keep ids; elsewhere the place is the id
                mine.merge_from(theirs, mine.ntotal if hasattr(mine, "nlist") else 0)
                continue
            mine.ntotal += theirs.ntotal
            theirs.ntotal = 0

    def on_cpu(self) -> Any:
        return require_faiss().index_gpu_to_cpu(self.index) if self.device.type == "cuda" else self.index

    def write(self, path: Path) -> None:
        try:
            require_faiss().write_index(self.on_cpu(), str(path))
        except RuntimeError as error:
            raise OSError(f"The index could not be written: {_reason(error)}") from None
        with open(path, "rb") as file:
            os.fsync(file.fileno())


class _CagraSearcher(_FaissSearcher):
    """cuVS's graph. It is built from all vectors at once; on disk it is an HNSW graph that a CPU can search too.

    Its search setting is that graph's, efSearch: the candidates that a search keeps, which cuVS calls itopk_size.
    """

    _kept = 64

    def __init__(self, index: Any, device: torch.device, resources: Any = None, vectors: Any = None) -> None:
        """vectors: what the graph was made of: FAISS keeps its address, not a copy."""
        super().__init__(index, device, resources)
        self._vectors, self._parts = vectors, list[np.ndarray]()

    @property
    def most(self) -> int:
        return _MOST_OF_CAGRA

    @classmethod
    def new_cagra(cls, dim: int, device: torch.device) -> _CagraSearcher:
        faiss = require_faiss()
        if device.type != "cuda" or not _has_gpu_faiss() or not hasattr(faiss, "GpuIndexCagra"):
            raise InputError(
                "The index CAGRA is built on a GPU by a FAISS with cuVS (faiss-gpu-cuvs), which is not here. On the "
                "CPU the graph index is HNSW32,SQ8."
            )
        resources = _gpu_resources(device)
        config = _cagra_config(_device_number(device))
        return cls(faiss.GpuIndexCagra(resources, dim, faiss.METRIC_L2, config), device, resources)

    @property
    def size(self) -> int:
        return int(self.index.ntotal) + sum(map(len, self._parts))

    def add(self, vectors: np.ndarray) -> None:
        if self.index.ntotal:
            raise InputError("Vectors cannot be added to a CAGRA graph: build the index again.")
        self._parts.append(np.array(vectors, dtype=np.float32, order="C"))

    def _finish(self) -> None:
        if self._parts:
            self._vectors = np.concatenate(self._parts)
            self.index.train(self._vectors)
            self._parts = []

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._finish()
        return super().search(queries, k)

    def _parameters(self, k: int) -> Any:
        made = require_faiss().SearchParametersCagra()
        made.itopk_size = -(-max(self._kept, k) // 32) * 32  # cuVS refuses fewer than k
        return made

    def configure(self, setting: str) -> None:
        name, _, value = setting.partition("=")
        if name != "efSearch" or "," in value or int(value) < 1:
            raise InputError(f"CAGRA has no search setting {setting!r} (efSearch, from 1 on).")
        self._kept = int(value)

    def tunable(self) -> tuple[int, bool, bool]:
        return 0, False, True

    def trained_state(self) -> str | None:
        return None

    def on_cpu(self) -> Any:
        self._finish()
        graph = require_faiss().IndexHNSWCagra()
        self.index.copyTo(graph)
        return graph


_WRAPPERS = ("IndexPreTransform", "IndexRefine", "IndexRefineFlat")
_JOINABLE = (
    *_WRAPPERS,
    *("IndexIVFFlat", "IndexIVFPQ", "IndexIVFPQFastScan", "IndexIVFRaBitQ", "IndexIVFScalarQuantizer"),
    *("IndexFlat", "IndexFlatL2", "IndexPQ", "IndexRaBitQ", "IndexScalarQuantizer"),
)
"""Kinds whose vectors FAISS moves from one index to another, and which are as they were trained when emptied. Graphs
are not among them; nor, with FAISS 1.15, PQ…x4fs without lists, and LSQ, which encodes by chance."""


def _nested(index: Any) -> list[Any]:
    """A FAISS index and those in it, from the outermost on."""
    faiss = require_faiss()
    index = faiss.downcast_index(index)
    inner = []
    if isinstance(index, faiss.IndexRefine):
        inner = [index.base_index, index.refine_index]
    elif isinstance(index, faiss.IndexPreTransform):
        inner = [index.index]
    return [index, *(part for one in inner for part in _nested(one))]


def _move_blocks(to: Any, source: Any, first_id: int) -> None:
    """Moves vectors in blocks of 4-bit codes behind those of `to`, list by list, `first_id` added to their ids.

    Not by FAISS's merge_from: where a list has a number of vectors that the bytes of a block divide, 1.15 writes past
    the list's end (BlockInvertedLists::add_entries compares vectors with bytes, and copies all blocks behind the first
    ones); it leaves whatever was in memory in places without a vector; and it takes blocks of more than 32 for such.
    """
    faiss = require_faiss()
    to, source = faiss.downcast_InvertedLists(to), faiss.downcast_InvertedLists(source)
    per, size = to.n_per_block, to.block_size
    for i in range(source.nlist):
        n, before = source.list_size(i), to.list_size(i)
        if n == 0:
            continue
        ids = faiss.rev_swig_ptr(source.get_ids(i), n) + first_id
        codes = faiss.rev_swig_ptr(source.get_codes(i), -(-n // per) * size)
        to.resize(i, before + n)  # new blocks are zeros
        faiss.rev_swig_ptr(to.get_ids(i), before + n)[before:] = ids
        place = faiss.rev_swig_ptr(to.get_codes(i), -(-(before + n) // per) * size)[before // per * size :]
        if head := before % per:  # of the first block that is written
            rows = np.zeros((len(place) // size * per, 2 * size // per), np.uint8)
            rows[:head] = _codes_of_blocks(place[:size], per, size)[:head]
            rows[head : head + n] = _codes_of_blocks(codes, per, size)[:n]
            place[:] = _blocks_of_codes(rows, per, size)
        else:
            place[:] = codes
        source.resize(i, 0)


def _codes_of_blocks(blocks: np.ndarray, per: int, size: int) -> np.ndarray:
    """FAISS's blocks (bytes, `size` for `per` vectors) as 4-bit codes [vectors, two for each byte of a vector].

    Of every 32 vectors and two codes there are 32 bytes, 16 of each code: vectors 0, 8, 1, 9, … 7, 15 in the low
    halves, the next 16 vectors in the high ones.
    """
    parts = blocks.reshape(-1, size // per, per // 32, 2, 8, 2)  # block, two codes, 32 vectors, code, 8, 2
    halves = np.stack([parts & 15, parts >> 4])
    return halves.transpose(1, 3, 0, 6, 5, 2, 4).reshape(-1, 2 * size // per)


def _blocks_of_codes(codes: np.ndarray, per: int, size: int) -> np.ndarray:
    """The inverse of `_codes_of_blocks`."""
    parts = codes.reshape(-1, per // 32, 2, 2, 8, size // per, 2)
    low, high = parts.transpose(2, 0, 5, 1, 6, 4, 3)
    return (low | high << 4).reshape(-1)


def _serialised(index: Any) -> np.ndarray:
    """An empty index as in a file, with the search setting that it has from the start."""
    for part in _nested(index):
        for name in ("nprobe", "k_factor"):
            if hasattr(part, name):
                setattr(part, name, 1)
    return require_faiss().serialize_index(index)


def _blas_threshold(version: str, dim: int) -> int:
    """FAISS leaves BLAS below 20 queries, since 1.15 below 128,000 / dim of them, and since then counts queries times
    dim. It pays from few queries on."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return 6 * dim if numbers >= [1, 15] else 6


def _cagra_config(number: int) -> Any:
    config = require_faiss().GpuIndexCagraConfig()
    config.device = number
    config.graph_degree = 32
    config.intermediate_graph_degree = 64
    config.store_dataset = True
    return config


_thread = threading.local()
_gpu_lock = threading.Lock()
"""Resources serve one thread at a time, and indexes opened on one thread share theirs whoever searches them."""


def _gpu_resources(device: torch.device) -> Any:
    """One StandardGpuResources per device and thread (it is not thread-safe), with a bounded temporary arena."""
    table = _thread.__dict__.setdefault("resources", {})
    number = _device_number(device)
    if number not in table:
        resources = require_faiss().StandardGpuResources()
        resources.setTempMemory(_GPU_TEMP_BYTES)
        table[number] = resources
    return table[number]


def _device_number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_BY_SIZE = "Without --index one is chosen by size."


def _empty_index(factory: str | None, dim: int) -> Any:
    faiss = require_faiss()
    with _refusals(f"FAISS knows no index {factory!r} of {dim} dimensions"):
        return faiss.index_factory(dim, factory, faiss.METRIC_L2)


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """FAISS's RuntimeErrors as InputErrors: `what`, and the reason."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{what}: {_reason(error)}. {_BY_SIZE}") from None


def _training_sample(vectors: np.ndarray, factory: str, seed: int) -> np.ndarray:
    """fp32 rows to train on: 64 for each inverted list and 65,536 at least, or all. (FAISS advises 39 to 256; k-means
    takes as long as this number times that of the lists.)"""
    wanted = min(len(vectors), max(65_536, 64 * _lists_of(factory)))
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), size=wanted, replace=False))
    sample = np.empty((wanted, vectors.shape[1]), dtype=np.float32)
    for start in range(0, wanted, _BLOCK_ROWS):
        sample[start : start + _BLOCK_ROWS] = vectors[rows[start : start + _BLOCK_ROWS]]
    return sample


def _lists_of(factory: str) -> int:
    """The number of inverted lists; FAISS's k is 1,024, and its M 1,024 of those."""
    found = re.search(r"IVF(\d+)([kM]?)", factory)
    return int(found[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[found[2]] if found else 0


def _blocks(vectors: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield torch.from_numpy(np.array(vectors[start : start + _BLOCK_ROWS], dtype=np.float32, order="C"))


def _reason(error: Exception) -> str:
    """What went wrong, out of FAISS's message with its C++ signature and source line."""
    text = str(error).split("failed: ")[-1].split(".cpp:")[-1].split(".h:")[-1]
    return re.sub(r"^\d+: ", "", text).strip().rstrip(".") or "no reason given"
