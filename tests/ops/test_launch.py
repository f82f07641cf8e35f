"""What a call allocates and launches, and what is kept of it for calls of its kind."""

from __future__ import annotations

import functools
import math
import random
from typing import NamedTuple

import pytest
import torch
import without_gpu
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from retro_kernels.ops import _shortcut
from retro_kernels.ops.cca import backward, launch, table_gradients, tiles, tuning
from retro_kernels.ops.cca.tiles import Config

TABLES = ("rel_key", "content_bias", "position_bias", "rel_bias")


@pytest.fixture(autouse=True)
def own_passes(monkeypatch):
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(launch, "_recent", _shortcut.Recent())


class Kernel:
    """Stands for a Triton kernel of two tensors, a scalar and a constant: it notes how it is called."""

    arg_names = ("a", "b", "scalar", "CONSTANT")

    def __init__(self):
        self.compilations, self.calls = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.compilations.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.calls.append((grid, args, {}))


def described(args):
    return [
        (x.base.data_ptr(), x.shape, x.strides, x.block_shape, x.padding) if hasattr(x, "block_shape") else x
        for x in args
    ]


def test_later_launches_are_told_what_the_first_was():
    """In the order of the kernel's signature, whoever passes them on; windows are into the tensors of each call."""
    kernel = Kernel()
    first, second = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    window = launch.Window(launch.flat_rows(first), 2, 64, True)
    once = launch.Launch(kernel, (7,), (window,), (0.5,), {"CONSTANT": 3}, num_warps=4)
    assert not once.compiled
    for x in (first, second, second):
        once(x, None)
    assert once.compiled and len(kernel.compilations) == 1 and len(kernel.calls) == 2
    (grid, given, options), (grid_later, later, _) = kernel.compilations[0], kernel.calls[0]
    assert grid == grid_later == (7, 1, 1) and options == {"num_warps": 4}
    assert described(given)[1:] == described(later)[1:] == [None, 0.5, 3]
    layout = ([2, 3, 64], [192, 64, 1], [1, 2, 64], "zero")
    assert described(given)[0] == (first.data_ptr(), *layout)
    assert described(later)[0] == (second.data_ptr(), *layout)


def test_a_trap_is_never_launched(monkeypatch):
    """What Triton makes of some kernels for sm_100; smaller blocks are tried, as where memory does not suffice."""
    monkeypatch.setattr(tiles, "architecture", lambda device: 100)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(tuning, "_fitted", {})

    class Made(Kernel):
        __name__ = "kernel"

        def __init__(self, ptx):
            super().__init__()
            self.ptx = ptx

        def warmup(self, *given, grid, **options):
            return type("Compiled", (), {"asm": {"ptx": self.ptx}})

    class Problem(NamedTuple):
        name: str
        padded_dim: int = 64
        direction: str = "backward"
        dtype: torch.dtype = torch.bfloat16

    kernels = [Made(".entry() { trap; }"), Made(".entry() { ld.param.b64 %rd1; }")]

    def attempt(config):
        tried.append(config)
        launch.Launch(kernels[len(tried) - 1], (1,), (), (0.5,), {"CONSTANT": 3})(torch.zeros(1))
        return "done"

    tried: list[Config] = []
    found = tuning.until_it_fits(
        Config(64, 8, 1), attempt, functools.partial(tuning.smaller, Problem("first"))
    )
    assert found == "done" and tried == [Config(64, 8, 1), Config(64, 8, 1, panels=2)]
    assert not kernels[0].compilations and len(kernels[1].compilations) == 1
    tried.clear()
    kernels[1:] = [Made("trap;")] * 2
    with pytest.raises(RuntimeError, match="is not compiled by this Triton in any blocks that were tried"):
        tuning.until_it_fits(
            Config(32, 8, 1, 2), attempt, functools.partial(tuning.smaller, Problem("other"))
        )
    assert len(tried) == 2 and not any(kernel.compilations for kernel in kernels)


