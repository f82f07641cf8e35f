"""The floor of each shape: bytes over bandwidth or operations over rate, whichever is longer.

    python bench/roofline.py            # floors of this machine, with its own two ceilings measured now
    python bench/roofline.py --write    # results/predictions.json: floors and predicted times of an H200

Bytes count each input read once and each output written once; operations count matrix products (a multiply and an add
are two). Ceilings are measured in the same run as the times that are compared with them. They are what a copy and a
large product reached then, no bounds: what mostly reads can be faster than a copy, which writes as much, and on a
machine that others use the ceilings may have met a worse moment than the times did.

P attending chunks · M chunk size · K·R keys of a chunk · H heads · D head dimension · G = M + R − 1 · e bytes of an
element.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from dataclasses import asdict, dataclass

import timing
import torch
from cases import DEVICE, DTYPE, ON_GPU, TINY, Case, Pass, Shape, grid
from run import HERE, write

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Cost:
    """Bytes moved through memory and operations of matrix products."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""

    machine: str
    bandwidth: float
    matmul: float

    def floor(self, *kernels: Cost) -> float:
        """Seconds of kernels that run one after another, each as fast as its bytes or its operations let it."""
        return math.fsum(max(cost.bytes / self.bandwidth, cost.flops / self.matmul) for cost in kernels)


H200 = Ceilings("NVIDIA H200 (4.3 TB/s and 790 TFLOP/s as measured on other days)", 4.3e12, 790e12)


