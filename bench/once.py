"""Run one case a few times and nothing else: what a profiler or a memory checker is put in front of.

ncu --clock-control none python bench/once.py --pass backward -D 128 -K 10
compute-sanitizer python bench/once.py --small
compute-sanitizer python bench/once.py --decode
"""

from __future__ import annotations

import argparse

import torch
from cases import DEVICE, DTYPE, Case, Shape, tensors

from retro_kernels.ops import absorbed_decode, chunked_cross_attention, chunked_cross_attention_decode

# batch, tokens, heads, neighbours, their tokens, width of the states: rows of one tile and of two, R less than a tile
# and no multiple of it, one part of every row, a few and many
DECODED = (
    (2, 1, 12, 2, 64, 512),
    (3, 2, 24, 2, 16, 896),
    (40, 1, 32, 2, 128, 896),
    (2, 1, 32, 5, 48, 768),
    (1, 3, 5, 20, 128, 1024),
    (70, 1, 32, 2, 128, 896),
)


def decode(batch: int, tokens: int, heads: int, neighbours: int, length: int, width: int) -> None:
    """A few new tokens of every sequence, over states and over keys and values, with every term there is."""
    chunk, head_dim = 64, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    query, states = normal(batch, tokens, heads, head_dim), normal(batch, neighbours, length, width)
    weights = [normal(heads * head_dim, width) * width**-0.5 for _ in range(2)]
    key, value = ((states.float() @ w.float().mT).to(DTYPE).unflatten(-1, (heads, head_dim)) for w in weights)
    columns = chunk + length - 1
    terms = {
        "rows": torch.randint(-1, chunk, (batch, tokens), device=DEVICE),
        "rel_key": normal(heads, columns, head_dim),
        "content_bias": normal(heads, head_dim),
        "position_bias": normal(heads, head_dim),
        "rel_bias": normal(heads, columns),
        "neighbour_lengths": torch.randint(0, length + 1, (batch, neighbours), device=DEVICE),
    }
    absorbed_decode(query, states, *weights, **terms)
    chunked_cross_attention_decode(query, key, value, **terms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", choices=("none", "bias", "relative"), nargs="+", default=["bias"])
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), default="backward")
    parser.add_argument("-D", type=int, nargs="+", default=[128])
    parser.add_argument("-K", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument(
        "--small", action="store_true", help="a shape with a short last chunk that takes no time"
    )
    parser.add_argument("--decode", action="store_true", help="a few new tokens instead, of small shapes")
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    if args.decode:
        for sizes in DECODED:
            decode(*sizes)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print(f"{sizes}: done")
        return
    for positions in args.positions:
        for head_dim in args.D:
            shape = Shape(args.batch, 2048, args.heads, head_dim, args.K)
            if args.small:
                shape = Shape(2, 3 * 64 + 7, 2, head_dim, 3)
            case = Case(shape, positions, lengths=args.lengths or args.small)
            t = tensors(case)
            for _ in range(args.repeat):
                out = chunked_cross_attention(t.query, t.key, t.value, **t.arguments())
                if args.which == "backward":
                    torch.autograd.grad(out, t.wanted(), t.grad_out)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print(f"{case}: done")


if __name__ == "__main__":
    main()
