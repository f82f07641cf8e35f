"""A training run as a folder, and what every script needs around a model: text, device, arithmetic, progress,
interruption.

    RUN/config.json, model.safetensors   the newest weights, as `Retro.from_pretrained` reads them (`RetroFitted`: those
                                         added to a pretrained model)
    RUN/tokenizer.model                  the tokenizer of those weights
    RUN/train.json                       how it was trained (TrainConfig) and what was found: arithmetic, fingerprints
    RUN/metrics.jsonl                    one JSON object every few steps
    RUN/checkpoint-00001000/             weights, optimiser, RNG at one moment; the newest is kept
    RUN/tokens/                          the text in tokens, for the next start
    RUN/eval-….partial                   an evaluation that was interrupted (evaluate.py)
    RUN/.train.lock                      while a process trains

A checkpoint is written into a folder of another name and renamed when whole, so that weights and optimiser
always belong together. `model.safetensors` beside it is a hard link to the same bytes where the file system has such.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import PLACES, InputError, TrainConfig, write_whole
from .data.corpus import Document, reader_of
from .data.packing import IGNORE, TokenDocuments
from .data.text import Text as Text
from .data.text import note as note
from .data.text import progress_bar as progress_bar
from .data.text import silent as silent
from .data.text import taken_up as taken_up
from .data.tokenizer import Tokenizer
from .nn import Retro, RetroFitted
from .nn.saving import CONFIG, WEIGHTS, content
from .ops._backend import cpu_has_bf16
from .ops._backend import pick_device as pick_device

SETTINGS, TOKENIZER, METRICS, STATE = "train.json", "tokenizer.model", "metrics.jsonl", "training.pt"
TOKENS, _ABOUT, _LOCK = "tokens", "about.json", ".train.lock"
_LOGITS = 1 << 20  # in float32 at a time


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything worth keeping was written. On the command line the message says how to go on."""


@dataclass
class Run:
    """A trained model with what belongs to it. `settings` is train.json."""

    folder: Path
    model: Retro | RetroFitted
    tokenizer: Tokenizer
    settings: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        return int(self.settings["config"]["sequence_length"])

    @property
    def num_neighbours(self) -> int:
        return int(self.settings["config"]["num_neighbours"])

    def fingerprint(self) -> str:
        """Hash of tokenizer, configuration and weights as they are in memory, those of a pretrained model included."""
        about = f"{self.tokenizer.fingerprint} {self.model.config}"
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        for part in content(self.model.state_dict()):
            digest.update(part)
        return digest.hexdigest()


