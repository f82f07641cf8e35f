"""Run one case a few times and nothing else: what a profiler or a memory checker is put in front of.

ncu --clock-control none python bench/once.py --pass backward -D 128 -K 10
compute-sanitizer python bench/once.py --small
"""

from __future__ import annotations

import argparse

import torch
from cases import DEVICE, Case, Shape, tensors

from retro_kernels.ops import chunked_cross_attention


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
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
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
