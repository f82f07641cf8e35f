"""Compile every Triton kernel as the library launches it, for GPUs that need not be here, and guard the machine code.

The library's own launch functions run on meta tensors for the GPUs of data centres, sm_80, sm_90 and sm_100, and for
two of workstations, sm_89 and sm_120; their launches are recorded instead of run, so block sizes, warps, stages and
the attributes of the arguments (a pointer or stride divisible by 16) are those of a real launch, whatever `tiles.py`
and its likes choose. Each kernel is then compiled, and its machine code read with the `cuobjdump` that comes with
Triton.

What is guarded, and what it has caught or would catch:

- instructions: more than 300, or a stub (Triton once compiled a kernel for sm_100 to a trap of 16 instructions, without
  an error), except kernels that only copy, merge or make one product; and within 15 % of the committed number.
- matrix instructions in the hot loop: warpgroup ones on sm_90 where they are committed, never none.
- spills in the innermost loop with matrix products (else of memory): none forward, at most 8 backward. With one key
  set Triton drops the loop over the sets: a kernel whose matrix products are in no loop counts as a whole.
- stack: none forward, at most 128 bytes backward: what is spilled, wherever.
- loads: tiles of keys, values and their gradients go by TMA, at least two each in the hot loop, as many as committed;
  besides, and without TMA, one load there is narrower than 128 bits, that of a length. More: alignment was lost.
- overwritten operands: none. ptxas 12.8 gives registers of a warpgroup product's operand that stays the same through a
  loop to other values of the loop as well, so from the second round on the product is made of those.
- atomics: none, since they would make results depend on the order of the programs. Bitwise ones in shared memory, by
  which tensor memory is claimed on sm_100, have no order and do not count.
- registers x threads x wanted programs: within the 65,536 of a multiprocessor; shared memory: within a program's limit,
  and that of the wanted programs together within the multiprocessor's.
- processor time of the compiler: at most 10 s.

What is known to miss a guard stands in the committed file under `known`, with the figure and the reason; it may be no
worse than that, and has to miss it still, so a repair shows up as well. Committed numbers hold for one version of
Triton; with another the absolute guards remain, and what is known is excused whatever its figure.

python bench/static.py [--only PART]     a table (with --all of more types and widths)
python bench/static.py --write           bench/results/static.json, of all
python bench/static.py --check [--all]   compare with it; exit status 1 if a guard fails
python bench/static.py --random COUNT    so many calls in any shape: none may be a trap, have operands overwritten or
                                         atomics, or take more shared memory than a GPU has
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "static.json"
ARCHITECTURES = (80, 90, 100)
SMALL = (89, 120)
"""Of less shared memory: a few of their kernels are compiled each time, most with --all."""
LIMITS = {
    "compile_s": 10.0,
    "instructions": 300,
    "tolerance": 0.15,
    "registers": 65536,
    "stack": 128,
    "tiles": 2,
    "narrow": 1,
}
# bytes of shared memory: of one program, and of a multiprocessor (CUDA C++ programming guide, compute capabilities)
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
SHARED |= dict.fromkeys(SMALL, (99 * 1024, 100 * 1024))
# A100, RTX 4090, H200, B200, RTX 5090: decoding splits its keys by them
MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
MATRIX = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "IMMA")
TMA = ("UTMALDG", "UTMASTG")
MAIN = ("_cca_fwd_kernel", "_cca_bwd_kernel")
WIDEST = {"bf16": 2048, "fp16": 2048, "fp32": 128}
"""States that a kernel takes; 1,024 where shared memory is small."""
ATOMIC = re.compile(r"(ATOM|ATOMG|RED|REDG|UTMAREDG|SUATOM|SURED)(\.|$)|ATOMS(?!\.(AND|OR|XOR))")


class Variant(NamedTuple):
    """One call of the library."""

    arch: int
    part: str
    head_dim: int
    """The states' width, where `part` is about states; tokens of a chunk in a gather."""
    dtype: str
    mode: str
    """Positions: none, bias, biasgrad (with its gradient), relative; encoder: relative, blocks of 128 rows; single:
    relative, of one neighbour, over which Triton makes no loop; narrow: relative, by the kernel of few registers, which
    the library launches only where it was tuned to. About states: softmax; decode (of 8 sequences, each cut into many
    parts), decode-many (of 64, cut into few). Of a gather: tokens, embeddings."""

    @property
    def name(self) -> str:
        return f"sm_{self.arch}/{self.part}-{self.mode}-{self.head_dim}-{self.dtype}"


