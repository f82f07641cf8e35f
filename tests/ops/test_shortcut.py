"""Calls that go straight to the kernels of an earlier one of their kind."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import without_gpu
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from retro_kernels.ops import _shortcut, use_backend
from retro_kernels.ops._shortcut import look_up, note, remember, with_gradient
from retro_kernels.ops.cca import op

OPTIONS = (64, None, 0.0, "triton")


@pytest.fixture(autouse=True)
def own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shortcut, "_kept", {})
    monkeypatch.setattr(_shortcut, "_recent", _shortcut.Recent())


class Pass:
    def __init__(self) -> None:
        self.got: list[tuple[Tensor | None, ...]] = []

    def __call__(self, *tensors: Tensor | None) -> int:
        self.got.append(tensors)
        return len(self.got)


def call(
    tensors: tuple[Tensor | None, ...], passed: Any = None, options: tuple[Any, ...] = OPTIONS
) -> tuple[Any, Pass]:
    """The long way of a call, whose pass gets `passed` (else the tensors); what was found at first, and the pass."""
    made = Pass()
    key, known = look_up("op", tensors, options)
    if known is None:
        note(made, tensors if passed is None else passed)
        remember(key, tensors)
    return known, made


def test_the_second_call_goes_to_the_pass_of_the_first() -> None:
    x, y = torch.randn(4, 6), torch.randn(3)
    known, made = call((x, None, y), (x.view(2, 2, 6), None, y, None))
    assert known is None
    other = torch.randn(4, 6), torch.randn(3)
    key, known = look_up("op", (other[0], None, other[1]), OPTIONS)
    assert key is not None and known is not None
    assert known(other[0], None, other[1]) == 1
    (got,) = made.got
    assert got[0] is other[0] and got[1] is None and got[2] is other[1] and got[3] is None and len(got) == 4


@pytest.mark.parametrize(
    "passed",
    [
        lambda x, y: (x.clone(), y),
        lambda x, y: (x, y, torch.zeros(1)),  # a seed, say, that each call draws anew
        lambda x, y: (x, None),
        lambda x, y: (x,),
        lambda x, y: (x.view(torch.int32), y),
        lambda x, y: (x[:2], y),
    ],
)
def test_a_pass_that_got_something_else_is_not_taken(passed: Callable[..., Any]) -> None:
    tensors = torch.randn(4, 6), torch.randn(3)
    call(tensors, passed(*tensors))
    assert call(tensors)[0] is None


def test_a_pass_of_another_thread_or_time_is_not_taken() -> None:
    x, made = torch.randn(4), Pass()
    note(made, (x,))  # nobody asked
    key, _ = look_up("op", (x,), OPTIONS)
    other = threading.Thread(target=note, args=(made, (x,)))
    other.start()
    other.join()
    remember(key, (x,))
    assert look_up("op", (x,), OPTIONS)[1] is None
    remember(None, (x,))
    assert not _shortcut._kept


def test_nothing_is_kept_alive() -> None:
    import gc
    import weakref

    x = torch.randn(1000)
    gone = weakref.ref(x)
    look_up("op", (x,), OPTIONS)
    note(Pass(), (x,))  # and an error, say, instead of `remember`
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.double(),), OPTIONS),
        lambda x: ((x.T.contiguous().T,), OPTIONS),
        lambda x: ((x[:3],), OPTIONS),
        lambda x: ((torch.empty(25)[1:].view(4, 6),), OPTIONS),  # at an odd address
        lambda x: ((x, x), OPTIONS),
        lambda x: ((x,), (32, *OPTIONS[1:])),
        lambda x: ((x,), (64.0, *OPTIONS[1:])),  # which the long way would not take
        lambda x: ((x,), (64, 0.5, *OPTIONS[2:])),
    ],
)
def test_another_kind_goes_the_long_way(other: Callable[..., Any]) -> None:
    x = torch.randn(4, 6)
    call((x,))
    assert call((x,))[0] is not None
    tensors, options = other(x)
    key, known = look_up("op", tensors, options)
    assert key is not None and known is None
    with use_backend("reference"):
        assert look_up("op", (x,), OPTIONS)[1] is None
    assert look_up("another", (x,), OPTIONS)[1] is None


def test_later_calls_work_out_no_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    call((x, None))
    known = call((x, None))[0]
    with monkeypatch.context() as patched:
        patched.setattr(_shortcut, "kind", None)
        for _ in range(2):
            assert known is not None and look_up("op", (torch.randn(4, 6), None), OPTIONS)[1] is known
        assert look_up("op", (x, None), (64, [], 0.0, "triton")) == (None, None)  # what has no hash
    shapes = [torch.randn(4, 7 + i) for i in range(3 * _shortcut._EACH)]
    for other in shapes:
        call((other, None))
    for other in (*shapes, x, *shapes):
        assert look_up("op", (other, None), OPTIONS)[1] is not None
        assert {len(found) for found in _shortcut._recent._made.values()} <= set(range(_shortcut._EACH + 1))


def test_calls_are_known_without_torchs_check_too(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", None)
    monkeypatch.setattr(_shortcut, "_guards", _shortcut._trusted_guards())
    call((x,))
    for _ in range(3):
        assert call((x,))[0] is not None
    assert not _shortcut._recent._made


class Guards:
    """As torch's, but they overlook a property."""

    properties: dict[str, Callable[[Tensor], Any]] = {
        "type": type,
        "dtype": lambda x: x.dtype,
        "sizes": lambda x: x.shape,
        "strides": lambda x: x.stride() if x.dim() == 2 else None,
        "gradient": lambda x: x.requires_grad,
        "device": lambda x: x.device,
        "sign": lambda x: x.is_neg(),
    }
    overlooked: str | None = None

    def __init__(self, *tensors: Tensor, dynamic_dims_sizes: None, dynamic_dims_strides: None) -> None:
        self.found = self.properties_of(tensors)

    def properties_of(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        return [f(x) for x in tensors for name, f in self.properties.items() if name != self.overlooked]

    def check(self, *tensors: Tensor) -> bool:
        return self.found == self.properties_of(tensors)


@pytest.mark.parametrize("overlooked", [None, *Guards.properties])
def test_another_torchs_check_is_tried_before_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, overlooked: str | None
) -> None:
    assert _shortcut._guards is torch._C._dynamo.guards.TensorGuards  # the installed one is
    monkeypatch.setattr(Guards, "overlooked", overlooked)
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Guards)
    assert (_shortcut._trusted_guards() is Guards) == (overlooked is None)


