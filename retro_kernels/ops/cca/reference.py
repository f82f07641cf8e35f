r"""The definition of block attention, the family that chunked cross-attention belongs to, in plain PyTorch.

Block p holds TQ query rows and attends to the J·TK keys of group p // repeat under one softmax:

    logit[i, j, c] = ((q_i + u)·k_jc + (q_i + v)·rel_key[g]) · scale + rel_bias[g],   g = i − c + TK − 1

CCA (Borgeaud et al. 2021, eq. 4–6): blocks are attending chunks, TQ = M, J = K, TK = R, and block u of a sequence
starts at token (u + 1)M − 1, which is `shift` = M − 1 rows behind chunk u. The neighbour encoder's self-attention
has J = 1 and TQ = TK = R; its cross-attention has TQ = R, J = 1, TK = M and repeat = K.

Shapes: S sequences · N rows each · P blocks (P / S per sequence) · G = P / repeat key groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_attention_reference(
    query: Tensor,  # [S, N, H, D]
    key: Tensor,  # [G, J, TK, Hkv, D]
    value: Tensor,  # [G, J, TK, Hkv, D]
    rel_key: Tensor | None = None,  # [H, TQ + TK - 1, D]
    content_bias: Tensor | None = None,  # [H, D]
    position_bias: Tensor | None = None,  # [H, D]
    rel_bias: Tensor | None = None,  # [H, TQ + TK - 1]
    lengths: Tensor | None = None,  # int [G, J]
    seed: Tensor | None = None,  # int64 [1]
    *,
    block: int,
    shift: int = 0,
    repeat: int = 1,
    scale: float,
    dropout_p: float = 0.0,
    upcast: bool = True,
) -> Tensor:  # [S, N, H, D]
    """Block attention by materialised logits. Half precision is computed in float32 and rounded once at the end;
    with `upcast=False` its matrix products round as plain PyTorch code would (the yardstick of the tests)."""
    num_seqs, num_rows, num_heads, head_dim = query.shape
    groups, num_sets, num_keys, kv_heads, _ = key.shape
    blocks = groups * repeat
    wide = torch.promote_types(query.dtype, torch.float32)
    narrow = wide if upcast else query.dtype

    per_seq = blocks // num_seqs if num_seqs else -(-max(num_rows - shift, 0) // max(block, 1))
    q = query[:, shift:]
    q = F.pad(q, (0, 0, 0, 0, 0, per_seq * block - q.shape[1]))
    q = q.reshape(blocks, block, num_heads, head_dim)  # [P, TQ, H, D]
    q_content = (q if content_bias is None else (q + content_bias).to(query.dtype)).to(narrow)
    q_position = (q if position_bias is None else (q + position_bias).to(query.dtype)).to(narrow)
    missing = None
    if lengths is not None:
        missing = torch.arange(num_keys, device=query.device) >= lengths[..., None]  # [G, J, TK]
        # a weight of zero is not enough: whatever lies there may be NaN
        key, value = (x.masked_fill(missing[..., None, None], 0.0) for x in (key, value))
    k, v = (
        x.to(narrow).repeat_interleave(num_heads // kv_heads, 3).repeat_interleave(repeat, 0)
        for x in (key, value)
    )  # [P, J, TK, H, D]

    column = relative_column(block, num_keys, query.device)  # [TQ, TK]
    logits = torch.einsum("pihd,pjchd->phijc", q_content, k).to(wide)
    if rel_key is not None:
        by_distance = torch.einsum("pihd,hgd->phig", q_position, rel_key.to(narrow)).to(wide)
        shifted = by_distance.gather(-1, column.expand(blocks, num_heads, block, num_keys))
        logits = logits + shifted[:, :, :, None]
    logits = logits * scale
    if rel_bias is not None:
        logits = logits + rel_bias.to(wide)[:, column][:, :, None]
    if missing is not None:
        logits = logits.masked_fill(missing.repeat_interleave(repeat, 0)[:, None, None], float("-inf"))

    logits = logits.flatten(3)  # one softmax over all neighbours: [P, H, TQ, J * TK]
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        weights = weights * dropout_keep(seed, weights.shape, dropout_p) / (1.0 - dropout_p)
    out = torch.einsum("phik,pkhd->pihd", weights.to(narrow), v.flatten(1, 2))
    out = out.to(query.dtype).reshape(num_seqs, per_seq * block, num_heads, head_dim)
    return F.pad(out[:, : max(num_rows - shift, 0)], (0, 0, 0, 0, min(shift, num_rows), 0)).contiguous()


def relative_column(block: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Column of the position tables for query row i and key c of a block: i − c + TK − 1, int64 [TQ, TK]."""
    rows = torch.arange(block, device=device)
    return rows[:, None] - torch.arange(num_keys, device=device) + (num_keys - 1)


def dropout_keep(
    seed: Tensor, shape: torch.Size | tuple[int, ...], dropout_p: float, first_block: int = 0
) -> Tensor:
    """Which weights stay, bool [P, H, TQ, keys]: Philox-4x32-10 (Salmon et al. 2011) with key `seed` and counter
    (key, row, head, block), bit for bit what the kernels draw, and independent of how they are tiled. `first_block`
    is the number of the first block in `shape`."""
    low = 0xFFFFFFFF

    def product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # the 64-bit product does not fit in a signed int64, so its halves come from 16-bit pieces of a
        a_high, a_low = a >> 16, a & 0xFFFF
        upper, lower = a_high * x, a_low * x
        total = upper + (lower >> 16)
        return total >> 16, ((total << 16) | (lower & 0xFFFF)) & low

    counters = [torch.arange(size, device=seed.device) for size in shape]
    counters[0] = counters[0] + first_block
    c3, c2, c1, c0 = torch.meshgrid(*counters, indexing="ij")
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_a, low_a = product(0xD2511F53, c0)
        high_b, low_b = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0 >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped if its 32-bit draw lies below this."""
    return min(round(dropout_p * 2**32), 2**32 - 1)