def variants(every: bool = False) -> list[Variant]:
    """All architectures in bf16, other types and widths on sm_90; `every`: the rest too, as the committed file has."""
    found = []
    for arch in ARCHITECTURES:
        for dim in (64, 128):
            found += [Variant(arch, "forward", dim, "bf16", mode) for mode in ("none", "bias", "relative")]
            found += [
                Variant(arch, "backward", dim, "bf16", mode) for mode in ("none", "biasgrad", "relative")
            ]
    for arch in SMALL:
        for dim in (64, 128):
            found += [Variant(arch, part, dim, "bf16", "relative") for part in ("forward", "backward")]
    for dtype in ("fp16", "fp32"):
        found += [Variant(90, part, 64, dtype, "relative") for part in ("forward", "backward")]
    found += [
        Variant(90, "forward", 256, "bf16", "relative"),
        Variant(90, "decode", 64, "bf16", "relative"),
        Variant(90, "absorbed", 64, "bf16", "softmax"),
        Variant(90, "absorbed", 896, "bf16", "decode"),
        Variant(90, "absorbed", 896, "bf16", "decode-many"),
        Variant(90, "gather", 64, "uint16", "tokens"),
        Variant(90, "gather", 64, "uint16", "embeddings"),
    ]
    if every:
        found += [v for v in dict.fromkeys(_further()) if v not in found]
    return found


def _further() -> list[Variant]:
    found = [Variant(90, "forward", 64, "bf16", "narrow")]
    for arch in (*ARCHITECTURES, *SMALL):
        dtypes = ("bf16", "fp16") if arch in ARCHITECTURES else ("bf16",)
        for dim in (64, 128):
            for dtype in dtypes:
                found += [Variant(arch, "forward", dim, dtype, m) for m in ("none", "bias", "relative")]
                found += [
                    Variant(arch, "backward", dim, dtype, m) for m in ("none", "bias", "biasgrad", "relative")
                ]
            found += [Variant(arch, "decode", dim, dtype, "relative") for dtype in (*dtypes, "fp32")]
        for part in ("forward", "backward"):
            found += [Variant(arch, part, dim, "bf16", "relative") for dim in (16, 32, 256)]
            found += [Variant(arch, part, dim, "bf16", "encoder") for dim in (64, 128, 256)]
            found += [Variant(arch, part, dim, "bf16", "single") for dim in (64, 256)]
            # backward, heads of 256 in fp32 do not fit the shared memory of all
            found += [
                Variant(arch, part, dim, "fp32", "relative")
                for dim in (32, 64, 128, 256)
                if dim < 256 or part == "forward" or arch in ARCHITECTURES
            ]
        found += [Variant(arch, "decode", dim, "bf16", "relative") for dim in (32, 256)]
        found += [Variant(arch, "absorbed", 64, dtype, "softmax") for dtype in (*dtypes, "fp32")]
        widest = 2048 if arch in ARCHITECTURES else 1024
        found += [Variant(arch, "absorbed", width, "bf16", "decode") for width in (256, 896, widest)]
        found += [
            Variant(arch, "absorbed", 896, "bf16", "decode-many"),
            Variant(arch, "absorbed", 128, "fp32", "decode"),
            Variant(arch, "absorbed", 128, "fp32", "decode-many"),
        ]
        if arch in SMALL:
            continue
        found.append(Variant(arch, "absorbed", 896, "fp16", "decode"))
        found += [
            Variant(arch, "gather", 64, dtype, mode)
            for dtype in ("uint16", "int32")
            for mode in ("tokens", "embeddings")
        ]
    return found


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def _recording(arch: int) -> Iterator[list[Launch]]:
    """Launches of Triton kernels in this block are kept, not run; the library believes to be on `arch`."""
    from triton.runtime.jit import JITFunction

    from retro_kernels.ops._backend import family
    from retro_kernels.ops.cca import decode_kernel, tiles

    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not warmup:  # which only compiles
            launches.append(Launch(self, args, options))

    saved = JITFunction.run, tiles.architecture, decode_kernel.slots
    JITFunction.run = record
    tiles.architecture = lambda device: family(*divmod(arch, 10))
    decode_kernel.slots = lambda device, resident: resident * MULTIPROCESSORS[arch]
    try:
        yield launches
    finally:
        JITFunction.run, tiles.architecture, decode_kernel.slots = saved