def test_another_torchs_check_may_take_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", lambda *tensors: None)
    assert _shortcut._trusted_guards() is None
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert _shortcut._trusted_guards() is None


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class SeenAbove(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def transformed() -> Iterator[None]:
    from torch._functorch.eager_transforms import grad_increment_nesting

    with grad_increment_nesting():
        yield


@pytest.mark.parametrize(
    "context",
    [
        Seen,
        SeenAbove,
        transformed,
        forward_ad.dual_level,
        torch.profiler.profile,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "__name__", "autocast"),
)
def test_whoever_takes_part_sees_the_call(context: Callable[[], Any]) -> None:
    x = torch.randn(4, 6)
    call((x,))
    assert look_up("op", (x,), OPTIONS)[1] is not None
    with context():
        assert look_up("op", (x,), OPTIONS) == (None, None)
    assert look_up("op", (x,), OPTIONS)[1] is not None


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.randn(4, requires_grad=True),
        lambda: torch.randn(4).as_subclass(Own),
        lambda: torch.randn(4, device="meta"),
        lambda: torch.randn(4, 4).to_sparse(),
        lambda: torch.randn(4, dtype=torch.complex64).conj().imag,  # its sign is a bit
        lambda: [1.0, 2.0],
        lambda: None,
    ],
)
def test_other_tensors_go_the_long_way(tensor: Callable[[], Any]) -> None:
    given = (tensor(), torch.randn(3))
    assert look_up("op", given, OPTIONS) == (None, None)
    with torch.no_grad():
        if isinstance(given[0], Tensor) and given[0].requires_grad:
            assert look_up("op", given, OPTIONS)[0] is not None


