"""RETRO-fitting: retrieval for a pretrained causal language model of Hugging Face transformers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import InputError, RetroConfig, default_cca_layers
from ..ops._backend import uncompiled
from . import saving
from .attention import ChunkedCrossAttention
from .cache import DecodingCache
from .encoder import NeighbourEncoder
from .layers import initialise, is_quantised
from .retrieving import DecodingStep, Retrieving, cross_attention, kept_tokens

if TYPE_CHECKING:
    from ..ops import NeighbourBatch

_AS_BASE = "as base= (train: --retrofit; eval, generate: --base)"
_OWN_BASE = "base"  # folder of a base that was trained as well
_Contribution = Callable[[int, nn.Module, ChunkedCrossAttention, Tensor], Tensor]
_TURNS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""Of each base, whose one thread at a time it is: what is added to its layers, every thread would see."""


class RetroFitted(Retrieving):
    """A pretrained causal language model with chunked cross-attention after the self-attention of some layers.

    `base` is a `transformers` model for causal language modelling (GPT-2, Llama, Mistral, Qwen, Gemma, GPT-NeoX, GPT-J,
    OPT, …). Its code and weights stay as they are: while this model is called, CCA's contribution is added to what
    the layer's self-attention is about to add to the residual stream, so the order is the paper's, ATTN, CCA, FFW.
    Where a layer computes both side by side (GPT-J, GPT-NeoX), CCA stands beside them: it reads the state after
    self-attention, and the feed-forward networks of the later layers are the first to see it. Where to add is found by
    one forward pass over a few tokens; a layer that does not add its attention's output to its input is refused.

    CCA's output projections start at zero, so the first step computes what `base` computes, to the last bit; without
    neighbours that always holds. `freeze=True` trains only what is added: a norm and a CCA in each of
    `config.cca_layers`, and the encoder (Borgeaud et al. 2021, section 4.2). `freeze=False` is reported to reach a
    better perplexity (Wang et al. 2023), and changes the base; of one with adapters (PEFT) it trains what they left
    trainable, since they alone are saved. In training mode the base's own dropout is at work.

    `cca_layers` (1-based) are by default every third layer from the sixth, in models of fewer than nine layers the
    middle one and the last. `changes` are further fields of `RetroConfig` that concern the encoder and CCA. The
    encoder is by default as wide as the base, and then reads through the base's embedding. `pad_id` is the base's id of
    the end of a text, which `tokens`, neighbours and logits here call 0, as a retrieval set does; the base's own 0
    is then called `pad_id`. `bos_id` is the base's id of the beginning of a text, which its tokenizer puts before every
    one (Llama, Mistral, Gemma); the base then reads it before `tokens`, and chunks, logits and caches do not count it.
    A 0 at the very beginning is no text, so the logits behind it are those of the first token. Give `file_pad_id` and
    `file_bos_id` of the `Tokenizer` that made the tokens. `backend`: as in `Retro`.

    Calls from several threads wait for one another, those of models around the same base too; a thread that calls
    `base` itself meanwhile would get what is added.

    Under `torch.compile` all of it runs as it is, uncompiled; a base that is compiled itself is refused.

    Parameters: `base`, `encoder`, and `added.<layer>.cca_norm` and `.cca`, made on the base's device and in its dtype.
    What is added may get a wider one, as its training needs (`model.added.float(); model.encoder.float()`).
    `frozen` is whether the base is not trained. `gradient_checkpointing` (an attribute; False) recomputes the layers of
    base and encoder in the backward pass, all but the base's first with CCA;
    `base.gradient_checkpointing_enable()` those of the base alone.
    Raises InputError where the base or the fields do not fit. The base must stand on one device.
    """

    encoder: NeighbourEncoder

    def __init__(
        self,
        base: Any,
        *,
        cca_layers: tuple[int, ...] | None = None,
        freeze: bool = True,
        bos_id: int | None = None,
        backend: str | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        self._layers = dict(enumerate(_decoder_layers(base), 1))
        self.config = config = _config(base, cca_layers, changes)
        if bos_id is not None and not 0 <= bos_id < config.vocab_size:
            raise InputError(
                f"RetroFitted: bos_id is {bos_id}; it must be an id of the base, 0 to {config.vocab_size - 1:,}, or "
                "None where its texts have no token before them."
            )
        self.bos_id, self.frozen = bos_id, freeze
        self._sites = _sites(base, {number: self._layers[number] for number in config.cca_layers})
        if freeze or not _has_adapters(base):
            base.requires_grad_(not freeze)
        self.base = base
        self._base_keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.added, self.encoder = _additions(config, backend)
        initialise(self.added, config.num_layers, config.dim)
        initialise(self.encoder, config.encoder_layers, config.encoder_dim)
        for number in config.cca_layers:
            nn.init.zeros_(self._cca(number)[1].o_proj.weight)
        like = self.input_embedding().weight
        for part in (self.added, self.encoder):
            if torch.get_default_device().type != "meta":  # of `from_pretrained`, or of who fills it himself
                part.to(like.device)
            _cast_parameters(part, like.dtype)

    def forward(
        self,
        tokens: Tensor,
        neighbours: NeighbourBatch | None = None,
        attention_mask: Tensor | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """`tokens` int [B, N] → logits [B, N, vocab_size] of each next token; `neighbours` and `logits_to_keep` as in
        `Retro.forward`.

        `attention_mask` [B, N] is the base's: 0 where a row is padded, which with neighbours must be on the right,
        since the grid of chunks starts at a row's first token. What stands behind a row's end is ignored anyway, so
        a mask is rarely needed. Raises ValueError for shapes that do not fit, TypeError as `Retro.forward`.
        """
        found = self.fitting_neighbours(tokens, neighbours)
        # transformers fills up a shorter one with what is not attended to
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise InputError(
                f"RetroFitted: attention_mask is {list(attention_mask.shape)}; it must be [B, N] = "
                f"{list(tokens.shape)}."
            )
        run = functools.partial(
            self._run,
            tokens,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            use_cache=False,
        )
        if found is None:
            return run(None).logits
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise InputError(
                "RetroFitted: attention_mask pads on the left; chunks are counted from a row's first token, so pad on "
                "the right."
            )
        encoded: list[Tensor] = []

        def contribution(number: int, norm: nn.Module, cca: ChunkedCrossAttention, x: Tensor) -> Tensor:
            if not encoded:
                encoded.append(self.encode(found[0], x, found[1]))
            return cca(norm(x), encoded[0], found[1])

        return run(contribution).logits

    def new_cache(self, batch_size: int) -> DecodingCache:
        """An empty cache for `decode`."""
        return DecodingCache(batch_size)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        cache: DecodingCache,
        neighbours: NeighbourBatch | None = None,
        *,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """As `Retro.decode`: reads `tokens` int [B, T] after those in `cache` → logits [B, T, vocab_size].

        The base keeps its keys and values in its own cache. Raises ValueError for shapes that do not fit.
        """
        step = DecodingStep(self, tokens, cache, neighbours)
        result = self._run(
            tokens,
            step.contribution,
            begins=not cache.length,
            logits_to_keep=logits_to_keep,
            use_cache=True,
            **cache.past,
        )
        # transformers 5.24 names it anew; before that there is no `cache`
        kept = {name: getattr(result, name, None) for name in ("cache", "past_key_values")}
        cache.past = next(({name: past} for name, past in kept.items() if past is not None), {})
        if not cache.past:
            raise InputError(
                f"RetroFitted.decode: {type(self.base).__name__} keeps no keys and values from one call to the next, "
                "so it cannot generate token by token; forward works."
            )
        cache.length += tokens.shape[1]
        return result.logits

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser is to be given: all that is added, and the base where it is not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def input_embedding(self) -> nn.Embedding:
        """The base's."""
        return self.base.get_input_embeddings()

    def encode(self, found: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
        return super().encode(self._exchanged(found), x, lengths)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes what was added, `config.json` and `model.safetensors`, into `directory` (made if needed). The base is
        named by where it came from; one that is or was trained too is written into the folder `base`, of one with
        adapters (PEFT) the active one alone. Raises InputError where that would replace the folder that the base came
        from, or another model of transformers, where several adapters are active, and for added weights that
        `from_pretrained` could not read: of adapters, of parametrisations, tied by hand. The same for what is offloaded
        or sharded, in added or base."""
        folder = Path(directory)
        saving.check_at_hand(self.state_dict())
        frozen = self.frozen and not any(parameter.requires_grad for parameter in self.base.parameters())
        description = _description(self.base)
        own, there = folder / _OWN_BASE, {}
        with contextlib.suppress(InputError):  # nothing is there, or it is damaged
            there = saving.read_config(folder)
        if "model_type" in there or str(folder.resolve()) == description["source"]:
            raise InputError(
                f"RetroFitted: {folder} holds a model of transformers, which would be replaced. Give another directory."
            )
        owned = _owns_base(there, folder)
        weights = self._added_weights()

        def made() -> nn.Module:
            return nn.ModuleDict(dict(zip(("added", "encoder"), _additions(self.config), strict=True)))

        saving.check_savable(weights, made if type(self) is RetroFitted else None)
        if not frozen:
            if own.is_dir() and not owned and str(own.resolve()) == description["source"]:
                raise InputError(
                    f"RetroFitted: {own} is where the base came from, and the trained one would replace it. Give "
                    "another directory."
                )
            staged = folder / f"{_OWN_BASE}.tmp-{os.getpid()}"
            try:
                _save_base(self.base, staged)
                shutil.rmtree(own, ignore_errors=True)
                os.replace(staged, own)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        about = {**description, "frozen": frozen, "bos_id": self.bos_id}
        saving.save(weights, {"base": about, "added": self.config.to_dict()}, folder)
        if frozen and owned and str(own.resolve()) != description["source"]:
            shutil.rmtree(own, ignore_errors=True)  # of another model that was saved here before

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        base: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> RetroFitted:
        """The model that `save_pretrained` wrote, in evaluation mode and frozen unless its base was trained too.

        `base`: a model, or where transformers finds one; None: where it was then. `dtype` of all parameters: None is
        that of the saved ones, and leaves a model given as `base` as it is. Raises InputError if a file is missing or
        damaged, or where the base is not the one that the weights were trained with.
        """
        folder = Path(directory)
        values = saving.read_config(folder)
        if not cls.is_saved_in(folder) or not isinstance(values["base"], dict):
            raise InputError(f"{folder} holds no RetroFitted (its {saving.CONFIG} names no base).")
        config = saving.model_config(values["added"], folder)
        saved, owned = values["base"], _owns_base(values, folder)
        if base is None:
            base = folder / _OWN_BASE if owned else saved["source"]
            if owned and not base.is_dir():
                raise InputError(
                    f"{base} is missing: the base was trained as well. Copy it, or give it {_AS_BASE}."
                )
            if not base:
                raise InputError(
                    f"{folder}: the base had neither folder nor name. Give that model {_AS_BASE}."
                )
        if isinstance(base, (str, os.PathLike)):
            base = load_base(base, dtype or getattr(torch, saved.get("dtype", "float32")))
            if owned and _has_adapters(base):  # which transformers loads frozen
                base.set_adapter(base.active_adapters())
        elif dtype is not None:
            _cast_parameters(base, dtype)
        _check_same_base(saved, _description(base), folder)
        fields = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_BASE}
        with torch.device("meta"):
            model = cls(base, freeze=not owned, bos_id=saved.get("bos_id"), backend=backend, **fields)
        device_of_base = model.input_embedding().weight.device
        saving.load_weights(model, folder, device_of_base, dtype, model._added_weights())
        return model.to(device=device).eval()

    @staticmethod
    def is_saved_in(directory: str | os.PathLike[str]) -> bool:
        """Whether `directory` holds what `save_pretrained` writes, and not a `Retro`. InputError: neither."""
        return saving.read_config(Path(directory)).keys() == {"base", "added"}

    def _added_weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("base.")}

    def _cca(self, number: int) -> tuple[nn.Module, ChunkedCrossAttention]:
        pair: Any = self.added[str(number)]
        return pair["cca_norm"], pair["cca"]

    @uncompiled  # the base's layers would be traced without what is added to them, and nothing said
    def _run(
        self,
        tokens: Tensor,
        contribution: _Contribution | None,
        *,
        begins: bool = True,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        """The base's result with logits of `tokens` [B, N], at the beginning of a text or behind what was read."""
        kept = kept_tokens("RetroFitted", logits_to_keep)
        _refuse_compiled((self.base, *self._layers.values()))
        if not tokens.numel():
            raise InputError(
                f"RetroFitted: tokens is {list(tokens.shape)}, and models of transformers read no empty batch. "
                "Leave it out."
            )
        ids, lead = self._exchanged(tokens), int(begins and self.bos_id is not None)
        if lead:
            ids = F.pad(ids, (1, 0), value=self.bos_id)
            attention_mask = None if attention_mask is None else F.pad(attention_mask, (1, 0), value=1)
        some = 0 < logits_to_keep < tokens.shape[1]
        if some and self._base_keeps:  # a few bases make all logits whatever is asked for
            options["logits_to_keep"] = logits_to_keep
        with self._turn(), self._adding(contribution, lead):
            result = self.base(input_ids=ids, attention_mask=attention_mask, return_dict=True, **options)
        if getattr(result, "logits", None) is None:
            raise TypeError(
                f"RetroFitted: base is {type(self.base).__name__}, which gives no logits; take the model that "
                "AutoModelForCausalLM gives."
            )
        logits, starts = result.logits, tokens[:, :1] == 0 if lead and not some else None
        if starts is not None or self.config.pad_id:
            logits = _InOurIds.apply(logits, self.config.pad_id, starts)
        result.logits = logits[:, kept if some else slice(lead, None)]
        return result

    def _turn(self) -> threading.RLock:
        return _TURNS.setdefault(self.base, threading.RLock())

    def _exchanged(self, tokens: Tensor) -> Tensor:
        """Ids of the base for ours, and the other way round."""
        pad, tokens = self.config.pad_id, tokens.long()
        return tokens if pad == 0 else torch.where(tokens == 0, pad, torch.where(tokens == pad, 0, tokens))

    @contextlib.contextmanager
    def _adding(self, contribution: _Contribution | None, lead: int) -> Iterator[None]:
        """While it lasts, the base's layers add what `contribution` makes of their state after self-attention, but for
        the first `lead` tokens, and are recomputed in the backward pass where that is asked for."""
        base_asks = self.training and any(map(_recomputes, self.base.modules()))
        recompute = (self.gradient_checkpointing or base_asks) and torch.is_grad_enabled()
        with contextlib.ExitStack() as wrapped:
            if base_asks:  # its own way would not add anything when it recomputes, and takes the cache away
                wrapped.enter_context(_not_recomputing(self.base))
            for number, layer in self._layers.items():
                adds = contribution if number in self._sites else None
                if adds is None and not recompute:
                    continue
                run = self._wrapped(number, adds, lead, base_asks)
                # in the first layer with CCA the encoder runs, and the layers after it share its result
                if recompute and (adds is None or number != self.config.cca_layers[0]):
                    run = functools.partial(checkpoint, run, use_reentrant=False)
                wrapped.enter_context(_replaced(layer, "forward", run))
            yield

    def _wrapped(
        self, number: int, contribution: _Contribution | None, lead: int, base_asks: bool
    ) -> Callable[..., Any]:
        """The forward pass of layer `number` and what is to be added, now and when it is recomputed."""
        layer = self._layers[number]
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as during:
                during.enter_context(self._turn())  # to be recomputed, which another thread may do
                if base_asks:
                    during.enter_context(_not_recomputing(layer))
                if contribution is not None:
                    add = functools.partial(self._added, number, contribution, lead, _first(args, kwargs))
                    during.callback(self._sites[number].module.register_forward_hook(add).remove)
                return forward(*args, **kwargs)

        return run

    def _added(
        self,
        number: int,
        contribution: _Contribution,
        lead: int,
        x: Tensor,
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> Any:
        """The forward hook of a site: its `output` over the layer's input `x`, and CCA's contribution."""
        norm, cca = self._cca(number)
        attended, scale = _first(output), self._sites[number].scale
        state = (x + attended * scale).to(norm.weight.dtype)
        added = contribution(number, norm, cca, state[:, lead:]).to(attended.dtype) / scale
        attended = attended + (F.pad(added, (0, 0, lead, 0)) if lead else added)
        if isinstance(output, Tensor):
            return attended
        if hasattr(output, "_replace"):  # a named tuple
            return output._replace(**{output._fields[0]: attended})
        return type(output)((attended, *output[1:]))


class _InOurIds(torch.autograd.Function):
    """The base's logits [B, N, V], written in place: those of token 0 and token `pad` change places, and where `starts`
    [B, 1] says that a row's first token is no text, the logits behind it are those behind the base's own before it.

    Of what is written in place autograd copies the whole gradient, time and again; here it is copied once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pad: int, starts: Tensor | None) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.pad, ctx.starts = pad, starts
        if starts is not None:
            logits[:, 1] = torch.where(starts, logits[:, 0], logits[:, 1])
        return _exchange(logits, pad)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = _exchange(gradient.clone(memory_format=torch.contiguous_format), ctx.pad)
        if ctx.starts is not None:
            gradient[:, 0] += gradient[:, 1].masked_fill(~ctx.starts, 0)
            gradient[:, 1] = gradient[:, 1].masked_fill(ctx.starts, 0)
        return gradient, None, None


def _exchange(logits: Tensor, pad: int) -> Tensor:
    """Those of tokens 0 and `pad`, in place."""
    if pad:
        first = logits[..., 0].clone()
        logits[..., 0] = logits[..., pad]
        logits[..., pad] = first
    return logits


_OF_THE_BASE = ("vocab_size", "dim", "num_layers")


def _additions(config: RetroConfig, backend: str | None = None) -> tuple[nn.ModuleDict, NeighbourEncoder]:
    """`added` and `encoder` of a RetroFitted."""
    added = nn.ModuleDict()
    for number in config.cca_layers:
        norm, cca = cross_attention(config, backend)
        added[str(number)] = nn.ModuleDict({"cca_norm": norm, "cca": cca})
    return added, NeighbourEncoder(config, backend)


def load_base(source: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """The causal language model that transformers finds at `source`. InputError: none; ImportError: no transformers."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("A pretrained base needs transformers: pip install transformers") from error
    try:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        base, found = load(source, dtype=dtype, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"The base {source} cannot be loaded ({reason}). Give its folder {_AS_BASE}."
        ) from None
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, anew in each process
        raise InputError(
            f"The base {source} lacks {len(missing):,} weights of a {type(base).__name__}, such as {missing[0]}. Save "
            "the whole causal language model there, as AutoModelForCausalLM gives it."
        )
    return base


def _save_base(base: Any, folder: Path) -> None:
    """Into `folder`, from which `load_base` gets it; of adapters (PEFT) the active one. InputError: several are."""
    active = getattr(base, "active_adapters", None)
    if not isinstance(active, list):  # without adapters, or transformers' own way, which knows one only
        base.save_pretrained(folder)
        return
    if len(active) != 1:
        raise InputError(
            f"RetroFitted: the base has {len(active)} active adapters ({', '.join(active)}), of which one could be "
            "read again. Combine them into one (PEFT's add_weighted_adapter), or save the base's state_dict()."
        )
    base.save_pretrained(folder, selected_adapters=active)
    if active != ["default"]:  # PEFT puts it into a folder of its name, where transformers does not look
        for file in (folder / active[0]).iterdir():
            file.rename(folder / file.name)
        (folder / active[0]).rmdir()


def longest_sequence(base: Any, bos_id: int | None) -> float:
    """How many tokens of a text the pretrained model `base` can read at a time, behind the token `bos_id` if there is
    one; inf where its config sets no limit."""
    limit = getattr(_text_config(base), "max_position_embeddings", None) or math.inf
    return limit - (bos_id is not None)


def _decoder_layers(base: Any) -> nn.ModuleList:
    """The list of the decoder's layers, found by its length."""
    if not isinstance(base, nn.Module) or not hasattr(base, "get_input_embeddings"):
        raise TypeError(
            f"RetroFitted: base is {type(base).__name__}; it must be a transformers model for causal language "
            "modelling, as AutoModelForCausalLM gives."
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise InputError("RetroFitted: the base has no weights yet (meta device). Load them first.")
    _refuse_compiled(base.modules())
    if len(devices := {str(parameter.device) for parameter in base.parameters()}) > 1:
        raise InputError(
            f"RetroFitted: the base stands on {', '.join(sorted(devices))}; move it to one device."
        )
    wanted = getattr(_text_config(base), "num_hidden_layers", None)
    lists = {name: part for name, part in base.named_modules() if isinstance(part, nn.ModuleList)}
    fitting = [name for name, part in lists.items() if len(part) == wanted]
    outer = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    if len(outer) != 1 or getattr(base.config, "is_encoder_decoder", False):
        shown = ", ".join(f"{name} ({len(part)})" for name, part in list(lists.items())[:8]) or "none"
        raise InputError(
            f"RetroFitted: {type(base).__name__} has no list of decoder layers that could be found. Looked for one "
            f"ModuleList with num_hidden_layers = {wanted} entries in a decoder-only model; its lists: {shown}."
        )
    return lists[outer[0]]


def _refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """InputError: what is compiled does not see what is added to it while it runs."""
    if any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) for module in modules
    ):
        raise InputError(
            "RetroFitted: the base is compiled, and would leave out what is added to it. Give it as it was before "
            "torch.compile."
        )


def _text_config(base: Any) -> Any:
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def _config(base: Any, cca_layers: tuple[int, ...] | None, changes: dict[str, Any]) -> RetroConfig:
    if refused := sorted(set(changes) & set(_OF_THE_BASE)):
        raise InputError(f"RetroFitted: {refused} are those of the base; they cannot be changed.")
    text, embedding = _text_config(base), base.get_input_embeddings()
    dim, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if dim is None or heads is None:
        raise InputError(
            f"RetroFitted: {type(base).__name__} is no decoder with attention (hidden_size {dim}, num_attention_heads "
            f"{heads})."
        )
    try:
        head_dim = getattr(text, "head_dim", None) or dim // heads
    except RuntimeError:  # transformers': it differs between the layers (Gemma 4)
        head_dim = dim // heads
    width = changes.get("encoder_dim", dim)
    fields: dict[str, Any] = {
        "vocab_size": embedding.num_embeddings,
        "dim": dim,
        "num_layers": text.num_hidden_layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "ffn_dim": 4 * dim,
        "cca_layers": default_cca_layers(text.num_hidden_layers) if cca_layers is None else cca_layers,
        "encoder_dim": dim,
        "encoder_heads": heads,
        "encoder_head_dim": head_dim,
        "encoder_ffn_dim": 4 * width,
        "share_encoder_embedding": width == dim == embedding.embedding_dim,
    }
    config = RetroConfig.from_dict({**fields, **changes})
    if not config.cca_layers:
        raise InputError("RetroFitted: cca_layers is empty; name the layers (1-based) that shall attend.")
    if config.share_encoder_embedding and embedding.embedding_dim != config.encoder_dim:
        raise InputError(
            f"RetroFitted: the base's embedding is {embedding.embedding_dim} wide and the encoder "
            f"{config.encoder_dim}; they cannot share it (share_encoder_embedding=False)."
        )
    return config


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: in a narrow dtype, frequencies of positions and the like would no longer be what they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _recomputes(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


@contextlib.contextmanager
def _not_recomputing(module: nn.Module) -> Iterator[None]:
    """While it lasts, transformers' own gradient checkpointing in `module` is off."""
    with contextlib.ExitStack() as changes:
        for part in filter(_recomputes, module.modules()):
            changes.enter_context(_replaced(part, "gradient_checkpointing", False))
        yield


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """While it lasts, the attribute `name` of `module` itself, not of its class, is `value`."""
    own, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own:
            setattr(module, name, before)
        else:
            delattr(module, name)


class _Call(NamedTuple):
    module: nn.Module
    given: Tensor | None
    result: Tensor | None


class _Site(NamedTuple):
    """Where a layer can be added to."""

    module: nn.Module
    scale: float
    """By which the layer multiplies the module's output before it adds that (Granite); else 1."""


@torch.no_grad()
def _sites(base: Any, layers: dict[int, nn.Module]) -> dict[int, _Site]:
    """Per layer the module whose output, added to the layer's input, is the state after self-attention.

    Seen in one forward pass: a module that runs later is given just that state; or, side by side with the feed-forward
    network, both outputs and the input make the layer's result. A dropout behind the attention is such a module
    too, and the last one is taken, so that CCA is not dropped with it.
    """
    calls: dict[int, list[_Call]] = {number: [] for number in layers}
    modes = {module: module.training for module in base.modules()}
    device = base.get_input_embeddings().weight.device
    with contextlib.ExitStack() as hooks:
        for number, layer in layers.items():
            for module in (*layer.children(), layer):

                def record(module: Any, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
                    given, result = _first(args, kwargs), _first(output)
                    # as it is now: what comes later may be added to it in place (Falcon)
                    kept = None if result is None else result.clone()
                    calls[number].append(_Call(module, given, kept))

                hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        hooks.enter_context(torch.autocast(device.type, enabled=False))  # sums are compared to the last bit
        hooks.enter_context(device)  # where the base makes masks and positions, whatever is the default
        base.eval()
        try:
            base(input_ids=torch.arange(1, 5, device=device)[None], use_cache=False)
        finally:
            for module, mode in modes.items():
                module.training = mode
    sites = {}
    for number, layer in layers.items():
        site = _site(calls[number], [1.0, *(v for v in vars(layer).values() if isinstance(v, float) and v)])
        if site is None:
            names = ", ".join(name for name, _ in layer.named_children())
            raise InputError(
                f"RetroFitted: layer {number} ({type(layer).__name__}) cannot be fitted. Looked for a part whose "
                "output is added to the layer's input and read by a later part, or added together with a later part's "
                f"output to give the layer's; its parts: {names}. Leave it out of cca_layers if other layers differ."
            )
        sites[number] = site
    return sites


def _site(calls: list[_Call], scales: list[float]) -> _Site | None:
    *parts, (_, x, out) = calls
    if x is None or out is None:
        return None
    # a module that serves twice, as a dropout behind the attention and the network, would add the contribution twice
    times = Counter(part.module for part in parts)
    results = [
        (i, part.result) for i, part in enumerate(parts) if times[part.module] == 1 and _alike(part.result, x)
    ]
    for i, result in reversed(results):
        given = [later.given for later in parts[i + 1 :] if _alike(later.given, x)]
        for scale in scales:
            if any(torch.equal(state.flatten(), (x + result * scale).flatten()) for state in given):
                return _Site(parts[i].module, scale)
    for i, result in reversed(results):
        for j, other in results:
            size = 16 * torch.finfo(x.dtype).eps * (x.abs() + result.abs() + other.abs())
            if j > i and bool(((x + result + other - out).abs() <= size).all()):
                return _Site(parts[i].module, 1.0)
    return None


def _alike(value: Tensor | None, x: Tensor) -> TypeGuard[Tensor]:
    return value is not None and value.numel() == x.numel() and value.dtype == x.dtype


def _first(values: Any, named: dict[str, Any] | None = None) -> Any:
    """The first floating tensor among arguments or results."""
    if isinstance(values, Tensor):
        return values
    everything = (*values, *(named or {}).values()) if isinstance(values, (tuple, list)) else ()
    return next((v for v in everything if isinstance(v, Tensor) and v.is_floating_point()), None)


def _description(base: Any) -> dict[str, Any]:
    """What a base is known by: where it came from, its kind, its sizes, and a number out of each of its matrices but
    the quantised."""
    text, sample, source = _text_config(base), {}, base.config.name_or_path
    for name, weight in base.named_parameters():
        plain = weight.is_floating_point() and not is_quantised(weight)
        if plain and weight.ndim > 1 and weight.numel():
            sample[name] = float(weight.detach().flatten()[weight.numel() // 2])
    return {
        "source": str(Path(source).resolve()) if source and Path(source).is_dir() else source,
        "model_type": base.config.model_type,
        "dtype": str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "vocab_size": base.get_input_embeddings().num_embeddings,
        "dim": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "adapters": _has_adapters(base),
        "sample": sample,
    }


def _has_adapters(base: Any) -> bool:
    """Whether PEFT put some into it: where it came from holds none, and its `save_pretrained` writes them alone."""
    return bool(getattr(base, "peft_config", None))


def _owns_base(config: dict[str, Any], folder: Path) -> bool:
    """Whether the model whose `config` lies in `folder` was saved with its base."""
    base = config.get("base")
    return isinstance(base, dict) and not base.get("frozen", not (folder / _OWN_BASE).is_dir())


def _check_same_base(saved: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """InputError where they differ, by more than rounding if the dtypes do."""
    advice = f"Give that base ({saved.get('source') or 'it had no name'}) {_AS_BASE}."
    for name in ("model_type", "vocab_size", "dim", "num_layers"):
        if saved.get(name) != given[name]:
            raise InputError(
                f"{folder} was trained with a base whose {name} is {saved.get(name)!r}, not {given[name]!r}. {advice}"
            )
    if saved.get("adapters", False) != given["adapters"]:
        raise InputError(
            f"{folder} was trained with a base that had {'no ' if given['adapters'] else ''}adapters (PEFT), and this "
            f"one has {'some' if given['adapters'] else 'none'}. {advice}"
        )
    sample, rounded = saved.get("sample", {}), saved.get("dtype") != given["dtype"]
    relative, absolute = (0.01, 1e-6) if rounded else (0.0, 0.0)
    for name, value in given["sample"].items():
        if name in sample and not math.isclose(sample[name], value, rel_tol=relative, abs_tol=absolute):
            raise InputError(
                f"{folder} was trained with another base of the same kind: {name} differs. {advice}"
            )