TRAPS = """
from retro_kernels.ops.cca import backward, launch, tuning
tiles.architecture = lambda device: 100
Driver.get_current_target = lambda self: GPUTarget("cuda", 100, 32)
calls, tensor = [], lambda x: x.shape

def call(dim, neighbours, config):
    meta = {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(2, 128, 4, dim, **meta), torch.empty(4, neighbours, 128, 4, dim, **meta)
    lse = torch.empty(4, 4, 64, device="meta")
    tables = torch.empty(4, 191, dim, **meta), torch.empty(4, dim, **meta), torch.empty(4, dim, **meta), None
    backward.backward(q, q, lse, q, k, k, *tables, None, None, 64, 63, 1, 0.1, 0.0, (True,) * 4, config=config)

try:
    call(256, 1, tiles.Config(32, 8, 1, panels=2))
except launch.NotCompiled:
    assert not calls
else:
    assert not triton.__version__.startswith("3.7"), "no trap, or launched"
calls.clear()
if triton.__version__.startswith("3.5"):  # which cannot do it without a loop over neighbours
    try:
        call(256, 1, None)
    except RuntimeError as error:
        assert "not compiled by this Triton in any blocks" in str(error) and not calls
else:
    call(256, 1, None)
    assert len(calls) > 1
calls.clear()
call(64, 2, None)
assert len(calls) > 1
print("the same")
"""


def test_what_triton_makes_a_trap(tmp_path):
    """With 3.7, of heads of 256 and one neighbour, in other block sizes than those of the table."""
    without_gpu.run(TRAPS, tmp_path)


def test_a_pass_serves_its_kind_of_calls_only():
    """Another type, shape, layout, option or missing tensor is another kind; addresses are not, but their alignment."""
    made, kernel = [], Kernel()

    class Recording:
        def __init__(self, a, b):
            self.launches = [launch.Launch(kernel, (1,), (), (0.5,), {"CONSTANT": 3})]
            made.append((a, b))

        def __call__(self, a, b):
            self.launches[0](a, b)
            return a

    def call(a, b=None, option=1, what="forward"):
        return launch.run(
            what,
            (a, b),
            (option,),
            lambda x, config: Recording(*x),
            lambda attempt: attempt(Config(16, 4, 1)),
        )

    x, other = torch.randn(4, 4, 2, 8), torch.randn(4, 4, 2, 8)
    assert call(x) is x and call(other) is other and len(made) == 1
    misaligned = torch.randn(x.numel() + 1)[1:].view(x.shape)
    kinds = [(x.half(),), (x[:2],), (x.transpose(0, 1),), (x, other), (x, None, 2), (x, None, 1, "backward")]
    for _ in range(2):
        for arguments in kinds:
            call(*arguments)
    assert len(made) == 1 + len(kinds)
    for _ in range(2):
        call(misaligned)
    assert len(made) == 2 + len(kinds)  # code for the others takes their alignment for granted
    launch.forget()
    call(x)
    assert len(made) == 3 + len(kinds)


def test_what_cannot_be_walked_by_strides_is_copied():
    seen = []

    class Recording:
        launches = ()

        def __call__(self, *tensors):
            seen.extend(tensors)

    x = torch.randn(2, 5, 3, 16)
    strided, dense = x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, :, :]
    spread = torch.randn(1, 1, 1, 1).expand(2, 5, 3, 16)
    launch.run("forward", (strided, dense, spread, None), (), lambda *_: Recording(), lambda f: f(None))
    assert seen[0].data_ptr() != strided.data_ptr() and torch.equal(seen[0], strided)
    assert seen[1].data_ptr() == dense.data_ptr()
    assert seen[2].is_contiguous() and torch.equal(seen[2], spread) and seen[3] is None
    table = torch.randn(16, 3).T
    launch.run("forward", (dense, table), (), lambda *_: Recording(), lambda f: f(None))
    assert seen[5].is_contiguous() and torch.equal(seen[5], table)


def test_what_tma_can_walk():
    x = torch.empty(2, 6, 64, dtype=torch.float16)
    for walked in (x, x[:, ::2], x.transpose(0, 1)):
        assert tiles.can_use_tma(90, 64, 64, x.dtype, (x, walked))
    narrow, spread = torch.empty(2, 6, 68, dtype=torch.float16)[..., :64], x[:1].expand(2, 6, 64)
    for other in (narrow, x.flatten()[4:-60].view(1, -1, 64), spread):
        assert not tiles.can_use_tma(90, 64, 64, x.dtype, (x, other))
    assert not tiles.can_use_tma(80, 64, 64, x.dtype, (x,))
    assert not tiles.can_use_tma(90, 48, 64, x.dtype, (x,))
    assert not tiles.can_use_tma(90, 64, 64, torch.float32, (x.float(),))