@pytest.mark.parametrize(
    "alike",
    [
        lambda x: x.as_subclass(Own),
        lambda x: x.to("meta"),
        torch._neg_view,
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nested.nested_tensor([*x]),  # the native check ends the process for one
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_mkldnn(),
        lambda x: None,
    ],
)
def test_what_is_only_like_a_known_call_goes_the_long_way(alike: Callable[[Tensor], Any]) -> None:
    x, y = torch.randn(4, 6), torch.randn(3)
    for _ in range(3):
        known = call((x, y))[0]
    assert known is not None
    for _ in range(2):
        assert look_up("op", (alike(x), y), OPTIONS) == (None, None)
    assert look_up("op", (x, alike(x)), OPTIONS)[1] is None


def test_gradients_are_another_kind() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    with torch.no_grad():
        for _ in range(3):
            known = call((x,))[0]
        assert known is not None
    assert look_up("op", (x,), OPTIONS) == (None, None)
    assert look_up("op", (x,), OPTIONS, differentiable=True)[1] is None


def test_a_recorded_call_goes_to_what_autograd_sees() -> None:
    x, made = torch.randn(4, requires_grad=True), Pass()

    def called(recorded: Callable[..., Any] | None = None) -> Callable[..., Any] | None:
        key, known = look_up("op", (x,), OPTIONS, differentiable=True)
        if known is None:
            note(made, (x.view(2, 2),))
            if recorded is not None:
                with_gradient(recorded)
            remember(key, (x,))
        return known

    assert called() is None and called() is None  # a pass alone, which autograd would not see
    assert called(lambda made: lambda x: ("seen", made(x))) is None
    known = called()
    assert known is not None and known(x) == ("seen", 1) and made.got[-1][0] is x
    with torch.no_grad():  # is another kind
        assert called() is None
        known = called()
    assert known is not None and known(x) == 2
    with_gradient(lambda made: None)  # nobody asked
    assert called() is not None


@pytest.mark.parametrize("option", [True, torch.tensor(0.5), (1, 2)])
def test_other_options_go_the_long_way(option: Any) -> None:
    assert look_up("op", (torch.randn(3),), (64, option)) == (None, None)


def test_tracers_see_the_call() -> None:
    found = []

    def traced(x: Tensor) -> Tensor:
        found.append(look_up("op", (x,), OPTIONS))
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.trace(traced, torch.randn(3), check_trace=False)
    assert found == [(None, None)]
    compiled = torch.compile(
        lambda x: x + (look_up("op", (x,), OPTIONS)[0] is None), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))