class Shape(NamedTuple):
    """Of one call; as it stands, RETRO's."""

    batch: int = 8
    chunks: int = 32
    tokens: int = 1
    """At a time, of a sequence that is decoded."""
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    """Where the variant's is the width of states."""
    chunk: int = 64
    neighbours: int = 2
    neighbour_len: int = 128
    dropout: bool = False
    left_out: frozenset[str] = frozenset()
    """Of the optional arguments that the variant has: content_bias, position_bias, lengths."""


RETRO = Shape()
ONES = Shape(1, 1, 1, 1, 1, 128, 1, 1, 16)
"""What can be 1 is, which Triton compiles into the code as a constant of Python."""


def launches(variant: Variant, shape: Shape = RETRO) -> list[Launch]:
    """What a call of the library launches."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtypes |= {"uint16": torch.uint16, "int32": torch.int32}
    dtype, dim, mode = dtypes[variant.dtype], variant.head_dim, variant.mode

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def optional(name: str, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return None if name in left_out else empty(*shape, dtype=dtype)

    fp32, int32, int64 = torch.float32, torch.int32, torch.int64
    batch, chunks, T, H, kv_heads, D, M, K, R, dropout, left_out = shape
    K = 1 if mode == "single" else K
    dropout_p, seed = (0.1, empty(1, dtype=int64)) if dropout else (0.0, None)
    with _recording(variant.arch) as found:
        if variant.part in ("forward", "backward"):
            from retro_kernels.ops.cca import backward, forward, tiles

            if mode == "encoder":  # the neighbours' rows attend to the chunk that found them
                block, keys, shift, repeat = R, M, 0, K
                query = empty(batch * chunks * K, R, H, dim)
                key = empty(batch * chunks, 1, M, kv_heads, dim)
                lengths = None
            else:
                block, keys, shift, repeat = M, R, M - 1, 1
                query = empty(batch, chunks * M, H, dim)
                key = empty(batch * chunks, K, R, kv_heads, dim)
                lengths = optional("lengths", batch * chunks, K, dtype=int32)
            relative = mode in ("relative", "encoder", "single", "narrow")
            columns = block + keys - 1
            terms = (
                empty(H, columns, dim) if relative else None,
                optional("content_bias", H, dim) if relative else None,
                optional("position_bias", H, dim) if relative else None,
                empty(H, columns, dtype=fp32) if mode in ("bias", "biasgrad") else None,
                lengths,
                seed,
            )
            last = (block, shift, repeat, dim**-0.5, dropout_p)
            if variant.part == "forward":
                config = tiles.Config(64, 4, 2, narrow=True) if mode == "narrow" else None
                forward.forward(query, key, key, *terms, *last, config=config)
            else:
                blocks = key.shape[0] * repeat
                lse = empty(blocks, H, block, dtype=fp32)
                backward.backward(query, query, lse, query, key, key, *terms, *last, (mode != "bias",) * 4)
        elif variant.part == "decode" or (variant.part == "absorbed" and mode != "softmax"):
            from retro_kernels.ops.cca.decode_kernel import absorbed_decode_triton, decode_triton

            over_states = variant.part == "absorbed"
            batch *= 8 if mode == "decode-many" and shape != ONES else 1
            D = D if over_states else dim
            terms = (
                empty(batch, T, dtype=int32),
                empty(H, M + R - 1, D),
                optional("content_bias", H, D),
                optional("position_bias", H, D),
                None,
                optional("lengths", batch, K, dtype=int32),
                D**-0.5,
            )
            if over_states:
                weight = empty(kv_heads * D, dim)
                absorbed_decode_triton(empty(batch, T, H, D), empty(batch, K, R, dim), weight, weight, *terms)
            else:
                key = empty(batch, K, R, kv_heads, D)
                decode_triton(empty(batch, T, H, D), key, key, *terms)
        elif variant.part == "absorbed":
            from retro_kernels.ops.cca.absorbed_softmax import softmax_backward_triton, softmax_triton

            blocks, rows = batch * chunks, M * H
            logits, rel = empty(blocks, rows, K * R), empty(blocks, rows, M + R)
            lengths = optional("lengths", blocks, K, dtype=int32)
            sizes = {"first": 0, "block": M, "neighbour_len": R, "dropout_p": dropout_p}
            softmax_triton(logits, rel, None, lengths, seed, heads=H, **sizes)
            softmax_backward_triton(logits, logits, rel, seed, heads=H, **sizes)
        else:
            from retro_kernels.ops.gather.kernel import gather_embeddings_triton, gather_triton

            store, ids = empty(1_000_000, dim), empty(batch, chunks, K, dtype=int64)
            continuation = empty(1_000_000, dtype=torch.bool)
            if mode == "tokens":
                gather_triton(store, ids, continuation, 0, int64)
            else:
                gather_embeddings_triton(
                    store, ids, continuation, empty(32_000, 896, dtype=torch.bfloat16), 0
                )
    return found


def drawn(rng: random.Random) -> tuple[Variant, Shape]:
    """A call that the library takes, in whatever shape: compilers do to one what they do not to another."""
    arch = rng.choice((*ARCHITECTURES, *SMALL))
    part = rng.choice(("forward", "backward", "backward", "decode", "absorbed"))
    dtype = rng.choice(tuple(WIDEST))
    mode = rng.choice(("none", "bias", "biasgrad", "relative", "relative", "encoder"))
    dim = rng.choice((16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256))
    if part in ("forward", "backward"):
        dim = min(dim, 128) if dtype == "fp32" and arch in SMALL else dim
    elif part == "decode":
        mode = "relative"
    else:
        mode = rng.choice(("decode", "decode", "decode-many", "softmax"))
        widest = min(WIDEST[dtype], 1024) if arch in SMALL else WIDEST[dtype]
        dim = rng.choice([x for x in (64, 128, 256, 512, 640, 896, 1024, 1280, 2048) if x <= widest])
    heads = rng.choice((4, 12, 16, 32))
    shape = Shape(
        batch=rng.choice((1, 2, 8)),
        tokens=rng.choice((1, 1, 3, 17)),
        heads=heads,
        kv_heads=rng.choice((heads, heads, 4, 1)),
        head_dim=rng.choice((32, 64, 128, 256)),
        chunk=rng.choice((16, 32, 48, 64, 64, 96, 128)),
        neighbours=rng.choice((1, 1, 2, 5, 10)),
        neighbour_len=rng.choice((16, 32, 64, 96, 128, 128, 256)),
        dropout=rng.random() < 0.3,
        left_out=frozenset(x for x in ("content_bias", "position_bias", "lengths") if rng.random() < 0.4),
    )
    return Variant(arch, part, dim, dtype, mode), shape


def wrong(row: dict[str, Any]) -> list[str]:
    """What a kernel may be in no shape: other than its source, or too large for the GPU."""
    found = []
    if row["instructions"] <= 60:
        found.append(f"a trap: {row['instructions']} instructions")
    if row["overwritten"]:
        found.append(f"overwritten operands: of {row['overwritten']} products")
    if row["atomics"]:
        found.append(f"atomics: {row['atomics']}")
    if row["shared"] > SHARED[row["arch"]][0]:
        found.append(f"shared memory: {row['shared']} bytes, of {SHARED[row['arch']][0]}")
    return found


def wanted(kernel: str, arch: int, head_dim: int, warps: int, dtype: str) -> int:
    """Programs that have to be resident on a multiprocessor to keep its memory busy."""
    if kernel == "_cca_fwd_kernel" and dtype != "fp32" and warps == 4:
        return 4 if head_dim <= 64 and arch in (90, 100) else 2 if head_dim <= 128 else 1
    return 2 if warps <= 4 and dtype != "fp32" else 1


def _processor_time() -> float:
    """Of this process and of the assemblers it has waited for, in seconds."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in both)