def load_run(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    base: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens the folder that `train` wrote. `base`: where the pretrained model lies now that retrieval was added to;
    None: where it was or, moved together with the run, as it lay beside it.
    Raises InputError where the folder is no run, or is damaged, or where it has no such model."""
    folder = Path(folder)
    settings = read_settings(folder)
    model: Retro | RetroFitted
    if RetroFitted.is_saved_in(folder):
        if base is None and settings["config"].get("retrofit"):
            base = _base(settings, folder, "--base")
        model = RetroFitted.from_pretrained(folder, base=base, device=device)
    elif base is not None:
        raise InputError(
            f"{folder} was not made from a model of transformers; leave out base (--base {base})."
        )
    else:
        model = Retro.from_pretrained(folder, device=device)
    tokenizer = Tokenizer(folder / TOKENIZER)
    # a pretrained model's table is often rounded up
    if model.config.vocab_size < tokenizer.vocab_size or (
        isinstance(model, Retro) and model.config.vocab_size > tokenizer.vocab_size
    ):
        raise InputError(
            f"{folder}: the model has {model.config.vocab_size:,} tokens, but tokenizer.model has "
            f"{tokenizer.vocab_size:,}. They do not belong together."
        )
    return Run(folder, model, tokenizer, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        _check_types(settings)
        return settings
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no training run (no {SETTINGS} in it). Give the folder that "
            "`retro-kernels train --out` wrote."
        ) from None
    except (ValueError, TypeError, KeyError, NotADirectoryError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}).") from None


def _check_types(settings: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError where what is read of train.json is missing or something else: before it is
    taken for a path, say. Runs of earlier versions do not have all of it."""
    config = settings["config"]
    for name in ("sequence_length", "num_neighbours"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"config.{name} is {config[name]!r}")
    texts = [("config.set", config["set"]), ("config.retriever", config.get("retriever"))]
    texts += [(f"config.{name}", config.get(name)) for name in PLACES[1:]]
    texts += [("config.data", path) for path in config.get("data", ())]
    texts += [(name, settings.get(name)) for name in ("dtype", "device", "tokenizer", "corpus", "set")]
    for name, value in texts:
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is {value!r}")


def check_target(folder: Path, config: TrainConfig) -> None:
    """InputError where training would replace what is in `folder` and is no run's, or where a new run would lie in what
    it is made from, and go with that."""
    from .retrieval.store import MANIFEST

    found: set[str] = set()
    if folder.is_dir():
        names = {CONFIG, WEIGHTS, TOKENIZER, SETTINGS, METRICS, TOKENS, MANIFEST}
        found = {path.name for path in folder.iterdir()} & names
    if SETTINGS in found:
        with contextlib.suppress(InputError):
            read_settings(folder)
            return
    for name in ("set", "retrofit"):
        source = getattr(config, name)
        if source and Path(source).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise InputError(
                f"train: out is {folder}, which is {name} ({source}) or lies in it. Give another --out."
            )
    # an attempt of an earlier version, which wrote its settings last
    if found and not (found <= {TOKENS, TOKENIZER} and _keeps_tokens(folder)):
        raise InputError(
            f"train: {folder} holds {', '.join(sorted(found))}, and no training run: that would be replaced. Give "
            "another --out."
        )


def _keeps_tokens(folder: Path) -> bool:
    from .retrieval.writing import load_json

    about = load_json(folder / TOKENS / _ABOUT)
    return isinstance(about, dict) and about.keys() >= {"text", "tokenizer", "chunk_size"}


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While it lasts no other process trains in `folder`; InputError if one does. The folder is made, and is gone again
    where nothing was written into it."""
    from .retrieval.writing import locked

    path = folder / _LOCK
    missing = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(path, f"Another process trains in {folder}. Wait for it, or give another --out."):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for place in missing:
                    place.rmdir()


def places(path: str, config: dict[str, Any], folder: Path) -> list[str]:
    """Where `path`, out of the configuration in the train.json of the run in `folder`, may be now, absolute.

    Where it was; and as it lay relative to the run, for both may have been moved, or copied, together. That comes first
    for a relative path, as earlier versions noted them: in what directory they were meant, nobody knows.
    """
    out, found = config.get("out"), [os.path.abspath(path)]
    if out and os.path.isabs(out) == os.path.isabs(path):
        beside = os.path.abspath(os.path.join(folder, os.path.relpath(path, out)))
        found.insert(len(found) if os.path.isabs(path) else 0, beside)
    return found


def set_of(settings: dict[str, Any], folder: Path) -> str | None:
    """The retrieval set that the run in `folder` with this train.json was trained with; None for a plain decoder.

    The first of its `places` that holds the same set. One that was changed since in the very place is taken, which is
    said; InputError where it was another's place, or where there is none.
    """
    given = settings["config"]["set"]
    if given is None:
        return None
    there, same = _sets(settings, folder)
    if same is not None:
        return same
    told = f"The model was trained with the retrieval set {given}"
    if given in there:
        note(f"{told}, which has been changed since. It is used as it is now; --set names another.")
        return given
    if there:
        meant = (
            ""
            if os.path.isabs(given)
            else " (noted by an earlier version, which did not say in what directory)"
        )
        raise InputError(
            f"{told}{meant}. What is in {there[0]} is another one, or has been changed since, and not taken unasked. "
            f"Name the one to use: --set {shlex.quote(there[0])}, or where the right one is."
        )
    looked_for = " or ".join(dict.fromkeys(places(given, settings["config"], folder)))
    raise InputError(f"{told}, which is not there: no folder {looked_for}. Name one with --set.")


def _sets(settings: dict[str, Any], folder: Path) -> tuple[list[str], str | None]:
    """The places of the run's set that are there, and the first that holds the same set."""
    config = settings["config"]
    there = [path for path in places(config["set"], config, folder) if os.path.isdir(path)]
    # runs of earlier versions do not know of their set
    same = (path for path in there if settings.get("set") in (None, _fingerprint(path)))
    return there, next(same, None)


def _fingerprint(path: str) -> str:
    from .retrieval.neighbours import manifest_fingerprint
    from .retrieval.store import read_manifest

    try:
        return manifest_fingerprint(read_manifest(Path(path)))
    except InputError:  # said in full when it is opened
        return "none"


def resumed(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The configuration with which the run in `folder` goes on: its own, with paths that are there now, and `given`."""
    settings = read_settings(folder)
    config = dict(settings["config"])

    def now(path: str) -> str:
        return next(filter(os.path.exists, places(path, config, folder)), path)

    changes: dict[str, Any] = {
        name: now(config[name]) for name in ("tokenizer", "neighbours") if config.get(name)
    }
    if config.get("data"):
        changes["data"] = [now(path) for path in config["data"]]
    if config.get("retrofit") and "retrofit" not in given:
        changes["retrofit"] = _base(settings, folder, "--retrofit")
    if config["set"] is not None:
        there, same = _sets(settings, folder)
        changes["set"] = same or next(iter(there), config["set"])
    return {**config, **changes, **given}


def _base(settings: dict[str, Any], folder: Path, option: str) -> str:
    """Where the model is now to which the run in `folder` adds retrieval: the first of its `places` that is there.
    InputError, with the `option` that names another, where none is."""
    config = settings["config"]
    found = places(config["retrofit"], config, folder)
    there = next(filter(os.path.isdir, found), None)
    if there is None:
        raise InputError(
            f"The model to which {folder} adds retrieval is gone: there is no folder "
            f"{' or '.join(dict.fromkeys(found))}. Put it back, or name the folder where it is now with {option}."
        )
    return there


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def remove_staged(folder: Path) -> None:
    """What a process left that was killed while it saved, of the run in `folder`."""
    files = "|".join(map(re.escape, (CONFIG, WEIGHTS, SETTINGS, TOKENIZER)))
    for path in folder.glob("*.tmp-*"):
        if re.fullmatch(r"checkpoint-\d{8}\.tmp-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(rf"({files})\.tmp-\d+", path.name):
            path.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, model: Retro | RetroFitted, state: dict[str, Any]) -> None:
    """Weights and `state` (tensors and plain values only) as the newest checkpoint; older ones go when it is on the
    disk, so that a power cut too leaves one."""
    from .retrieval.writing import sync_folder

    final = folder / f"checkpoint-{step:08d}"
    staged = folder / f"{final.name}.tmp-{os.getpid()}"
    try:
        model.save_pretrained(staged)
        _save_state(state, staged / STATE)
        for path in (*staged.rglob("*"), staged):
            if path.is_dir():
                sync_folder(path)
            else:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    publish_checkpoint(folder, step)


def publish_checkpoint(folder: Path, step: int) -> None:
    """The weights of the checkpoint of `step` become the run's, and every other checkpoint goes."""
    from .retrieval.writing import link_or_copy, sync_folder

    for name in (CONFIG, WEIGHTS):
        copy = folder / f"{name}.tmp-{os.getpid()}"
        link_or_copy(folder / f"checkpoint-{step:08d}" / name, copy)
        os.replace(copy, folder / name)
        copy.unlink(missing_ok=True)  # where both were names of one file already, they are still
    sync_folder(folder)
    for old, path in checkpoints(folder):
        if old != step:
            shutil.rmtree(path, ignore_errors=True)


def _save_state(state: dict[str, Any], path: Path) -> None:
    """OSError where it cannot be written: of a full disk torch says that it is at an unexpected place."""
    failed: list[OSError] = []

    class File:
        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        with open(path, "wb") as file:
            torch.save(state, File())  # type: ignore[arg-type]
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError):
            failed.append(error)
        if failed:
            raise OSError(failed[0].errno, failed[0].strerror, str(path)) from None
        raise


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The optimiser's and generators' state; never unpickles an object."""
    try:
        with zipfile.ZipFile(checkpoint / STATE) as file:  # has checksums, which torch does not compare
            if (damaged := file.testzip()) is not None:
                raise ValueError(f"{damaged} is not what was written")
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{checkpoint / STATE} cannot be read ({reason}). Remove {checkpoint} and start again."
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Arithmetic of the forward pass. `"auto"`: bf16 where the device multiplies in it."""
    if name in ("fp32", "bf16"):
        return torch.float32 if name == "fp32" else torch.bfloat16
    if name != "auto":
        raise InputError(f"dtype is {name!r}; it must be auto, fp32 or bf16.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As options, summaries and `train.json` call it."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; nothing where that is fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, float32 [B, N], of logits [B, N, V] with each of the targets int64 [B, N]; 0 where that is
    `IGNORE`.

    On a CPU a few rows at a time: all logits in float32, once for each pass over them and its gradient, are memory that
    takes longer to get from the system, and to give back, than the passes do."""
    rows, wanted = logits.flatten(0, -2), targets.flatten()
    some = max(1, _LOGITS // rows.shape[1] if rows.device.type == "cpu" else len(rows))
    parts = zip(rows.split(some), wanted.split(some), strict=True)
    made = [F.cross_entropy(x.float(), y, ignore_index=IGNORE, reduction="none") for x, y in parts]
    return torch.cat(made).view(targets.shape)


def text_of(
    data: Sequence[str | os.PathLike[str]],
    documents: Iterable[Document] | None,
    nothing: str,
    show: bool,
    leave_out: Sequence[str] = (),
) -> Text:
    """`documents`, or where there are none given those of the paths `data`, which are checked. Else see `Text`."""
    given = None if documents is None else list(documents)  # they are read more than once
    reader = (lambda report: iter(given)) if given is not None else reader_of(data, (), (), leave_out)
    return Text(reader, nothing, show=show)


class KeptTokens:
    """The tokens of a run's text, in its folder: to continue it the text is read, but not tokenised again.

    One `.npy` for each array of TokenDocuments, memory-mapped; last of all `about.json`, with a checksum and all that
    they depend on. What depends on something else, or is damaged, is not used.
    """

    _ARRAYS = ("chunks", "starts", "hashes", "num_bytes", "num_words", "titles")

    def __init__(self, folder: Path, text: Text, tokenizer: Tokenizer, chunk_size: int) -> None:
        self._folder, self._text, self._tokenizer, self._chunk_size = folder, text, tokenizer, chunk_size
        self._about: dict[str, Any] = {
            "version": 1,
            "text": text.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "chunk_size": chunk_size,
        }
        self._whole = False

    def get(self) -> TokenDocuments:
        """Those that are kept, or else made now (`Text.tokenise`)."""
        from .retrieval.store import NO_HEADER
        from .retrieval.writing import load_json

        about = load_json(self._folder / _ABOUT)
        if isinstance(about, dict) and {**about, "checksum": None} == {**self._about, "checksum": None}:
            try:
                arrays = {
                    name: np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r"))
                    for name in self._ARRAYS
                }
                if self._checksum(arrays) == about.get("checksum"):
                    self._whole = True
                    titles = json.loads(arrays.pop("titles").tobytes())
                    return TokenDocuments(titles=titles, **arrays)
            except (OSError, EOFError, *NO_HEADER):
                pass
            note(f"{self._folder} is damaged: the text is tokenised again.")
        return self._text.tokenise(self._tokenizer, self._chunk_size)

    def keep(self, corpus: TokenDocuments) -> None:
        """Writes what `get` made; where there is no room for it, the run does without, which is said."""
        from .retrieval.writing import save_array, save_json

        if self._whole:
            return
        arrays = {name: getattr(corpus, name) for name in self._ARRAYS[:-1]}
        arrays["titles"] = np.frombuffer(json.dumps(corpus.titles).encode(), np.uint8)
        try:
            self._folder.mkdir(exist_ok=True)
            (self._folder / _ABOUT).unlink(missing_ok=True)  # before the files change of which it speaks
            for name, values in arrays.items():
                save_array(self._folder / f"{name}.npy", values)
            save_json(self._folder / _ABOUT, {**self._about, "checksum": self._checksum(arrays)})
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            note(
                f"The tokens are not kept in {self._folder}: {error.strerror}. A resumed run tokenises again."
            )

    def _checksum(self, arrays: dict[str, np.ndarray]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in self._ARRAYS:
            digest.update(f"{arrays[name].dtype} {arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[name]).data)
        return digest.hexdigest()


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within, the first SIGINT or SIGTERM sets the event, so that a step can be finished; the second stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