SCRIPT = """
from retro_kernels.ops import _shortcut, absorbed_decode, block_attention, chunked_cross_attention
from retro_kernels.ops import chunked_cross_attention_decode
from retro_kernels.ops.cca import decode, decode_kernel, op

op.why_not_triton = decode.why_not_triton = lambda device, dtype: None
decode_kernel.slots = lambda device, resident: 132 * resident

def tensor(x):
    given = [i for i, y in enumerate(tensors) if y.data_ptr() == x.data_ptr()]
    return x.dtype, x.numel(), given

def draw(*shape):
    x = torch.randn(shape).to(torch.bfloat16).requires_grad_(torch.is_grad_enabled())
    tensors.append(x)
    return x

def whole_numbers(high, *shape):
    x = torch.randint(0, high, shape)
    tensors.append(x)
    return x

def terms(columns):
    return {
        "rel_key": draw(2, columns, 32),
        "content_bias": draw(2, 32),
        "position_bias": draw(2, 32),
        "rel_bias": draw(2, columns),
        "backend": "triton",
    }

def whole():
    options = {"chunk_size": 16, "neighbour_lengths": whole_numbers(65, 1, 4, 2)}
    return chunked_cross_attention(
        draw(1, 64, 2, 32), draw(1, 4, 2, 64, 2, 32), draw(1, 4, 2, 64, 2, 32), **terms(79), **options
    )

def blocks():
    key, value = draw(3, 1, 16, 2, 32), draw(3, 1, 16, 2, 32)
    return block_attention(draw(6, 32, 2, 32), key, value, key_repeat=2, lengths=whole_numbers(17, 3, 1), **terms(47))

def keys():
    options = {"rows": whole_numbers(16, 2, 1), "neighbour_lengths": whole_numbers(65, 2, 2)}
    key, value = draw(2, 2, 64, 2, 32), draw(2, 2, 64, 2, 32)
    return chunked_cross_attention_decode(draw(2, 1, 2, 32), key, value, **terms(79), **options)

def states():
    weights = draw(64, 48), draw(64, 48)
    return absorbed_decode(draw(2, 1, 2, 32), draw(2, 2, 64, 48), *weights, rows=whole_numbers(16, 2, 1), **terms(79))

count, twice, launched = 0, 0, {}
cases = [(f, False) for f in (whole, blocks, keys, states)] + [(f, True) for f in (whole, blocks)]
for function, gradients in cases:
    found, shapes = [], []
    for turn in range(3):
        tensors, calls = [], []
        if turn == 2:  # the long way is closed
            closed = op._check_ranks, decode._check_floating, op._gradients
            op._check_ranks = decode._check_floating = op._gradients = None
        with torch.set_grad_enabled(gradients):
            out = function()
        results = [out]
        if gradients:
            inputs = [x for x in tensors if x.requires_grad]
            assert len(inputs) == 7 and out.requires_grad
            results += torch.autograd.grad(out, inputs, torch.ones_like(out))
            assert [x.shape for x in results[1:]] == [x.shape for x in inputs]
        found.append(calls)
        shapes.append(tuple((x.shape, x.dtype, x.is_contiguous()) for x in results))
    op._check_ranks, decode._check_floating, op._gradients = closed
    count += 1 + gradients  # a pass each
    assert len(_shortcut._recent._made) == count, function
    # keys of chunks had lost an axis before the first backward pass, and keep it later
    twice += function is whole and gradients
    assert len(_shortcut._kept) == count + twice, function
    assert found[0] and found[0] == found[1] == found[2], (function, found)
    assert len(set(shapes)) == 1, shapes
    launched[function, gradients] = found[0]
for function in (whole, blocks):
    assert launched[function, True][: len(launched[function, False])] == launched[function, False]
    assert len(launched[function, True]) > 2 * len(launched[function, False])
print("the same")
"""


def test_the_short_way_launches_what_the_long_way_does(tmp_path: Path) -> None:
    """By the installed Triton's compiler and objects, for a GPU that is not here: nothing is run."""
    without_gpu.run(SCRIPT, tmp_path)


LAYERS = """
from retro_kernels import ChunkedCrossAttention
from retro_kernels.nn.attention import BlockAttention
from retro_kernels.ops.cca import decode, decode_kernel, op

op.why_not_triton = decode.why_not_triton = lambda device, dtype: None
decode_kernel.slots = lambda device, resident: 132 * resident
tensor, calls = id, []

sizes = {"encoder_dim": 48, "chunk_size": 16, "neighbour_len": 32}
cca = ChunkedCrossAttention(64, 2, **sizes, projection="materialised", backend="triton").to(WEIGHTS)
block = BlockAttention(64, 2, 16, 16, head_dim=32, dropout=0.0, backend="triton").to(WEIGHTS)
x, neighbours = torch.randn(1, 64, 64, dtype=WEIGHTS), torch.randn(1, 4, 2, 32, 48, dtype=WEIGHTS)

def step():
    key, value = cca.keys_and_values(neighbours[:, 0])
    return cca.attend_rows(x[:, :1], 0, key, value, None, cca.position_terms())

cases = (lambda: cca(x, neighbours)), (lambda: block(x.view(4, 16, 64))), step
for function, gradients in [(f, False) for f in cases] + [(f, True) for f in cases[:2]]:
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=WEIGHTS == torch.float32)
    with torch.set_grad_enabled(gradients), autocast:
        assert function().dtype == torch.bfloat16
        checks = op._check_ranks, decode._check_floating
        op._check_ranks = decode._check_floating = None  # the long way is closed
        function()
        op._check_ranks, decode._check_floating = checks
print("the same")
"""


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_layers_take_the_short_way(weights: torch.dtype, tmp_path: Path) -> None:
    without_gpu.run(LAYERS.replace("WEIGHTS", str(weights)), tmp_path)