@pytest.mark.parametrize("_", range(200))
def test_slices_keep_ds_where_nothing_is_yet(seed, monkeypatch, _):
    """Every block is in one slice; dS lie in the dK of later blocks, or need little memory of their own."""
    draw = random.Random(seed + _)
    blocks, tiles_each = draw.randint(1, 300), draw.randint(1, 40)
    tile_size, keys_each = 16 * draw.randint(1, 64), 16 * draw.randint(1, 4000)
    monkeypatch.setattr(table_gradients, "OWN_DS", draw.choice([0, 10_000, 10**6]))
    slices = table_gradients.slices(blocks, tiles_each, tile_size, keys_each)
    assert [x.first for x in slices] == [0, *(x.last for x in slices[:-1])] and slices[-1].last == blocks
    *lent, own = slices
    for x in lent:
        assert x.first < x.last and x.tile * tile_size >= x.last * keys_each
        assert (x.tile + (x.last - x.first) * tiles_each) * tile_size <= blocks * keys_each
    assert own.tile is None
    rest = own.last - own.first
    assert (
        rest * tiles_each * tile_size <= table_gradients.OWN_DS
        or (rest - 1) * keys_each < (1 + tiles_each) * tile_size
        or len(slices) == table_gradients.MOST_SLICES
    )


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations and the bytes that they allocate."""

    def __init__(self):
        super().__init__()
        self.names, self.storages = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function).removeprefix("aten."))
        result = function(*args, **(kwargs or {}))
        if "empty" in self.names[-1]:
            self.storages[id(result.untyped_storage())] = result
        return result

    def bytes(self, device):
        return sum(x.untyped_storage().nbytes() for x in self.storages.values() if x.device.type == device)


def launched(monkeypatch, kernels, run):
    """What `run` launches and does besides, with kernels that do nothing."""

    def note(self, *tensors):
        kernels.append(self._kernel.fn.__name__)

    monkeypatch.setattr(launch.Launch, "__call__", note)
    with Operations() as operations:
        result = run()
    return result, operations


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ((), ["bwd"]),
        (("rel_bias",), ["bwd", "bwd_columns"]),
        (("content_bias",), ["bwd", "bwd_biases"]),
        (("rel_key",), ["bwd", "bwd_rel", "bwd_columns"]),
        (TABLES, ["bwd", "bwd_rel", "bwd_columns", "bwd_biases"]),
    ],
)
def test_a_backward_pass_is_a_few_launches(monkeypatch, tables, expected):
    """Each costs a GPU some microseconds and the processor tens: no operation of PyTorch is among them."""
    meta = {"device": "meta"}
    query, key = torch.empty(2, 8 * 16, 2, 16, **meta), torch.empty(16, 2, 32, 2, 16, **meta)
    shapes = {"rel_key": (2, 47, 16), "content_bias": (2, 16), "position_bias": (2, 16), "rel_bias": (2, 47)}
    terms = [torch.empty(shapes[name], **meta) if name in tables else None for name in shapes]
    kernels = []
    arguments = (query, query, torch.empty(16, 2, 16, **meta), query, key, key, *terms, None, None)
    _, operations = launched(
        monkeypatch, kernels, lambda: backward.backward(*arguments, 16, 15, 1, 0.25, 0.0, (True,) * 4)
    )
    assert kernels == [f"_cca_{name}_kernel" for name in expected]
    assert {x.partition(".")[0] for x in operations.names} <= {"new_empty", "empty", "view", "detach"}


def memory(monkeypatch, batch, neighbours, head_dim, positions, dtype=torch.bfloat16, kv_heads=16):
    """Bytes that a backward pass on Hopper takes besides the gradients, and those of inputs, outputs and gradients: for
    sequences of 32 chunks of 64 tokens, neighbours of 128, 16 heads."""
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    meta = {"device": "meta", "dtype": dtype}
    query = torch.empty(batch, 2048, 16, head_dim, **meta)
    key, value = (torch.empty(32 * batch, neighbours, 128, kv_heads, head_dim, **meta) for _ in "kv")
    tables = [
        torch.empty(16, 191, head_dim, **meta),
        *(torch.empty(16, head_dim, **meta) for _ in "uv"),
        None,
    ]
    if positions == "bias":
        tables = [None, None, None, torch.empty(16, 191, device="meta")]
    lse = torch.empty(32 * batch, 16, 64, device="meta")
    given = (query, query, lse, query, key, value, *tables, None, None)
    worked_out = backward._Backward.__init__

    def and_forgotten(self, *given):  # layouts are worked out on tensors without memory, which count here too
        worked_out(self, *given)
        operations.storages.clear()

    with monkeypatch.context() as patched, Operations() as operations:
        patched.setattr(launch.Launch, "__call__", lambda self, *tensors: None)
        patched.setattr(backward._Backward, "__init__", and_forgotten)
        grads = backward.backward(*given, 64, 63, 1, head_dim**-0.5, 0.0, (True,) * 4)

    def size(tensors):
        return sum(math.prod(x.shape) * x.element_size() for x in tensors if x is not None)

    # grad_out, out and query are three
    everything = size([query, query, query, lse, key, value, *tables, *grads])
    return operations.bytes("meta") - size(grads), everything


@pytest.mark.parametrize("neighbours", [2, 10])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("positions", ["bias", "relative"])
def test_memory_beyond_the_gradients_is_two_percent(monkeypatch, positions, head_dim, neighbours):
    """Of inputs, outputs and gradients, in bf16."""
    beyond, everything = memory(monkeypatch, 8, neighbours, head_dim, positions)
    assert 0 <= beyond <= 0.02 * everything, (beyond, everything)


@pytest.mark.parametrize("neighbours", [2, 10])
@pytest.mark.parametrize("positions", ["bias", "relative"])
@pytest.mark.parametrize(
    "shared", [{"kv_heads": 4, "head_dim": 64}, {"dtype": torch.float32, "head_dim": 128}]
)
def test_memory_for_shares_of_the_same_keys_does_not_grow(monkeypatch, shared, positions, neighbours):
    """Of grouped heads, and of rows for which a program has no registers."""
    few, of_few = memory(monkeypatch, 8, neighbours, positions=positions, **shared)
    many, of_many = memory(monkeypatch, 16, neighbours, positions=positions, **shared)
    assert 0 < few and 0 <= many - few <= 0.02 * (of_many - of_few), (few, many, of_few, of_many)


TRITONS_OWN = """
from retro_kernels.ops.cca import backward, forward, launch

