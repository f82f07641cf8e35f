"""What a model is, as plain data: no torch here, so reading a configuration costs nothing.

Layer numbers are 1-based, as in the paper ("P = 6, 9, 12" means the sixth, ninth and twelfth layer).
Sizes and presets: Borgeaud et al. 2021 (arXiv 2112.04426), Tables 2 and 10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

_T = TypeVar("_T", bound="_Plain")
MAX_SEED = 2**63 - 1
"""torch's generators take no larger one."""


class InputError(ValueError):
    """Something a user gave cannot be used. The message says what was given, what is allowed and what to do."""


class FailedElsewhere(RuntimeError):
    """Another process of the same job failed, which says so itself."""


class InputFailedElsewhere(FailedElsewhere, InputError):
    """The same, for what a user gave there."""


def processes() -> int:
    """How many torchrun started, of which this is one; or who else describes them so. 1: this one is alone."""
    described = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if described else 1


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """A name beside `final` for a file that takes its place when it is whole; of any other nothing is left."""
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """A file, whole and on the disk or not at all. OSError with a name: the disk is full, …"""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged(path) as temporary, open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which


def write_safetensors(
    tensors: dict[str, Any], temporary: Path, final: Path, metadata: dict[str, str]
) -> None:
    """`tensors` into the file `temporary`, on the disk when it returns, to become `final` (`staged`). OSError with the
    name of `final`: the disk is full, …"""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(final)) from None
        raise OSError(f"{final} cannot be written: {error}") from None
    temporary.chmod(mode)  # safetensors lets nobody else read what it writes
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())


def check_readable(path: str | os.PathLike[str]) -> None:
    """OSError of its own kind where `path` cannot be opened: of one without the right to, safetensors says that it does
    not exist."""
    with open(path, "rb"):
        pass


def _is_integer(value: Any) -> bool:
    """True and False are none: whoever writes dim=True means something else."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_count(verb: str, name: str, value: Any, least: int = 1) -> None:
    """InputError for anything but an integer of at least `least`."""
    if not _is_integer(value) or value < least:
        raise InputError(f"{verb}: {name} is {value!r}; it must be an integer of at least {least}.")


def as_count(verb: str, name: str, given: Any, least: int = 1) -> int:
    """`given`, an integer of Python's, numpy's or torch's, as one of Python's; InputError as of `check_count`."""
    count = as_integer(given)
    check_count(verb, name, count, least)
    return count


def as_integer(given: Any) -> Any:
    """An integer of numpy's or torch's as one of Python's, which JSON can hold; anything else as it is."""
    # older numpy's bool is an index
    if isinstance(given, bool) or str(getattr(given, "dtype", "")).endswith("bool"):
        return given
    with contextlib.suppress(TypeError):
        return operator.index(given)
    return given


def _check_flags(verb: str, config: Any, *names: str) -> None:
    """InputError for what is neither: a text would be taken for True, "false" too."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise InputError(f"{verb}: {name} is {getattr(config, name)!r}; it must be True or False.")


def _make_plain(config: Any, *names: str) -> None:
    """`as_integer` for fields of a frozen dataclass."""
    for name in names:
        object.__setattr__(config, name, as_integer(getattr(config, name)))


def as_seed(verb: str, given: Any) -> int:
    """`given` as an integer of Python's; InputError for what no random generator can begin with."""
    seed = as_integer(given)
    if not _is_integer(seed) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"{verb}: seed is {seed!r}; it must be an integer from 0 to {MAX_SEED:,}.")
    return int(seed)