def compile_launch(launch: Launch, arch: int) -> tuple[str, str, dict[str, Any]]:
    """SASS, resource usage, and what only the compiler knows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    start = _processor_time()
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__
    )
    seconds = _processor_time() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(cuobjdump()), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    more = {
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tma": any("tensordesc" in str(of) for of in signature.values()),
        "compile_s": seconds,
    }
    return sass, usage, more


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P(?:T|\d+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def _count(ops: list[str], *names: str) -> int:
    return sum(op.split(".")[0] in names for op in ops)


def _loops(lines: list[tuple[int, str, str]]) -> list[frozenset[int]]:
    """Natural loops of the control flow, each as the positions of its instructions.

    Not the span between a backward branch and its target: code that waits for a copy and rarely runs lies behind the
    kernel's end and branches back into its middle, without being a loop around all that lies in between.
    """
    at = {address: i for i, (address, _, _) in enumerate(lines)}
    after: list[list[int]] = []  # where each instruction may lead
    joins: dict[str, int] = {}  # convergence barrier → where its threads meet
    for i, (_, op, rest) in enumerate(lines):
        name, guarded = op.split(".")[0], bool(re.match(r"@|.*\bU?P\d", rest)) or op.startswith("BRA.")
        found = re.search(r"0x([0-9a-f]+)", rest)
        target = at.get(int(found[1], 16)) if found else None
        barrier = re.search(r"\bB\d+", rest)
        leads = [] if name in ("EXIT", "BRA", "RET", "BSYNC") and not guarded else [i + 1]
        if name in ("BRA", "CALL") and target is not None:
            leads.append(target)
        elif name == "BSSY" and barrier and target is not None:
            joins[barrier[0]] = target
        elif name == "BSYNC" and barrier:
            leads.append(joins.get(barrier[0], i + 1))
        after.append([x for x in leads if x < len(lines)])
    before: list[list[int]] = [[] for _ in lines]
    loops: dict[int, set[int]] = {}
    backward = []
    state = [0] * len(lines)  # 1: on the path from the entry, 2: left
    path = [(0, iter(after[0]))] if lines else []
    if path:
        state[0] = 1
    while path:
        node, rest_of = path[-1]
        for x in rest_of:
            before[x].append(node)
            if state[x] == 1:
                backward.append((node, x))
            elif state[x] == 0:
                state[x] = 1
                path.append((x, iter(after[x])))
                break
        else:
            state[node] = 2
            path.pop()
    for end, head in backward:
        body = loops.setdefault(head, {head})
        queue = [end]
        while queue:
            node = queue.pop()
            if node not in body:
                body.add(node)
                queue += before[node]
    return [frozenset(body) for body in loops.values()]


def _written(op: str, rest: str) -> set[int]:
    """Registers that an instruction writes: of its first operand, as wide as the name says."""
    name, text = op.split(".")[0], re.sub(r"^@!?U?P\w+\s+", "", rest.strip())
    if name in ("ST", "STS", "STG", "STL", "STSM", "RED", "BRA", "R2UR", "LDGSTS", "SYNCS"):
        return set()
    if wide := re.match(r"x(\d+)x\S*\s+", text):  # the rest of HGMMA.64x…
        text = text[wide.end() :]
    first = re.match(r"(?:!?U?P[T\d]\s*,\s*)*R(\d+)\b", text)
    if not first:
        return set()
    many = 4 if ".128" in op or name in ("LDSM", "HMMA") else 2 if ".64" in op or "WIDE" in op else 1
    if wide:
        many = int(wide[1]) // 2
    return set(range(int(first[1]), int(first[1]) + many))


def overwritten_operands(lines: list[tuple[int, str, str]]) -> int:
    """Warpgroup products in loops whose first operand, in registers, is written later in the loop but not before it."""
    found = set()
    for loop in _loops(lines):
        before: set[int] = set()
        written = set().union(*(_written(*lines[i][1:]) for i in loop))
        for i in sorted(loop):
            _, op, rest = lines[i]
            operand = re.match(r"\s*x\S+\s+R\d+, R(\d+), gdesc", rest) if op.startswith("HGMMA") else None
            if operand:
                registers = set(range(int(operand[1]), int(operand[1]) + 4))
                if (registers & written) - before:
                    found.add(i)
            before |= _written(op, rest)
    return len(found)


def _by_kind(ops: list[str], kinds: tuple[str, ...]) -> dict[str, int]:
    """How many there are of each of `kinds`, which are there."""
    return dict(sorted(Counter(x for x in (op.split(".")[0] for op in ops) if x in kinds).items()))


def _narrow(op: str) -> bool:
    return op.split(".")[0] in ("LDG", "LDGSTS") and ".128" not in op


def read_sass(sass: str, whole: bool = False) -> dict[str, Any]:
    """Counts in all and in the hot loop: the innermost loop with most matrix products, else with memory accesses.

    Spills of the hot loop are the most of any innermost loop with matrix products. `whole`: all of the kernel is hot.
    """
    lines = [(int(m[1], 16), m[3], (m[2] or "") + m[4]) for m in _INSTRUCTION.finditer(sass)]
    ops = [op for _, op, _ in lines]
    everywhere = frozenset(range(len(lines)))
    inner: list[frozenset[int]] = []
    for work in (MATRIX, ("LDG", "LDGSTS", "UTMALDG")):
        busy = {i for i in everywhere if ops[i].split(".")[0] in work}
        loops = [loop for loop in _loops(lines) if loop & busy]
        inner = [x for x in loops if not any(y < x for y in loops)]
        if work is MATRIX and busy and (whole or not inner):
            inner = [everywhere]
        if inner:
            break
    bodies = [[ops[i] for i in sorted(loop)] for loop in inner]
    hot = max(bodies, key=lambda body: _count(body, *work), default=[])
    return {
        "instructions": len(ops),
        "matrix": _by_kind(ops, MATRIX),
        "matrix_hot": _by_kind(hot, MATRIX),
        "tma_hot": _by_kind(hot, TMA),
        # of a kernel that is hot as a whole, most would be those of its beginning
        "narrow_hot": 0 if inner == [everywhere] else sum(map(_narrow, hot)),
        "spills": _count(ops, "LDL", "STL"),
        "spills_hot": max((_count(body, "LDL", "STL") for body in bodies), default=0),
        "overwritten": overwritten_operands(lines),
        "atomics": sum(bool(ATOMIC.match(op)) for op in ops),
    }


def figures(variant: Variant, shape: Shape = RETRO) -> dict[str, dict[str, Any]]:
    """Of every kernel that the variant launches."""
    found = {}
    calls = launches(variant, shape)
    first = {
        launch.kernel: launch for launch in reversed(calls)
    }  # of those for several slices, which are alike
    for launch in (launch for launch in calls if launch is first[launch.kernel]):
        sass, usage, more = compile_launch(launch, variant.arch)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        kernel = launch.kernel.fn.__name__
        found[f"{variant.name}:{kernel.strip('_').removesuffix('_kernel')}"] = {
            "kernel": kernel,
            "arch": variant.arch,
            "head_dim": variant.head_dim,
            "dtype": variant.dtype,
            "wanted": wanted(kernel, variant.arch, variant.head_dim, more["warps"], variant.dtype),
            "registers": registers,
            "stack": stack,
            **read_sass(sass, variant.mode in ("encoder", "single") and kernel in MAIN),
            **more,
            "compile_s": round(more["compile_s"], 1),
        }
    return found


def failed(row: dict[str, Any]) -> list[str]:
    """The absolute guards that a row of figures misses, each by its name and the figures."""
    kernel, missed = row["kernel"], []
    attends = kernel in (*MAIN, "_cca_bwd_rel_kernel") or ("decode" in kernel and "merge" not in kernel)
    one_product = "product" in kernel or "project" in kernel
    if attends and not one_product and row["instructions"] <= LIMITS["instructions"]:
        missed.append(f"stub: {row['instructions']} instructions")
    if attends and not row["matrix_hot"]:
        missed.append("matrix: none in the hot loop")
    if (
        row["arch"] == 90
        and kernel in MAIN
        and row["dtype"] in ("bf16", "fp16")
        and not row["matrix_hot"].get("HGMMA")
    ):
        missed.append("matrix: no HGMMA in the hot loop")
    allowed = 8 if "bwd" in kernel else 0
    if row["spills_hot"] > allowed:
        missed.append(f"spills: {row['spills_hot']} in the hot loop, allowed {allowed}")
    stack = LIMITS["stack"] if "bwd" in kernel else 0
    if row["stack"] > stack:
        missed.append(f"stack: {row['stack']} bytes, allowed {stack}")
    if kernel in MAIN:
        moves = TMA[: 2 if "bwd" in kernel else 1] if row["tma"] else ()
        missed += [
            f"TMA: {row['tma_hot'].get(x, 0)} {x} in the hot loop"
            for x in moves
            if row["tma_hot"].get(x, 0) < LIMITS["tiles"]
        ]
        if row["narrow_hot"] > LIMITS["narrow"]:
            missed.append(f"narrow loads: {row['narrow_hot']} in the hot loop, allowed {LIMITS['narrow']}")
    if row["overwritten"]:
        missed.append(f"overwritten operands: of {row['overwritten']} products")
    if row["atomics"]:
        missed.append(f"atomics: {row['atomics']}")
    threads = 32 * row["warps"]
    if -(-row["registers"] // 8) * 8 * threads * row["wanted"] > LIMITS["registers"]:
        missed.append(f"registers: {row['registers']} x {threads} threads x {row['wanted']} programs")
    one, all_together = SHARED[row["arch"]]
    if row["shared"] > one or (row["shared"] + 1024) * row["wanted"] > all_together:
        missed.append(f"shared memory: {row['shared']} bytes x {row['wanted']} programs")
    if row["compile_s"] > LIMITS["compile_s"]:
        missed.append(f"compiler: {row['compile_s']} s")
    return missed


def changed(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What differs from the committed figures of the same version of Triton."""
    found = []
    if abs(row["instructions"] - before["instructions"]) > LIMITS["tolerance"] * before["instructions"]:
        found.append(f"instructions: {row['instructions']}, committed {before['instructions']}")
    if row["matrix_hot"] != before["matrix_hot"]:
        found.append(f"matrix: {row['matrix_hot']} in the hot loop, committed {before['matrix_hot']}")
    if row["tma_hot"] != before["tma_hot"]:
        found.append(f"TMA: {row['tma_hot']} in the hot loop, committed {before['tma_hot']}")
    return found