def tensor(x):
    return x.dtype, x.shape, x.stride()

def draw(*shape):
    return torch.randn(shape).to(torch.bfloat16)

terms = [draw(2, 79, 32), draw(2, 32), draw(2, 32), draw(2, 79)]
found = []
for _ in range(3):
    calls = []
    query, key, value = draw(1, 64, 2, 32), draw(4, 2, 64, 2, 32), draw(4, 2, 64, 2, 32)
    last = (None, None, 16, 15, 1, 0.25, 0.0)
    out, lse = forward.forward(query, key, value, *terms, *last)
    backward.backward(out, out, lse, query, key, value, *terms, *last)
    found.append(calls)
assert len(launch._kept) == 2 and len(found[0]) == 5, (launch._kept, found[0])
for calls in found[1:]:
    for a, b in zip(found[0], calls, strict=True):
        assert a == b, (a, b)
print("the same")
"""


def test_tritons_own_launch_gets_what_its_first_one_got(tmp_path):
    """By the installed Triton's compiler and objects, for a GPU that is not here: nothing is run."""
    without_gpu.run(TRITONS_OWN, tmp_path)


NOTED = """
from triton import knobs
from retro_kernels.ops.cca import backward, forward, launch

def draw(*shape):
    return torch.randn(shape).to(torch.bfloat16)

launched, call = [], launch.Launch.__call__

def noted(self, *tensors):
    launched.append((self, tensors))
    call(self, *tensors)

launch.Launch.__call__ = noted
"""
"""Launches are written down, with their tensors."""