@dataclass(frozen=True)
class _Plain:
    """What JSON can hold."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_T], values: dict[str, Any]) -> _T:
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"{cls.__name__}: unknown fields {unknown}; this version knows {sorted(known)}.")
        return cls(**values)


@dataclass(frozen=True)
class RetroConfig(_Plain):
    """Architecture of one model. `cca_layers=()` is the plain decoder: no encoder, no cross-attention.

    The defaults are those of the paper's smallest model. Of another width, heads and feed-forward networks stay as wide
    as they are there: begin with a preset (`retro_tiny`, `retro_small`), or give them too.
    """

    vocab_size: int = 128_000
    """Entries of the tokenizer, and of the (tied) embedding."""
    dim: int = 896
    """d, width of the decoder."""
    num_layers: int = 12
    num_heads: int = 16
    head_dim: int = 64
    """num_heads * head_dim need not equal dim (it does not in the paper's smallest model)."""
    ffn_dim: int = 3584
    cca_layers: tuple[int, ...] = (6, 9, 12)
    """P, 1-based decoder layers that hold chunked cross-attention."""
    encoder_dim: int = 896
    """d', width of the neighbour encoder."""
    encoder_layers: int = 2
    encoder_heads: int = 16
    encoder_head_dim: int = 64
    encoder_ffn_dim: int = 3584
    encoder_cross_layers: tuple[int, ...] = (1,)
    """P_enc, 1-based encoder layers that attend to the chunk which retrieved the neighbour."""
    chunk_size: int = 64
    """M, tokens in a chunk."""
    neighbour_len: int = 128
    """R, tokens in a neighbour with its continuation (2M in the paper)."""
    self_attention: Literal["relative", "rotary"] = "relative"
    """Positions in the decoder's self-attention. "relative" is the paper's (Transformer-XL)."""
    cca_position: Literal["relative", "bias", "none"] = "relative"
    dropout: float = 0.0
    tie_embeddings: bool = True
    share_encoder_embedding: bool = False
    """One table for decoder and encoder; needs dim == encoder_dim (the paper's ablation, Table 13)."""
    normalise_conditioning: bool = True
    """RMSNorm on the decoder state before it becomes the encoder's cross-attention keys and values."""
    normalise_encoder_output: bool = True
    norm_eps: float = 1e-6
    pad_id: int = 0
    """Token that pads a document's last chunk and ends the document."""

    def __post_init__(self) -> None:
        for name in ("cca_layers", "encoder_cross_layers"):
            given = getattr(self, name)
            # JSON gives lists
            layers = tuple(map(as_integer, given)) if isinstance(given, Iterable) else (None,)
            if not all(map(_is_integer, layers)):
                raise InputError(
                    f"RetroConfig: {name} is {given!r}; it must be layer numbers, integers, such as (6, 9, 12)."
                )
            object.__setattr__(self, name, tuple(sorted(layers)))
        counts = (
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "head_dim",
            "ffn_dim",
            "encoder_dim",
            "encoder_layers",
            "encoder_heads",
            "encoder_head_dim",
            "encoder_ffn_dim",
            "chunk_size",
            "neighbour_len",
        )
        _make_plain(self, *counts, "pad_id", "dropout", "norm_eps")
        for name in counts:
            check_count("RetroConfig", name, getattr(self, name))
        for name, most in (("cca_layers", self.num_layers), ("encoder_cross_layers", self.encoder_layers)):
            given = getattr(self, name)
            if any(not 1 <= p <= most for p in given) or len(set(given)) != len(given):
                raise InputError(
                    f"RetroConfig: {name} is {given}; layer numbers are 1-based, "
                    f"distinct, and at most {most} here."
                )
        flags = ("tie_embeddings", "share_encoder_embedding")
        _check_flags("RetroConfig", self, *flags, "normalise_conditioning", "normalise_encoder_output")
        for name, allowed in (
            ("self_attention", ("relative", "rotary")),
            ("cca_position", ("relative", "bias", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"RetroConfig: {name} is {getattr(self, name)!r}; it must be one of {allowed}."
                )
        if self.self_attention == "rotary" and self.head_dim % 2:
            raise InputError(f"RetroConfig: rotary positions need an even head_dim, not {self.head_dim}.")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"RetroConfig: dropout is {self.dropout!r}; it must lie in [0, 1).")
        if not _is_number(self.norm_eps) or self.norm_eps <= 0.0:
            raise InputError(
                f"RetroConfig: norm_eps is {self.norm_eps!r}; it must be a finite number above 0, such as 1e-06."
            )
        if self.share_encoder_embedding and self.dim != self.encoder_dim:
            raise InputError(
                f"RetroConfig: share_encoder_embedding needs dim == encoder_dim, "
                f"not {self.dim} and {self.encoder_dim}."
            )
        if not _is_integer(self.pad_id) or not 0 <= self.pad_id < self.vocab_size:
            raise InputError(
                f"RetroConfig: pad_id is {self.pad_id!r}; the vocabulary has {self.vocab_size} entries."
            )

    def replace(self, **changes: Any) -> RetroConfig:
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)

    def body_parameters(self) -> int:
        """Weights of all matrices but the embeddings, as the paper's Table 2 counts them.

        Five matrices per attention (query, key, value, output, relative) and two per feed-forward network.
        """
        inner, encoder_inner = self.num_heads * self.head_dim, self.encoder_heads * self.encoder_head_dim
        relative = int(self.self_attention == "relative")
        decoder = self.num_layers * ((4 + relative) * self.dim * inner + 2 * self.dim * self.ffn_dim)
        if not self.cca_layers:
            return decoder
        encoder = self.encoder_layers * (
            5 * self.encoder_dim * encoder_inner + 2 * self.encoder_dim * self.encoder_ffn_dim
        )
        cross = (3 * self.encoder_dim + 2 * self.dim) * encoder_inner
        cca_relative = int(self.cca_position == "relative")
        cca = ((2 + cca_relative) * self.dim + 2 * self.encoder_dim) * inner
        return decoder + encoder + len(self.encoder_cross_layers) * cross + len(self.cca_layers) * cca


def default_cca_layers(num_layers: int) -> tuple[int, ...]:
    """Every third layer from the sixth, as in the paper; of fewer than nine layers, the middle one and the last."""
    if num_layers < 9:
        return tuple(sorted({max(1, num_layers // 2), num_layers}))
    return tuple(range(6, num_layers + 1, 3))


# The four models of Table 2. P is "every third layer from 6", which is what the table's parameter counts fit
# (Table 10 prints "from 9" for the two large ones): pass cca_layers= for the other reading.
_PRESETS: dict[str, dict[str, Any]] = {
    "retro_172m": dict(dim=896, ffn_dim=3584, num_heads=16, head_dim=64, num_layers=12),
    "retro_425m": dict(dim=1536, ffn_dim=6144, num_heads=12, head_dim=128, num_layers=12),
    "retro_1_5b": dict(dim=2048, ffn_dim=8192, num_heads=16, head_dim=128, num_layers=24),
    "retro_7_5b": dict(dim=4096, ffn_dim=16384, num_heads=32, head_dim=128, num_layers=32),
    # for a laptop: the same architecture, narrow
    "retro_tiny": dict(
        vocab_size=4096,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        head_dim=32,
        num_layers=4,
        encoder_dim=128,
        encoder_layers=1,
        encoder_heads=4,
        encoder_head_dim=32,
        encoder_ffn_dim=512,
    ),
    "retro_small": dict(
        vocab_size=8192,
        dim=256,
        ffn_dim=1024,
        num_heads=8,
        head_dim=32,
        num_layers=6,
        encoder_dim=256,
        encoder_heads=8,
        encoder_head_dim=32,
        encoder_ffn_dim=1024,
    ),
}
PRESETS = tuple(_PRESETS)
DEFAULT_PRESET = "retro_small"


def preset(name: str, **overrides: Any) -> RetroConfig:
    """The configuration called `name` (one of `PRESETS`), with some fields changed: `overrides`, fields of RetroConfig.

    Raises InputError for a name or a value that cannot be used.
    """
    if name not in _PRESETS:
        raise InputError(f"preset: {name!r} is not one of {', '.join(PRESETS)}.")
    values = {**_PRESETS[name], **overrides}
    values["num_layers"] = as_integer(values["num_layers"])
    if isinstance(values["num_layers"], int):  # else RetroConfig says what is wrong
        values.setdefault("cca_layers", default_cca_layers(values["num_layers"]))
    return RetroConfig(**values)


def retro_172m(**overrides: Any) -> RetroConfig:
    """172M body parameters (Table 2, first row)."""
    return preset("retro_172m", **overrides)


def retro_425m(**overrides: Any) -> RetroConfig:
    """425M body parameters (Table 2, second row)."""
    return preset("retro_425m", **overrides)


def retro_1_5b(**overrides: Any) -> RetroConfig:
    """1,451M body parameters (Table 2, third row)."""
    return preset("retro_1_5b", **overrides)


def retro_7_5b(**overrides: Any) -> RetroConfig:
    """7,532M body parameters (Table 2, fourth row)."""
    return preset("retro_7_5b", **overrides)


def retro_tiny(**overrides: Any) -> RetroConfig:
    """1.3M body parameters: a test or a first look on a CPU."""
    return preset("retro_tiny", **overrides)


def retro_small(**overrides: Any) -> RetroConfig:
    """7.8M body parameters: trains on a laptop."""
    return preset("retro_small", **overrides)


PLACES = ("data", "out", "set", "tokenizer", "retrofit", "neighbours")
"""Fields of TrainConfig that are paths; `data` is several."""


@dataclass(frozen=True)
class TrainConfig(_Plain):
    """One training run. `set=None` trains the plain decoder.

    The comments under the fields are the command line's help.
    """

    data: tuple[str, ...]
    """folders or files of text to train on (.txt, .jsonl, .parquet, sources, packed or not)"""
    out: str
    """folder of the run: model, tokenizer, metrics, checkpoint"""
    set: str | None = None
    """retrieval set; without it the plain decoder is trained"""
    preset: str | None = None
    """architecture, one of the presets (default: retro_small; with retrofit, that of the run)"""
    model: tuple[str, ...] = ()
    """changes to the preset, FIELD=VALUE, e.g. dim=384 cca_layers=2,4"""
    steps: int = 1000
    """updates of the weights"""
    seed: int = 0
    """of the initial weights, the order of the data and dropout"""
    batch_size: int = 8
    """sequences in a forward pass"""
    accumulate: int = 1
    """forward passes in a step; processes that torchrun starts divide them among them"""
    sequence_length: int = 512
    """tokens in a sequence, whole chunks"""
    num_neighbours: int = 2
    """neighbours of each chunk"""
    learning_rate: float = 1e-3
    """highest learning rate, after the warm-up"""
    warmup: int | None = None
    """steps of linear warm-up (default: a twentieth of the steps, at most 750)"""
    weight_decay: float = 0.1
    """of the matrices"""
    clip: float = 1.0
    """largest norm of the gradient; 0: any"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic of the forward pass; auto takes bf16 where the device multiplies in it"""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one"""
    compile: bool = False
    """run the model through torch.compile"""
    neighbours: str | None = None
    """file of precomputed neighbours (verb neighbours) instead of searching in the step"""
    retriever: str = "dense"
    """how neighbours are found: dense, bm25, random, dense+bm25, dense+edit, …; eval and generate do so too"""
    tokenizer: str | None = None
    """tokenizer of the plain decoder (default: one is trained on the data)"""
    vocab_size: int | None = None
    """entries of a tokenizer trained here (default: 16,384, or as many as the text supports)"""
    retrofit: str | None = None
    """run of a plain decoder, or folder of a pretrained model of transformers, to add retrieval to; its weights stay as
    they are unless unfrozen, and a learning-rate schedule of its own begins unless first_step is given"""
    unfreeze: bool = False
    """train the weights of the retrofitted decoder as well"""
    copy: float = 0.0
    """start the layers that a retrofit adds so that they copy from neighbours: what follows the present tokens there
    gets a logit higher by up to this; 0: at random, adding nothing"""
    added_rate: float = 1.0
    """learning rate of the layers that a retrofit adds, as a multiple of that of the others"""
    first_step: int = 0
    """number of the first step: schedule and order of the data go on there, as after so many steps of the decoder"""
    lessons: float = 0.0
    """share of the sequences that are given their own text as neighbours, shifted at random, which teaches to copy
    from neighbours; it falls to nothing over four fifths of the steps"""
    save_every: int = 500
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            given = getattr(self, name)
            alone = isinstance(given, (str, os.PathLike))  # a str would be taken for its characters
            object.__setattr__(self, name, tuple(map(os.fspath, (given,) if alone else given)))
        for name in PLACES[1:]:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        counts = (
            "steps",
            "batch_size",
            "accumulate",
            "sequence_length",
            "num_neighbours",
            "save_every",
            "log_every",
        )
        numbers = ("learning_rate", "weight_decay", "clip", "copy", "added_rate")
        _make_plain(self, *counts, *numbers, "seed", "warmup", "vocab_size", "first_step", "lessons")
        for name in counts:
            check_count("train", name, getattr(self, name))
        _check_flags("train", self, "compile", "unfreeze")
        as_seed("train", self.seed)
        if self.warmup is not None and (not _is_integer(self.warmup) or self.warmup < 0):
            raise InputError(f"train: warmup is {self.warmup!r}; it must be an integer of at least 0.")
        for name in numbers:
            value = getattr(self, name)
            if not _is_number(value) or value < 0.0:
                raise InputError(f"train: {name} is {value!r}; it must be a finite number of at least 0.")
        if not _is_number(self.lessons) or not 0.0 <= self.lessons <= 1.0:
            raise InputError(f"train: lessons is {self.lessons!r}; it is a share, 0 to 1.")
        if not _is_integer(self.first_step) or not 0 <= self.first_step < self.steps:
            raise InputError(
                f"train: first_step is {self.first_step!r}; it must be an integer from 0 and less than the "
                f"{self.steps:,} steps."
            )
        changes = parse_overrides(self.model)
        if self.preset or not self.retrofit:
            preset(self.preset or DEFAULT_PRESET, **{**changes, **({} if self.set else {"cca_layers": ()})})
        if not self.data:
            raise InputError("train: no data was given; name at least one folder or file of text.")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise InputError(f"train: dtype is {self.dtype!r}; it must be auto, fp32 or bf16.")
        for name in ("neighbours", "retrofit"):
            if getattr(self, name) and not self.set:
                raise InputError(f"train: {name} needs a retrieval set (--set).")
        for name, default in (("unfreeze", False), ("copy", 0.0), ("added_rate", 1.0), ("first_step", 0)):
            if getattr(self, name) != default and not self.retrofit:
                raise InputError(f"train: {name} only means something together with retrofit.")
        for name, changed in (("lessons", self.lessons > 0), ("retriever", self.retriever != "dense")):
            if changed and not self.set:
                raise InputError(f"train: {name} needs a retrieval set (--set).")
        if self.tokenizer and self.set:
            raise InputError(
                "train: the tokenizer is that of the retrieval set; give tokenizer or set, not both."
            )

    @property
    def warmup_steps(self) -> int:
        return min(self.steps // 20, 750) if self.warmup is None else self.warmup

    def absolute(self) -> TrainConfig:
        """With paths that name the same places in any directory; stdin ("-") stays."""
        changes: dict[str, Any] = {
            name: os.path.abspath(getattr(self, name)) for name in PLACES[1:] if getattr(self, name)
        }
        data = tuple(path if path == "-" else os.path.abspath(path) for path in self.data)
        return dataclasses.replace(self, data=data, **changes)


def parse_overrides(changes: tuple[str, ...]) -> dict[str, Any]:
    """`("dim=384", "cca_layers=2,4")` as keyword arguments of RetroConfig, each value of its field's type."""
    defaults = {f.name: f.default for f in dataclasses.fields(RetroConfig)}
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in defaults:
            raise InputError(
                f"model: {change!r} is not FIELD=VALUE with one of the fields {', '.join(defaults)}."
            )
        default = defaults[name]
        try:
            if isinstance(default, bool):
                values[name] = {"true": True, "false": False}[text.lower()]
            elif isinstance(default, tuple):
                values[name] = tuple(int(part) for part in text.split(",") if part)
            else:
                values[name] = type(default)(text)  # type: ignore[misc]
        except (KeyError, ValueError):
            raise InputError(f"model: {text!r} is no value for {name}; its default is {default!r}.") from None
    return values