MEASURE = {
    "spills": "spills_hot",
    "stack": "stack",
    "narrow loads": "narrow_hot",
    "registers": "registers",
    "shared memory": "shared",
    "compiler": "compile_s",
    "atomics": "atomics",
}
"""What of a row a guard is about; a guard that is not here (a stub, matrix products, overwritten
operands) has no excuse."""


def check(rows: dict[str, dict[str, Any]], committed: dict[str, Any], version: str) -> list[str]:
    """Every complaint: guards missed or changed, apart from what is known, which has to be missed still, no worse."""
    same, complaints = committed["triton"] == version, []
    for name, row in rows.items():
        known = committed["known"].get(name, {}).get("figures", {})
        missed = failed(row)
        kinds = {text.partition(":")[0] for text in missed}
        for text in missed:
            kind = text.partition(":")[0]
            if kind not in known:
                complaints.append(f"{name}: {text}")
            elif same and row[MEASURE[kind]] > known[kind]:
                complaints.append(f"{name}: {text}; known are {known[kind]}")
        if same and name not in committed["rows"]:
            complaints.append(f"{name}: not in the committed file")
        elif same:
            complaints += [f"{name}: {x}" for x in changed(row, committed["rows"][name])]
            complaints += [
                f"{name}: known to miss the guard of {kind}, but holds it now"
                for kind in known
                if kind not in kinds
            ]
    return complaints