NOTHING_TWICE = """
import gc, weakref
from retro_kernels.ops.cca import launcher
terms = [draw(2, 79, 32), draw(2, 32), draw(2, 32), draw(2, 79)]
for _ in range(3):
    query, key, value = draw(1, 64, 2, 32), draw(4, 2, 64, 2, 32), draw(4, 2, 64, 2, 32)
    last = (None, None, 16, 15, 1, 0.25, 0.0)
    out, lse = forward.forward(query, key, value, *terms, *last)
    backward.backward(out, out, lse, query, key, value, *terms, *last)

def ordinary(one, tensors):
    calls.clear()
    one._kernel[one._grid](*one._described(tensors), **one._options)
    return calls[0]

def short(one, tensors):
    calls.clear()
    one._run(*tensors)
    return calls[0]

def same(x, y):
    if isinstance(x, Map):
        return x.fields == y.fields
    nothing = type(y).__name__ in ("LazyDict", "HookChain")
    return x is y or (x is None and nothing) or (type(x) is type(y) and not isinstance(x, torch.Tensor) and x == y)

def equal(a, b):
    return len(a) == len(b) and all(map(same, a, b))

assert len(launched) == 15, launched
for one, tensors in launched:
    assert one._run.__qualname__ == "launcher.<locals>.launch", one._run
    expected, found = ordinary(one, tensors), short(one, tensors)
    assert equal(found, expected), (found, expected)
    encoded.clear()
    again = short(one, tensors)
    assert equal(again, expected) and not encoded, encoded
windows = [(one, tensors) for one, tensors in launched if any(isinstance(x, Map) for x in ordinary(one, tensors))]
assert len(windows) == 6, windows

launcher._MOST = 1
for one, tensors in windows * 2:
    encoded.clear()
    assert equal(short(one, tensors), ordinary(one, tensors)) and encoded

heard = []
one, tensors = windows[0]
for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    hook.add(heard.append)
    found = short(one, tensors)
    assert knobs.runtime.launch_enter_hook in found and "LazyDict" in [type(x).__name__ for x in found]
    hook.remove(heard.append)
assert knobs.runtime.launch_enter_hook not in short(one, tensors)

gone = [weakref.ref(x) for _, tensors in launched for x in tensors if x is not None]
del one, tensors, launched, windows, expected, found, again, terms, query, key, value, out, lse
calls.clear()
gc.collect()
assert not [x for x in gone if x() is not None]
print("the same")
"""


def test_launches_that_do_nothing_twice_pass_on_the_same(tmp_path):
    """To the native part of the installed Triton's launcher, as its ordinary way; and no tensor is kept."""
    without_gpu.run("calls = []" + NOTED + NOTHING_TWICE, tmp_path, without_gpu.LAUNCHER)


TO_THE_BYTE = """
from retro_kernels.ops.cca import decode_kernel
decode_kernel.slots = lambda device, resident: 132 * resident
terms = [draw(2, 79, 32), draw(2, 32), draw(2, 32), draw(2, 79)]
rows = torch.randint(0, 16, (2, 1))
for _ in range(3):
    query, key, value = draw(1, 64, 2, 32), draw(4, 2, 64, 2, 32), draw(4, 2, 64, 2, 32)
    last = (None, None, 16, 15, 1, 0.25, 0.0)
    out, lse = forward.forward(query, key, value, *terms, *last)
    backward.backward(out, out, lse, query, key, value, *terms, *last)
    one, key, value = draw(2, 1, 2, 32), draw(2, 2, 64, 2, 32), draw(2, 2, 64, 2, 32)
    decode_kernel.decode_triton(one, key, value, rows, *terms, None, 0.25)
    weights = draw(64, 48), draw(64, 48)
    decode_kernel.absorbed_decode_triton(one, draw(2, 2, 64, 48), *weights, rows, *terms, None, 0.25)

kernels, early, windows = set(), 0, 0
for one, tensors in launched:
    assert one._run.__qualname__ == "launcher.<locals>.launch", one._run
    ordinary = lambda: one._kernel[one._grid](*one._described(tensors), **one._options)
    expect([])
    sizes = parameters(ordinary())
    expect(sizes)
    written()
    ordinary()
    expected = written()
    assert len(expected) > sum(sizes)
    before = cuda.encoded_maps()
    one._run(*tensors)
    assert written() == expected
    first = cuda.encoded_maps() - before
    one._run(*tensors)
    assert written() == expected and cuda.encoded_maps() == before + first
    heard = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    one._run(*tensors)
    knobs.runtime.launch_enter_hook.remove(heard.append)
    assert written() == expected and len(heard) == 1
    kernels.add(one._kernel.fn.__name__)
    early, windows = early + one._options.get("launch_pdl", False), windows + (128 in sizes)
assert len(kernels) == 10 and early and windows == 6, (kernels, early, windows)
print("the same")
"""


