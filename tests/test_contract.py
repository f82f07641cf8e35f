"""The public names as an outside caller meets them: signatures, shapes, exact zeros, the command line's objects.

What the results are worth is tested beside each part; here stands what other people's code relies on."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from small import CHUNK, MODEL, World, run

import retro_kernels as rk

M, R, K, H, D, DIM, E = 4, 8, 2, 4, 16, 24, 20
NOTHING = inspect.Parameter.empty


def signature(function: object) -> tuple[dict[str, object], list[str]]:
    """Defaults by name, and the names that may be given without their keyword."""
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    kept = {name: p for name, p in parameters.items() if name != "self"}
    free = [name for name, p in kept.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {name: p.default for name, p in kept.items()}, free


def test_signatures() -> None:
    assert signature(rk.chunked_cross_attention) == (
        dict(query=NOTHING, key=NOTHING, value=NOTHING, chunk_size=64)
        | dict.fromkeys(
            ["rel_key", "content_bias", "position_bias", "rel_bias", "neighbour_lengths", "scale"]
        )
        | dict(dropout_p=0.0, backend=None),
        ["query", "key", "value"],
    )
    defaults, free = signature(rk.ChunkedCrossAttention.__init__)
    promised = (
        dict(dim=NOTHING, num_heads=NOTHING, head_dim=None, encoder_dim=None, num_kv_heads=None)
        | dict(chunk_size=64, neighbour_len=128, position="relative", dropout=0.0, bias=False)
        | dict(backend=None, device=None, dtype=None)
    )
    assert defaults == promised | {"projection": "auto"} and free == ["dim", "num_heads"]
    assert signature(rk.ChunkedCrossAttention.forward) == (
        dict(x=NOTHING, neighbours=NOTHING, neighbour_lengths=None),
        ["x", "neighbours", "neighbour_lengths"],
    )
    defaults, free = signature(rk.gather_neighbours)
    assert free == ["tokens", "ids"] and defaults["continuation"] is NOTHING and defaults["pad_id"] == 0
    defaults, free = signature(rk.Retriever.__call__)
    assert defaults == dict(tokens=NOTHING, num_neighbours=2, exclude_documents=None) and free == ["tokens"]
    defaults, free = signature(rk.Retriever.from_pretrained)
    assert free == ["path"] and defaults["device"] is None
    assert signature(rk.Retro.forward)[1] == ["tokens", "neighbours"]
    assert signature(rk.Retro.__init__)[1] == ["config"]
    assert rk.NeighbourBatch._fields == ("tokens", "lengths", "ids", "distances")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_function_has_the_promised_shapes_and_zeros(
    seed: int, dtype: torch.dtype, backend: str | None
) -> None:
    for tokens in (0, 1, M - 1, M, 2 * M - 1, 3 * M + 1):
        chunks = tokens // M
        made = dict(dtype=dtype, requires_grad=True)
        query = torch.randn(2, tokens, H, D, **made)
        key, value = (torch.randn(2, chunks, K, R, 2, D, **made) for _ in range(2))
        terms = {
            "rel_key": torch.randn(H, M + R - 1, D, **made),
            "content_bias": torch.randn(H, D, **made),
            "position_bias": torch.randn(H, D, **made),
            "rel_bias": torch.randn(H, M + R - 1, **made),
        }
        lengths = torch.randint(1, R + 1, (2, chunks, K))
        lengths[0, -1:] = 0
        out = rk.chunked_cross_attention(
            query, key, value, chunk_size=M, neighbour_lengths=lengths, backend=backend, **terms
        )
        assert out.shape == (2, tokens, H, D) and out.dtype == dtype
        assert out[:, : M - 1].eq(0).all()
        assert out[0, chunks * M - 1 :].eq(0).all() if chunks else out.eq(0).all()
        assert out[1, M - 1 :].ne(0).any(-1).all()
        wanted = (query, key, value, *terms.values())
        gradients = torch.autograd.grad(out.sum(), wanted)
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, dtype) for x in wanted]
        assert all(g.isfinite().all() for g in gradients)


def test_function_is_the_formula_of_the_contract(seed: int) -> None:
    """One softmax over all K·R keys; the table's column a − c + R − 1; rel_bias is not scaled."""
    tokens, scale = 2 * M + 3, 0.3
    q, k, v = torch.randn(1, tokens, H, D), torch.randn(1, 2, K, R, 2, D), torch.randn(1, 2, K, R, 2, D)
    rel, bias = torch.randn(H, M + R - 1, D), torch.randn(H, M + R - 1)
    u, w = torch.randn(H, D), torch.randn(H, D)
    out = rk.chunked_cross_attention(
        q, k, v, chunk_size=M, rel_key=rel, content_bias=u, position_bias=w, rel_bias=bias, scale=scale
    )
    for t in range(M - 1, tokens):
        chunk, a = (t + 1) // M - 1, (t + 1) % M
        for h in range(H):
            logits = torch.stack(
                [
                    (
                        (q[0, t, h] + u[h]) @ k[0, chunk, j, c, h // 2]
                        + (q[0, t, h] + w[h]) @ rel[h, a - c + R - 1]
                    )
                    * scale
                    + bias[h, a - c + R - 1]
                    for j in range(K)
                    for c in range(R)
                ]
            )
            expected = torch.softmax(logits, 0) @ v[0, chunk, :, :, h // 2].flatten(0, 1)
            torch.testing.assert_close(out[0, t, h], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection", ["materialised", "absorbed"])
@pytest.mark.parametrize("position", ["relative", "bias", "none"])
def test_module_adds_exactly_nothing_where_there_is_nothing(
    seed: int, position: str, projection: str
) -> None:
    """Bias and dropout of the output projection included; no neighbours at all (K = 0) is nothing as well."""
    cca = rk.ChunkedCrossAttention(
        DIM, H, head_dim=D, encoder_dim=E, chunk_size=M, neighbour_len=R, position=position, bias=True,
        dropout=0.2, projection=projection,
    )  # fmt: skip
    torch.nn.init.constant_(cca.o_proj.bias, 7.0)
    x, neighbours = torch.randn(2, 3 * M + 2, DIM), torch.randn(2, 3, K, R, E)
    lengths = torch.full((2, 3, K), R)
    lengths[0, 1] = 0
    out = cca(x, neighbours, lengths)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out[:, : M - 1].eq(0).all() and out[0, 2 * M - 1 : 3 * M - 1].eq(0).all()
    assert out[1, M - 1 :].ne(0).any(-1).all()
    assert cca(x[:, : M - 1], neighbours[:, :0]).eq(0).all()
    for none in (None, lengths[:, :, :0]):
        assert cca(x, neighbours[:, :, :0], none).eq(0).all()


def test_relative_positions_are_the_sinusoid_of_the_contract() -> None:
    """concat(sin(d·f), cos(d·f)), f_j = 10000^(−2j/dim), through rel_proj: seen from outside as logits."""
    cca = rk.ChunkedCrossAttention(
        DIM, 1, head_dim=DIM, encoder_dim=E, chunk_size=M, neighbour_len=R, projection="materialised"
    )
    torch.nn.init.eye_(cca.rel_proj.weight)
    table = cca.position_terms()["rel_key"][0]
    for g in range(M + R - 1):
        d = g - (R - M)
        angles = [d * 10000 ** (-2 * j / DIM) for j in range(DIM // 2)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(table[g].detach(), expected, rtol=0, atol=1e-6)


def test_gathered_neighbours() -> None:
    """Three chunks of one document, the last one short; one chunk of another."""
    store = torch.tensor([[5, 6], [7, 8], [9, 0], [3, 4]], dtype=torch.int32)
    continuation = torch.tensor([True, True, False, False])
    ids = torch.tensor([[[0, 1], [2, 3], [-1, -1]]])
    tokens, lengths = rk.gather_neighbours(store, ids, continuation=continuation)
    assert tokens.tolist() == [
        [[[5, 6, 7, 8], [7, 8, 9, 0]], [[9, 0, 0, 0], [3, 4, 0, 0]], [[0] * 4, [0] * 4]]
    ]
    assert lengths.tolist() == [[[4, 3], [1, 2], [0, 0]]] and lengths.dtype == torch.int32
    torch.nn.Embedding(10, 3)(tokens)  # indexes as int64 does


def test_retriever(world: World) -> None:
    retriever = rk.Retriever.from_pretrained(world.set)
    text = (world.train / "train-5.txt").read_text(encoding="utf-8")
    ids = retriever.tokenizer.encode(text)[: 3 * CHUNK + 5]
    found = retriever(torch.tensor([ids, ids]))
    assert found.tokens.shape == (2, 3, 2, 2 * CHUNK) and found.tokens.dtype == torch.int64
    assert found.lengths.shape == found.ids.shape == found.distances.shape == (2, 3, 2)
    assert (found.lengths.dtype, found.ids.dtype) == (torch.int32, torch.int64)
    own = retriever.documents(found.ids[:, :1, 0])
    assert retriever.titles(own) == ["train-5.txt"] * 2 and found.distances[:, 0, 0].max() < 1e-3
    excluded = torch.tensor([[own[0, 0].item(), -1], [-1, -1]])
    other = retriever(torch.tensor([ids, ids]), num_neighbours=3, exclude_documents=excluded)
    assert not (retriever.documents(other.ids)[0] == own[0, 0]).any()
    assert torch.equal(other.ids[1, :, :2], found.ids[1])
    # what cannot be filled: every document but one excluded, more asked for than it has
    rest = torch.arange(1, retriever.num_documents)[None]
    few = retriever(torch.tensor([ids]), num_neighbours=retriever.num_chunks, exclude_documents=rest)
    missing = few.ids == -1
    assert missing.any() and few.distances[missing].isinf().all() and few.lengths[missing].eq(0).all()
    assert retriever.documents(few.ids)[missing].eq(-1).all() and few.tokens[missing].eq(0).all()
    assert retriever.titles(torch.tensor([-1])) == [""]


def test_model_on_and_off(seed: int) -> None:
    config = rk.retro_tiny(vocab_size=60, chunk_size=M, neighbour_len=R)
    model = rk.Retro(config).eval()
    tokens = torch.randint(60, (2, 3 * M + 1))
    off = model(tokens, None)
    assert off.shape == (2, 3 * M + 1, 60) and torch.equal(off, model(tokens))
    ids = torch.zeros(2, 3, K, dtype=torch.int64)
    batch = rk.NeighbourBatch(
        torch.randint(60, (2, 3, K, R)), torch.full((2, 3, K), R, dtype=torch.int32), ids, ids.float()
    )
    calls: list[int] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    on = model(tokens, batch)
    assert torch.equal(on[:, : M - 1], off[:, : M - 1]) and not torch.equal(on, off) and calls == [1]
    model(tokens)
    assert calls == [1]  # off: the encoder is skipped, not run on nothing
    assert rk.Retro(config.replace(cca_layers=()))(tokens).shape == off.shape


VERBS = {
    "index": (["{text}", "--out", "{tmp}/set", "--tokenizer", "{set}/tokenizer.model", "--embedder", "hashing:64",
               "--index", "Flat", "--device", "cpu", "--json"], ["num_chunks", "num_documents", "index", "tokenizer"]),
    "search": (["lomi ka", "--set", "{set}", "-k", "2", "--json"], ["neighbours"]),
    "train": (["--data", "{text}", "--out", "{tmp}/run", "--set", "{set}", "--steps", "1", "--seed", "1", "--json",
               *MODEL], ["loss", "steps", "stall_share"]),
    "eval": (["--run", "{run}", "--data", "{held}", "--set", "{set}", "-k", "2", "--json"],
             ["bits_per_byte", "filtered", "words", "bytes"]),
    "generate": (["lomi ka", "--run", "{run}", "--set", "{set}", "--max-tokens", "3", "--temperature", "0.5",
                  "--top-k", "9", "--top-p", "0.9", "--seed", "4", "--show-neighbours", "--json"], ["text", "chunks"]),
    "info": (["--json"], ["backends"]),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_command_line_prints_one_object(
    verb: str, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words, keys = VERBS[verb]
    places = dict(text=world.train, held=world.held_out, set=world.set, run=world.run, tmp=tmp_path)
    assert run(verb, *(word.format_map(places) for word in words)) == 0
    result = json.loads(capfd.readouterr().out)
    assert set(keys) <= set(result)
    if verb == "eval":
        assert set(result["bits_per_byte"]) == {"off", "on", "shuffled"}
        assert all(0 < float(alpha) <= 1 for alpha in result["filtered"])
        data = b"".join(path.read_bytes() for path in sorted(world.held_out.iterdir()))
        assert result["bytes"] == len(data) and result["words"] == len(data.split())
    assert not list(tmp_path.rglob("*.tmp*"))