def why_not() -> str | None:
    """Why kernels cannot be compiled here."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if "nvidia" not in triton.backends.backends:
        return "this triton has no compiler for NVIDIA GPUs"
    if not os.access(cuobjdump(), os.X_OK):
        return "this triton comes without cuobjdump"
    return None


def _compile_into(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def with_sizes_of_one(variant: Variant) -> list[str]:
    """A line for every kernel that compiles so."""
    found = launches(variant, ONES)
    for launch in found:
        compile_launch(launch, variant.arch)
    return [f"{variant.name}: {launch.kernel.__name__} compiles with sizes of 1" for launch in found]


def compile_all(work: Callable[[Any], Any], which: Sequence[Any], processes: int) -> Iterator[Any]:
    """What `work` finds of each, with an empty cache, so that the compiler's time is a cold one."""
    with (
        tempfile.TemporaryDirectory() as cache,
        multiprocessing.get_context("spawn").Pool(processes, _compile_into, (cache,)) as pool,
    ):
        yield from pool.imap(work, which)


def wrong_of_drawn(call: tuple[Variant, Shape]) -> list[tuple[str, str]]:
    """Every kernel of the call, and what is wrong with it."""
    variant, shape = call
    try:
        rows = figures(variant, shape)
    except Exception as error:  # whatever a compiler fails with
        return [(f"{variant.name}, {shape}", f"{type(error).__name__}: {error}")]
    return [(f"{name}, {shape}", "; ".join(wrong(row))) for name, row in rows.items()]