@pytest.mark.parametrize("shape", [(2, 40, 2, 8), (12, 20, 2, 8)])
def test_gradients_of_the_short_way(shape: tuple[int, ...], seed: int) -> None:
    """Its tensors are as they were given: keys and lengths of chunks have an axis more than those of blocks."""
    keys = (2, 2, 3, 12, 2, 8) if shape[0] == 2 else (4, 3, 12, 2, 8)
    block, shift, repeat = (16, 15, 1) if shape[0] == 2 else (20, 0, 3)
    columns = block + 11
    drawn = [torch.randn(x) for x in (shape, keys, keys, (2, columns, 8), (2, 8), (2, 8), (2, columns))]
    given = [x.requires_grad_() for x in drawn]
    lengths = torch.randint(0, 13, keys[:-3])
    grad = torch.randn(shape)
    query, key, value, *tables = given
    names = ("rel_key", "content_bias", "position_bias", "rel_bias")
    terms: dict[str, Any] = {**dict(zip(names, tables, strict=True)), "scale": 0.3, "backend": "torch"}
    if shape[0] == 2:
        out = op.chunked_cross_attention(query, key, value, chunk_size=16, neighbour_lengths=lengths, **terms)
    else:
        out = op.block_attention(query, key, value, key_repeat=3, lengths=lengths, **terms)
    expected = (out, *torch.autograd.grad(out, given, grad))

    def made(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        blocks = [x.reshape(-1, *keys[-4:]) for x in (key, value)]
        lengths = others[4]
        assert lengths is not None and lengths.shape == keys[:-3]
        rest = (*others[:4], lengths.reshape(-1, 3), None, block, shift, repeat, 0.3, 0.0, "torch")
        return torch.ops.retro_kernels.cca_fwd(query, *blocks, *rest)

    short, _ = op._BlockAttention.apply(made, *given, lengths, None, block, shift, repeat, 0.3, 0.0, "torch")
    for a, b in zip((short, *torch.autograd.grad(short, given, grad)), expected, strict=True):
        assert torch.equal(a, b) and a.shape == b.shape
    with pytest.raises(RuntimeError, match="no second derivative"):
        short, _ = op._BlockAttention.apply(
            made, *given, lengths, None, block, shift, repeat, 0.3, 0.0, "torch"
        )
        (once,) = torch.autograd.grad(short.sum(), query, create_graph=True)
        once.sum().backward()


@pytest.mark.gpu
def test_the_short_way_computes_the_same_on_the_gpu(seed: int) -> None:
    from retro_kernels.ops import absorbed_decode, chunked_cross_attention
    from retro_kernels.ops.cca import launch

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)

    launch.forget()
    for _ in range(3):
        terms = {"rel_key": draw(4, 191, 64), "content_bias": draw(4, 64), "position_bias": draw(4, 64)}
        query, key, value = draw(2, 300, 4, 64), draw(2, 4, 2, 128, 4, 64), draw(2, 4, 2, 128, 4, 64)
        states, weights = draw(2, 2, 128, 896), (draw(256, 896), draw(256, 896))
        rows = torch.randint(0, 64, (2, 1), device="cuda")
        with torch.no_grad():
            short = [
                chunked_cross_attention(query, key, value, **terms),
                absorbed_decode(query[:, :1].contiguous(), states, *weights, rows=rows, **terms),
            ]
            with SeenAbove():
                long = [
                    chunked_cross_attention(query, key, value, **terms),
                    absorbed_decode(query[:, :1].contiguous(), states, *weights, rows=rows, **terms),
                ]
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
        leaves = [x.requires_grad_() for x in (query, key, value, *terms.values())]
        grad = torch.randn_like(query)
        lengths = torch.randint(0, 129, (2, 4, 2), device="cuda", dtype=torch.int32)
        out = chunked_cross_attention(query, key, value, neighbour_lengths=lengths, **terms)
        short = [out, *torch.autograd.grad(out, leaves, grad)]
        with SeenAbove():
            out = chunked_cross_attention(query, key, value, neighbour_lengths=lengths, **terms)
            long = [out, *torch.autograd.grad(out, leaves, grad)]
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert len(_shortcut._recent._made) == 4  # one of them is the backward pass