@pytest.mark.slow
def test_the_driver_gets_the_same_to_the_byte(tmp_path):
    """By all of Triton's launcher, its native part too, from every kernel with windows or that begins early."""
    folder = str(without_gpu.driver_of_cuda(tmp_path))
    where = {"LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    without_gpu.run(NOTED + TO_THE_BYTE, tmp_path / "cache", without_gpu.NATIVE, **where)


FALLS_BACK = """
from retro_kernels.ops.cca import forward, launcher

def renamed(launcher, signature, meta, made=nvidia.wrap_handle_tensordesc):
    inner = made(launcher, signature, meta)
    return lambda *given: inner(*given)

def reordered(launcher, signature, meta, made=nvidia.wrap_handle_tensordesc):
    inner = made(launcher, signature, meta)
    def swapped(*given):
        launcher
        return inner(*given)
    return swapped

def draw(*shape):
    return torch.randn(shape).to(torch.bfloat16)

query, key, value = draw(1, 64, 2, 32), draw(4, 2, 64, 2, 32), draw(4, 2, 64, 2, 32)
for wrap in (renamed, reordered):
    nvidia.wrap_handle_tensordesc = wrap
    forward._cca_fwd_kernel.device_caches.clear()
    forward.launch.forget()
    for _ in range(2):
        calls = []
        forward.forward(query, key, value, None, None, None, None, None, None, 16, 15, 1, 0.25, 0.0)
        assert sum(isinstance(x, Map) for x in calls[-1]) == 4, calls
    (made,) = forward.launch._kept.values()
    assert made.launches[0]._run.__qualname__ != "launcher.<locals>.launch"
print("the same")
"""


def test_where_tritons_launcher_is_another_its_ordinary_way_stays(tmp_path):
    without_gpu.run(FALLS_BACK, tmp_path, without_gpu.LAUNCHER)


@pytest.mark.gpu
@pytest.mark.parametrize("tables", [("rel_bias",), TABLES])
def test_kept_passes_compute_the_same_on_the_gpu(seed, tables):
    """To the bit, for other values at other addresses, and where an address is less aligned than before."""
    from retro_kernels.ops.cca import forward

    def draw(*shape, offset=0):
        x = torch.randn(math.prod(shape) + offset, device="cuda").to(torch.bfloat16)
        return x[offset:].view(shape)

    shapes = {
        "rel_key": (4, 191, 64),
        "content_bias": (4, 64),
        "position_bias": (4, 64),
        "rel_bias": (4, 191),
    }
    terms = [draw(*shapes[name]) if name in tables else None for name in shapes]
    last = (None, None, 64, 63, 1, 0.125, 0.0)
    before = None
    for offset in (0, 0, 1, 0):
        query, key, value = (draw(*x, offset=offset) for x in ((2, 300, 4, 64), *[(8, 2, 128, 4, 64)] * 2))
        results = []
        for _ in range(2):
            launch.forget()
            for _ in range(2):
                out, lse = forward.forward(query, key, value, *terms, *last)
                given = (query, out, lse, query, key, value, *terms, *last)
                results.append((out, *backward.backward(*given)))
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert (x is None and y is None) or torch.equal(x, y)
        assert before is None or not torch.equal(before, results[0][0])
        before = results[0][0]
    assert launch._kept
    for made in launch._kept.values():
        for one in made.launches:  # with this Triton and this driver, too
            assert one._run.__qualname__ == "launcher.<locals>.launch", one._kernel