def save(rows: dict[str, dict[str, Any]], known: dict[str, Any], version: str) -> None:
    """Replaces the committed file in one step; a known entry whose figure is to be measured anew keeps its reason."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=True
    ).stdout.strip()
    date = datetime.date.today().isoformat()
    head = json.dumps({"triton": version, "date": date, "commit": commit, "known": known}, indent=1)
    # a line a kernel, so that a difference is a line too
    body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{head.removesuffix("}").rstrip()},\n "rows": {{\n{body}\n }}\n}}'
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(RESULTS)


def line(name: str, row: dict[str, Any]) -> str:
    matrix = " ".join(f"{n} {op}" for op, n in row["matrix_hot"].items()) or "-"
    return (
        f"{name:58s} {row['registers']:4d} {row['warps']:3d} {row['spills_hot']:5d}/{row['spills']:<5d} "
        f"{row['stack']:5d} {row['shared'] / 1024:6.1f} {row['instructions']:6d} {matrix:24s} "
        f"{row['atomics']:2d} {row['compile_s']:5.1f}  " + "; ".join(failed(row))
    ).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="more types and widths on every architecture")
    parser.add_argument("--only", action="append", default=[], help="variants whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--check", action="store_true", help=f"compare with {RESULTS.name}")
    parser.add_argument("--ones", action="store_true", help="only see that sizes of 1 compile")
    parser.add_argument("--random", type=int, metavar="COUNT", help="so many calls in shapes drawn at random")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: here it compiles
    reason = why_not()
    if reason:
        print(f"nothing compiled: {reason}")
        return 0 if args.check else 1
    every = variants(args.all or args.write)
    for part in args.only:  # a check of nothing holds every guard
        if not any(part in v.name for v in every):
            parser.error(f"--only: no variant's name contains {part!r}")
    which = [v for v in every if not args.only or any(x in v.name for x in args.only)]
    if args.ones:
        one_of_each = {(v.part, v.mode): v for v in variants() if v.arch == 90}
        for lines in compile_all(with_sizes_of_one, list(one_of_each.values()), args.processes):
            print("\n".join(lines), flush=True)
        return 0
    if args.random:
        seed = random.randrange(2**32) if args.seed is None else args.seed
        print(f"seed {seed}", flush=True)
        rng = random.Random(seed)
        calls = [drawn(rng) for _ in range(args.random)]
        fine = bad = 0
        for found in compile_all(wrong_of_drawn, calls, args.processes):
            for name, text in found:
                fine, bad = fine + (not text), bad + bool(text)
                if text:
                    print(f"{name}: {text}", flush=True)
        print(f"something is wrong with {bad} kernels, nothing with {fine}")
        return 1 if bad else 0
    header = f"{'kernel':58s}  reg war   hot/spills stack  KiB   instr matrix, hot loop        at  comp"
    print(header, flush=True)

    import triton

    committed = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    same = committed is not None and committed["triton"] == triton.__version__
    known = {} if committed is None else committed["known"]
    saved = dict(committed["rows"]) if same and args.only else {}

    rows: dict[str, dict[str, Any]] = {}
    for found in compile_all(figures, which, args.processes):
        for name, row in found.items():
            print(line(name, row), flush=True)
        rows |= found
        if args.write:
            save(saved | rows, known, triton.__version__)
    print(
        f"{len(rows)} kernels, {sum(r['compile_s'] for r in rows.values()):.0f} s of compiler, "
        f"triton {triton.__version__}"
    )
    if args.write:
        committed = json.loads(RESULTS.read_text())
    if not args.check:
        return 0
    if committed is None:
        print(f"{RESULTS} does not exist: python bench/static.py --write")
        return 1
    if committed["triton"] != triton.__version__:
        print(f"committed for triton {committed['triton']}: only the absolute guards are checked")
    complaints = check(rows, committed, triton.__version__)
    print("\n".join(complaints) or "every guard holds")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