@functools.cache
def measured() -> Ceilings:
    """The two ceilings of this machine, for the benchmarks' dtype."""
    # a copy twice: the best of several buffers far beyond the caches
    length = 2**20 if TINY else 2**31 if ON_GPU else 2**27
    source = torch.randint(0, 256, (length,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = statistics.median(timing.samples([lambda: target.copy_(source)], 20 if ON_GPU else 9))
    name = torch.cuda.get_device_name() if ON_GPU else "CPU"
    return Ceilings(name, 2 * length / copy, matmul_rate())


def matmul_rate(dtype: torch.dtype = DTYPE) -> float:
    """FLOP/s of a large matrix product, by default in the benchmarks' dtype, on a CPU with the threads that are set."""
    n = 256 if TINY else 8192 if ON_GPU else 2048
    a, b, c = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(3))
    return 2 * n**3 / statistics.median(timing.samples([lambda: torch.mm(a, b, out=c)], 20 if ON_GPU else 9))


def attention(case: Case, which: Pass, e: int = 2) -> Cost:
    """The core: forward with its log-sum-exp; backward in one pass over keys and values; the position tables' part."""
    if which == "forward+backward":
        return attention(case, "forward", e) + attention(case, "backward", e)
    s = case.shape
    rows, keys, inner = s.blocks * s.chunk, s.blocks * s.keys, s.heads * s.head_dim
    logits = rows * s.keys * s.heads
    statistics_bytes = rows * s.heads * 4 + (s.blocks * s.neighbours * 4 if case.lengths else 0)
    # five products against two; q, out, its gradient and dq against q and out; k, v, dk and dv against k and v
    forward = which == "forward"
    moved = (2 * rows + 2 * keys) * inner * e if forward else (4 * rows + 4 * keys) * inner * e
    cost = Cost(moved + statistics_bytes, (4 if forward else 10) * logits * s.head_dim)
    learned = case.table_grad and not forward
    if case.positions == "bias":
        cost += Cost(s.heads * s.columns * 4 * (2 if learned else 1), 0)
    elif case.positions == "relative":
        # the logits by distance, and in the backward their gradient to the query and to rel_key
        table = s.heads * s.columns * s.head_dim * e
        products = 1 if forward else 3 if learned else 2
        cost += Cost(table * (2 if learned else 1), products * 2 * rows * s.columns * inner)
    return cost


def materialised_training(s: Shape, encoder_dim: int, which: Pass, e: int = 2) -> list[Cost]:
    """Keys and values projected from the encoder states, then the core: one cost a kernel, as they run in turn."""
    if which == "forward+backward":
        passes: tuple[Pass, ...] = ("forward", "backward")
        return [cost for one in passes for cost in materialised_training(s, encoder_dim, one, e)]
    keys, inner = s.blocks * s.keys, s.heads * s.head_dim
    projection = Cost((keys * encoder_dim + 2 * keys * inner) * e, 2 * keys * encoder_dim * 2 * inner)
    return [projection] * (1 if which == "forward" else 2) + [attention(Case(s, "bias"), which, e)]


def absorbed_training(s: Shape, encoder_dim: int, which: Pass, e: int = 2) -> list[Cost]:
    """Batched products around one softmax, W_K and W_V folded into query and output: one cost a kernel.

    Forward: q~ = q·W_K, logits = q~·E, weights, o~ = weights·E, out = o~·W_V. The backward keeps the weights.
    """
    if which == "forward+backward":
        passes: tuple[Pass, ...] = ("forward", "backward")
        return [cost for one in passes for cost in absorbed_training(s, encoder_dim, one, e)]
    rows = s.blocks * s.chunk * s.heads
    narrow, wide = rows * s.head_dim * e, rows * encoder_dim * e  # q or out; q~ or o~
    states, weights = s.blocks * s.keys * encoder_dim * e, rows * s.keys * e
    fold = Cost(narrow + wide, 2 * rows * s.head_dim * encoder_dim)
    product = Cost(
        wide + states + weights, 2 * rows * s.keys * encoder_dim
    )  # between q~ or o~, E, and the weights
    if which == "forward":
        return [fold, product, Cost(2 * weights, 0), product, fold]
    # each product has two gradients; the softmax reads weights and their gradient and writes that of the logits
    return [fold, fold, product, product, Cost(3 * weights, 0), product, product, fold, fold]


def decode(batch: int, heads: int, head_dim: int, keys: int, encoder_dim: int, e: int = 2) -> dict[str, Cost]:
    """One new token per sequence: attention to stored keys and values, or to the encoder states themselves."""
    inner = heads * head_dim
    return {
        "materialised": Cost(batch * (2 * keys * inner + 2 * inner) * e, batch * 4 * keys * inner),
        # the states once for all heads; W_K and W_V, folded into query and output, once for the whole batch
        "absorbed": Cost(
            (batch * (keys * encoder_dim + 2 * inner) + 2 * inner * encoder_dim) * e,
            batch * (4 * keys * heads * encoder_dim + 4 * inner * encoder_dim),
        ),
    }


def gather(ids: int, chunk: int = 64, element: int = 2, out_element: int = 8) -> Cost:
    """Token rows of a chunk and its continuation: read as stored, written as int64, with ids and lengths."""
    return Cost(ids * (2 * chunk * (element + out_element) + 8 + 4 + 2), 0)


# The share of the floor that the prototypes' static figures suggest (registers, spills, resident programs), low and
# high. Not measured; the run on a GPU is to refute it.
EXPECTED = {
    ("forward", 128): (0.80, 0.90),
    ("forward", 64): (0.75, 0.88),
    ("backward", 128): (0.70, 0.85),
    ("backward", 64): (0.60, 0.80),
}


ENCODER_DIM = 896
MODELS = (("172M", 16, 64), ("425M", 12, 128), ("1.5B", 16, 128), ("7.5B", 32, 128))  # heads and their size


def _rivals(group: str, floors: dict[str, float]) -> dict[str, object]:
    absorbed, materialised = floors["absorbed"], floors["materialised"]
    return {
        "predicted": True,
        "group": group,
        "floor_s": absorbed,
        "materialised_floor_s": materialised,
        "floor_ratio": round(materialised / absorbed, 3),
    }


def predictions() -> dict[str, object]:
    """Floors of an H200 for the benchmark's own shapes, and the time to expect if the expected share is reached."""
    rows: list[dict[str, object]] = []
    for s in grid(gpu=True, tiny=False):
        for positions in ("bias", "relative"):
            case = Case(s, positions)
            for which in ("forward", "backward"):
                cost = attention(case, which)
                floor = H200.floor(cost)
                low, high = EXPECTED[which, s.head_dim]
                # short loops (two neighbours) sit at the lower end, long ones at the upper
                share = {2: low, 10: (low + high) / 2, 40: high}[s.neighbours]
                rows.append(
                    {
                        "predicted": True,
                        "group": f"cca {which}: {case}",
                        **case.fields(),
                        "pass": which,
                        "bytes": cost.bytes,
                        "flops": cost.flops,
                        "floor_s": floor,
                        "predicted_share": round(share, 3),
                        "predicted_s": floor / share,
                    }
                )
        floors = {
            "absorbed": H200.floor(*absorbed_training(s, ENCODER_DIM, "forward+backward")),
            "materialised": H200.floor(*materialised_training(s, ENCODER_DIM, "forward+backward")),
        }
        rows.append(
            _rivals(f"absorbed training: {s}", floors) | {**Case(s).fields(), "pass": "forward+backward"}
        )
    for name, heads, head_dim in MODELS:
        for neighbours in (2, 10, 40):
            costs = decode(64, heads, head_dim, neighbours * 128, ENCODER_DIM)
            floors = {way: H200.floor(cost) for way, cost in costs.items()}
            rows.append(
                _rivals(f"decode, batch 64: {name} K{neighbours}", floors) | {"model": name, "K": neighbours}
            )
    rows.append(
        {
            "predicted": True,
            "group": "gather of 327,680 ids on the GPU",
            "floor_s": H200.floor(gather(327_680)),
            "predicted_s": H200.floor(gather(327_680)) / 0.8,
            "predicted_share": 0.8,
        }
    )
    return {
        "note": "Predictions for an H200: nothing here was measured on a GPU. floor_s is arithmetic; predicted_share "
        "is what the static figures (registers, spills, resident programs) lead one to expect. floor_ratio is that of "
        "two floors, both reached: real products fall short of the rate, and the ratio with them.",
        "ceilings": asdict(H200),
        "predictions": rows,
    }


def print_floors(ceilings: Ceilings, gpu: bool, e: int) -> None:
    copy, matmul = ceilings.bandwidth / 1e9, ceilings.matmul / 1e12
    print(f"{ceilings.machine}: copy {copy:,.0f} GB/s, matrix product {matmul:,.2f} TFLOP/s")
    print("| case | pass | GB | GFLOP | FLOP/byte | floor | bound by |")
    print("|---|---|---:|---:|---:|---:|---|")
    for s in grid(gpu=gpu, tiny=False):
        for positions in ("bias", "relative"):
            for which in ("forward", "backward"):
                cost = attention(Case(s, positions), which, e)
                bound = (
                    "memory"
                    if cost.bytes / ceilings.bandwidth > cost.flops / ceilings.matmul
                    else "arithmetic"
                )
                print(
                    f"| {Case(s, positions)} | {which} | {cost.bytes / 1e9:.3f} | {cost.flops / 1e9:.1f} | "
                    f"{cost.flops / cost.bytes:.0f} | {ceilings.floor(cost) * 1e6:,.0f} µs | {bound} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write results/predictions.json (an H200's)")
    args = parser.parse_args()
    if not args.write:
        print_floors(measured(), ON_GPU, 2 if ON_GPU else 4)
        return
    write(RESULTS / "predictions.json", predictions())
    print_floors(H200, True, 2)


if __name__ == "__main__":
    main()
