"""The processes that share one job: those that torchrun started, or that a caller's own process group has.

    torchrun --standalone --nproc-per-node 4 -m retro_kernels train …

What a process does alone may fail there alone. Before the processes meet again each says whether it did: all of them
raise then, where the others would wait for it for ever (`together`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import FailedElsewhere, InputError, InputFailedElsewhere, processes
from .ops._backend import pick_device

PATIENCE = timedelta(days=7)
"""How long the others wait while one does what is done once: text that is tokenised takes hours. torchrun ends all of
them where one dies."""

_calls = itertools.count()


@contextlib.contextmanager
def together(group: Any, device: torch.device, name: str) -> Iterator[None]:
    """What each process does on its own. Collective at the end: where it raised on one, that one raises what it was,
    and the others the same in words, with the number of the first process where it did. An interrupt is an interrupt
    everywhere.

    device: where the tensors of the group's collectives lie. name: begins the others' message."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:  # also KeyboardInterrupt: this process may live on, waited for
        error = raised
    told: list[Any] = []
    try:
        failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
        if failed.item():
            told = [None] * dist.get_world_size(group)
            mine = None if error is None else (_kind(error), f"{type(error).__name__}: {error}")
            dist.all_gather_object(told, mine, group=group)
    except RuntimeError:  # another is gone
        if error is None:
            raise
    if error is not None:
        raise error
    for rank, (kind, message) in ((i, one) for i, one in enumerate(told) if one is not None):
        if kind == "interrupt":
            raise KeyboardInterrupt(f"{name}: rank {rank} was interrupted.")
        elsewhere = InputFailedElsewhere if kind == "input" else FailedElsewhere
        raise elsewhere(f"{name}: rank {rank} failed: {message}")


def _kind(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupt"
    return "input" if isinstance(error, ValueError) else "other"


class Ranks:
    """This process among `world` of them. Every method is collective, and nothing where there is one."""

    def __init__(self, group: Any = None) -> None:
        """group: of all processes, for tensors on the CPU; None: this process is alone."""
        self._group = group
        self.rank, self.world = (
            (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        )

    @property
    def first(self) -> bool:
        """Whether it is this process that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """See `pick_device`; of several processes each has a GPU of its own, which becomes torch's current one: that of
        its place on its machine, or the only one that it sees, as where a scheduler gives each process one."""
        with self.together("device"):
            device = self._own_device(name)
        if self.world > 1:
            self._check_apart(device)
        return device

    def _own_device(self, name: str) -> torch.device:
        device = pick_device(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(
                f"device is {name!r}, but there are {self.world} processes, each with a GPU of its own. Give cuda, or "
                "leave it out."
            )
        place = 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", self.rank))
        device = pick_device(f"cuda:{place}")
        torch.cuda.set_device(device)
        return device

    def _check_apart(self, device: torch.device) -> None:
        own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        ranks: dict[str, int] = {}
        for rank, gpu in enumerate(self.gathered(own)):
            if gpu is not None and ranks.setdefault(gpu, rank) != rank:
                kind = InputError if self.first else InputFailedElsewhere
                raise kind(
                    f"device: ranks {ranks[gpu]} and {rank} have the same GPU. Start as many processes on a machine as "
                    "it has GPUs (--nproc-per-node), and let each see its own or all of them (CUDA_VISIBLE_DEVICES)."
                )

    def together(self, name: str) -> contextlib.AbstractContextManager[None]:
        """See the function of this name."""
        if self.world == 1:
            return contextlib.nullcontext()
        return together(self._group, torch.device("cpu"), name)

    def any(self, flag: bool) -> bool:
        return flag if self.world == 1 else self.sum(torch.tensor(float(flag))).item() > 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, on the CPU."""
        values = values.detach().cpu()
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, group=self._group)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def told(self, value: Any) -> Any:
        """The first process's value."""
        return self.gathered(value if self.first else None)[0]

    def agree(self, name: str, values: dict[str, Any], advice: str) -> None:
        """InputError, which ends with `advice`, where one process's values are not the first's; in the others too."""
        everyone = self.gathered(values)
        for rank, theirs in enumerate(everyone):
            for key, value in everyone[0].items():
                if theirs[key] != value:
                    kind = InputError if self.first else InputFailedElsewhere
                    raise kind(
                        f"{name}: {key} is {value!r} in the first process and {theirs[key]!r} in that of rank {rank}. "
                        f"{advice}"
                    )


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those of torchrun or of the process group that there is already, which stays; alone, where
    there is neither."""
    own = dist.is_available() and not dist.is_initialized()
    if not dist.is_available() or (own and processes() == 1):
        yield Ranks()
        return
    if own:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # a second group of the same name would find addresses of the first, which torchrun's store keeps
        store = dist.PrefixStore(f"retro_kernels/{next(_calls)}", _store())
        rank, world = int(os.environ["RANK"]), processes()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(group if dist.get_world_size() > 1 else None)
    except BaseException:
        own = own and not torch.cuda.is_available()  # NCCL might wait for the others, who wait for this one
        raise
    finally:
        if own:
            dist.destroy_process_group()


@lru_cache
def _store() -> Any:
    """Where the processes of torchrun find one another, as long as they live."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return store
