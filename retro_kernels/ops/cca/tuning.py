"""Block sizes of the attention kernels on one GPU: those that were tuned there, smaller ones where they do not fit its
shared memory, else the table of `tiles.py`.

    python -m retro_kernels.ops.cca.tuning --head-dim 64 128 --dtype bfloat16

times the candidates on the GPU at hand and keeps the best in a file, which later processes read. Nothing is tuned
without being asked for: a first call compiles one kernel.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from retro_kernels.config import staged
from retro_kernels.ops.cca import launch, tiles
from retro_kernels.ops.cca.launch import Sizes
from retro_kernels.ops.cca.tiles import Config

FORMAT = 2
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Problem(NamedTuple):
    """What block sizes depend on."""

    direction: str
    """forward or backward"""
    arch: int
    padded_dim: int
    dtype: torch.dtype
    rows: int
    tables: str
    """"relative": with relative keys; "sums": backward, with the gradient of an additive bias; "plain": neither."""

    @property
    def name(self) -> str:
        return f"{self.direction}-sm_{self.arch}-{self.padded_dim}-{str(self.dtype)[6:]}-{self.rows}-{self.tables}"


_fitted: dict[Problem, Config] = {}


def block_sizes(problem: Problem) -> Config:
    """Raises ValueError where the file of tuned block sizes is damaged."""
    return _fitted.get(problem) or _tuned(tuned_file()).get(problem.name) or _table(problem)


def _table(problem: Problem) -> Config:
    choose = tiles.forward_config if problem.direction == "forward" else tiles.backward_config
    return choose(*problem[1:])


def smaller(problem: Problem, config: Config, error: OutOfResources) -> Config:
    """The next block sizes to try, since `config` does not fit this GPU; later calls begin there.

    Raises RuntimeError where nothing smaller is left.
    """
    if config.stages > 1:
        found = config._replace(stages=config.stages - 1)
    elif problem.direction == "backward" and config.panels == 1 and problem.padded_dim >= 64:
        found = config._replace(panels=2)
    elif config.keys > 16:
        found = config._replace(keys=config.keys // 2)
    else:
        raise RuntimeError(
            f"chunked_cross_attention: the {problem.direction} kernel for heads {problem.padded_dim} wide in "
            f"{str(problem.dtype)[6:]} {lacks(error)}. Use narrower heads, bfloat16 or float16, or "
            'backend="reference".'
        ) from error
    _fitted[problem] = found
    return found


def lacks(error: OutOfResources) -> str:
    """Of a kernel that does not run in its smallest blocks."""
    if isinstance(error, launch.NotCompiled):
        return str(error)
    return (
        f"needs {error.required:,} of {error.name} in its smallest blocks, and this GPU has {error.limit:,}"
    )


def fitting(problem: Problem, config: Config | None, attempt: Callable[[Config], Any]) -> Any:
    """`attempt(config)`; where no `config` is given, with the block sizes chosen here, or with those that fit."""
    if config is not None:
        return attempt(config)
    return until_it_fits(block_sizes(problem), attempt, functools.partial(smaller, problem))


def until_it_fits(
    sizes: Sizes, attempt: Callable[[Sizes], Any], smaller: Callable[[Sizes, OutOfResources], Sizes]
) -> Any:
    """`attempt` with `sizes`, or with what `smaller` makes of them for as long as they do not fit the GPU."""
    while True:
        try:
            return attempt(sizes)
        except OutOfResources as error:
            sizes = smaller(sizes, error)


def tuned_file() -> Path:
    """RETRO_KERNELS_TUNED, or a file in the user's cache folder."""
    return _file(os.environ.get("RETRO_KERNELS_TUNED"), os.environ.get("XDG_CACHE_HOME"))


@functools.lru_cache  # every launch asks, and putting a path together takes longer than the rest
def _file(given: str | None, cache: str | None) -> Path:
    return (
        Path(given) if given else Path(cache or Path.home() / ".cache") / "retro_kernels" / "block_sizes.json"
    )


@functools.lru_cache
def _tuned(path: Path) -> dict[str, Config]:
    """What the file holds, {} where there is none; one of another Triton is left alone, with a warning."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}, which holds tuned block sizes, cannot be read ({error}). Delete it, or tune again."
        ) from None
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        found = {name: Config(*sizes) for name, sizes in values["block_sizes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold tuned block sizes of format {FORMAT} ({error}). Delete it, or tune again."
        ) from None
    if values.get("triton") != triton.__version__:
        warnings.warn(
            f"{path} was tuned with Triton {values.get('triton')}, here is {triton.__version__}: it is not used. "
            "Tune again, or delete it.",
            stacklevel=2,
        )
        return {}
    return found


def save(block_sizes: dict[str, Config], gpu: str, path: Path | None = None) -> Path:
    """Adds to the file; it appears whole."""
    path = path or tuned_file()
    try:
        kept = json.loads(path.read_text())
        kept = kept["block_sizes"] if kept.get("triton") == triton.__version__ else {}
    except (OSError, ValueError, KeyError, AttributeError):
        kept = {}
    values = {"format": FORMAT, "triton": triton.__version__, "gpu": gpu, "block_sizes": kept | block_sizes}
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
    _tuned.cache_clear()
    _fitted.clear()  # of the sizes before
    launch.forget()
    return path


def candidates(direction: str, padded_dim: int) -> Iterator[Config]:
    """Block sizes that are worth a try."""
    for keys, warps, stages in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if direction == "forward":
            yield Config(keys, warps, stages)
            if warps == 4 and keys >= 32:
                yield Config(keys, warps, stages, narrow=True)
            continue
        for panels, first in itertools.product((1, 2) if padded_dim >= 64 else (1,), (False, True)):
            yield Config(keys, warps, stages, panels, first)


def tune(
    head_dim: int,
    dtype: torch.dtype,
    *,
    relative: bool = True,
    num_heads: int = 16,
    chunk_size: int = 64,
    neighbour_len: int = 128,
    num_neighbours: int = 2,
    chunks: int = 256,
    device: str = "cuda",
    clock: Callable[[Callable[[], Any]], float] | None = None,
    tell: Callable[[str], object] = print,
    path: Path | None = None,
) -> dict[str, Config]:
    """Times every candidate, forward and backward, and saves the fastest of those whose results are right.

    Of each direction the table's own choice is the yardstick: a candidate counts only if its results differ from that
    one's by no more than rounding, which leaves out what a compiler got wrong. `relative`: with relative keys and both
    biases; else with an additive bias. `chunks`: attending chunks in all. `clock`: milliseconds of a call
    (`triton.testing.do_bench`).

    Returns the block sizes by problem. Raises RuntimeError without a CUDA device, ValueError for one that is not the
    current one.
    """
    from retro_kernels.ops.cca import backward, forward

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError("tuning: it needs a CUDA device, and there is none here.")
    if on_gpu and (index := torch.device(device).index) not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"tuning: device is {device!r}, but kernels are timed on the current one, cuda:"
            f"{torch.cuda.current_device()}. Call it within `with torch.cuda.device({index}):`."
        )
    clock = clock or triton.testing.do_bench
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    columns = chunk_size + neighbour_len - 1
    query = draw(1, chunks * chunk_size + chunk_size - 1, num_heads, head_dim)
    key, value = (draw(chunks, num_neighbours, neighbour_len, num_heads, head_dim) for _ in "kv")
    terms = [draw(num_heads, columns, head_dim), *(draw(num_heads, head_dim) for _ in "uv"), None]
    terms = terms if relative else [None, None, None, draw(num_heads, columns)]
    last = (None, None, chunk_size, chunk_size - 1, 1, head_dim**-0.5, 0.0)
    arguments = (query, key, value, *terms, *last)
    arch = tiles.architecture(query.device)
    problems: dict[str, Problem] = {}
    for direction, tables in (("forward", "plain"), ("backward", "sums")):
        g = tiles.geometry(query, key, chunk_size, 1, direction == "backward")
        tables = "relative" if relative else tables
        problems[direction] = Problem(direction, arch, g.padded_dim, dtype, g.rows, tables)

    def by_table(direction: str, call: Callable[..., Any]) -> Any:
        # not by what was tuned before: it may be wrong, or its file damaged
        problem = problems[direction]
        shrink = functools.partial(smaller, problem)
        return until_it_fits(_table(problem), lambda config: call(config=config), shrink)

    out, lse = by_table("forward", functools.partial(forward.forward, *arguments))
    grad = draw(*query.shape)
    back: Any = backward.backward
    calls: dict[str, Callable[..., tuple[Tensor | None, ...]]] = {
        "forward": lambda **more: forward.forward(*arguments, **more)[:1],
        "backward": lambda **more: back(grad, out, lse, *arguments, (True,) * 4, **more),
    }
    best: dict[str, Config] = {}
    for direction, call in calls.items():
        problem = problems[direction]
        expected, own = by_table(direction, call), _table(problem)
        times: dict[Config, float] = {}
        for config in dict.fromkeys((own, *candidates(direction, problem.padded_dim))):
            try:
                right = _close(call(config=config), expected)
                if right:
                    times[config] = clock(functools.partial(call, config=config))
            except Exception as error:  # what does not compile or fit is not a candidate, whatever it raises
                tell(f"{problem.name} {tuple(config)}: {type(error).__name__}")
                continue
            tell(f"{problem.name} {tuple(config)}: {f'{times[config]:.4f} ms' if right else 'wrong results'}")
        if not times:
            raise RuntimeError(f"tuning: no candidate of {problem.name} gave right results.")
        best[problem.name] = min(times, key=lambda config: times[config])
        tell(f"{problem.name}: {tuple(best[problem.name])}, the table has {tuple(own)}")
    gpu = torch.cuda.get_device_name() if on_gpu else device
    tell(f"saved in {save(best, gpu, path)}")
    return best


def _close(found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> bool:
    """Within a hundred roundings of the mean of the values: other block sizes add in another order."""
    for x, y in zip(found, expected, strict=True):
        if x is not None and y is not None:
            allowed = 100 * torch.finfo(y.dtype).eps * y.float().pow(2).mean().sqrt()
            if not (x.float() - y.float()).pow(2).mean().sqrt() <= allowed:
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Tune block sizes on the GPU at hand; keep the best in a file."
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=_DTYPES, nargs="+", default=["bfloat16"])
    args = parser.parse_args()
    try:
        for head_dim, dtype, relative in itertools.product(args.head_dim, args.dtype, (True, False)):
            tune(head_dim, _DTYPES[dtype], relative=relative)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
