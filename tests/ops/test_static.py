"""Machine code of the kernels for GPUs that are not here, and the guards that read it (bench/static.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import static

from retro_kernels.ops.gather import native

compiles = pytest.mark.skipif(static.why_not() is not None, reason=str(static.why_not()))

CHECKED = (
    "sm_80/backward-biasgrad-64-bf16",
    "sm_80/forward-relative-64-bf16",
    "sm_90/backward-biasgrad-128-bf16",
    "sm_90/decode-relative-64-bf16",
    "sm_90/forward-none-128-bf16",
    "sm_100/backward-biasgrad-128-bf16",
    "sm_100/forward-relative-128-bf16",
    "sm_120/forward-relative-128-bf16",
)
"""Twelve kernels: each architecture, both directions, and where other block sizes spill or compile to a trap."""


def committed() -> dict[str, Any]:
    return json.loads(static.RESULTS.read_text())


def compiled(*options: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since this one interprets kernels."""
    return subprocess.run(
        [sys.executable, static.__file__, "--processes", "2", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@compiles
@pytest.mark.slow
def test_committed_kernels() -> None:
    """Compiled here: every guard, and every figure within 15 % of the committed one."""
    import triton

    names, every = ({v.name for v in static.variants(more)} for more in (False, True))
    assert set(CHECKED) <= names <= {name.partition(":")[0] for name in committed()["rows"]} <= every
    if triton.__version__ != committed()["triton"]:
        pytest.skip(f"figures are of triton {committed()['triton']}, here is {triton.__version__}")
    done = compiled("--check", *(x for name in CHECKED for x in ("--only", name)))
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    # decoding has its query's products before, and merges its parts after; the gradient of a bias adds them up
    beside = sum(2 * ("decode" in x) + ("biasgrad" in x) for x in CHECKED)
    assert len(kernels) == len(CHECKED) + beside, done.stdout


@compiles
def test_a_check_of_nothing_holds_nothing() -> None:
    done = compiled("--check", "--only", CHECKED[0], "--only", "nothing")
    assert done.returncode == 2 and "no variant's name contains 'nothing'" in done.stderr


@compiles
def test_calls_in_any_shape(seed: int) -> None:
    """Of which no kernel is a trap, or too large for the GPU."""
    import triton

    if triton.__version__.startswith("3.5."):
        pytest.skip("Triton 3.5 does not compile all of them for sm_100")
    done = compiled("--random", "5", "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"wrong with 0 kernels, nothing with [1-9]", done.stdout), done.stdout


@compiles
def test_what_is_wrong_with_a_kernel() -> None:
    """A trap as Triton made it of blocks that the table had once."""
    with_triton(
        "from retro_kernels.ops.cca import tiles\n"
        "tiles.backward_config = lambda *a: tiles.Config(32, 8, 1, panels=2)\n"
        "call = static.Variant(100, 'backward', 256, 'bf16', 'single'), static.Shape(left_out=frozenset({'lengths'}))\n"
        "found = static.wrong_of_drawn(call)\n"
        "import triton\n"
        "assert not triton.__version__.startswith('3.7') or 'a trap: 16 instructions' in found[0][1], found\n"
        "tiles.backward_config = None\n"
        "(name, text), = static.wrong_of_drawn(call)\n"
        "assert 'TypeError' in text and 'sm_100/backward-single-256-bf16' in name, (name, text)\n"
    )
    small = row(sass(HOT), arch=120, shared=128 * 1024, atomics=2, overwritten=1)
    assert len(static.wrong(small)) == 3 and static.wrong(row(sass(HOT))) == []


@compiles
def test_sizes_of_one() -> None:
    """Triton makes an argument that is 1 a constant, which has fewer methods; interpreted kernels do not show it."""
    done = compiled("--ones")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[1] for line in done.stdout.splitlines()}
    assert len(kernels) >= 8 and {"_cca_bwd_kernel", "_cca_decode_kernel"} <= kernels, done.stdout


def test_known_exceptions_are_real() -> None:
    """What the committed file excuses is missed by its own figures, with a reason; nothing else is missed there."""
    file = committed()
    assert static.check(file["rows"], file, file["triton"]) == []
    assert set(file["known"]) <= set(file["rows"])
    for name, entry in file["known"].items():
        assert len(entry["reason"]) > 20 and entry["figures"], name
        for guard, figure in entry["figures"].items():
            assert file["rows"][name][static.MEASURE[guard]] <= figure, name


def sass(body: list[str], instructions: int = 400, loop: bool = True) -> str:
    """Text as of cuobjdump: filling, then a loop around `body`, then an exit."""
    lines = ["FADD R0, R0, R1 "] * (instructions - len(body) - 2)
    start = 16 * len(lines)
    lines += [*body, f"@!P0 BRA 0x{start:x} " if loop else "NOP ", "EXIT "]
    return "\n".join(f"        /*{16 * i:04x}*/                   {x};" for i, x in enumerate(lines))


def row(text: str, **changes: Any) -> dict[str, Any]:
    good = {
        "kernel": "_cca_fwd_kernel",
        "arch": 90,
        "head_dim": 64,
        "dtype": "bf16",
        "wanted": 4,
        "registers": 126,
        "stack": 0,
        "shared": 40 * 1024,
        "warps": 4,
        "tma": True,
        "compile_s": 1.5,
    }
    return good | static.read_sass(text) | changes


HOT = [
    "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8] ",
    "@P1 LDG.E R2, desc[UR4][R2.64] ",
    "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ",
    *["UTMALDG.3D [UR8], [UR4] "] * 2,
]
STORES = ["UTMASTG.3D [UR8], [UR4] "] * 2


def test_a_good_kernel_passes() -> None:
    good = row(sass(HOT))
    assert good["matrix_hot"] == {"HGMMA": 1} and good["instructions"] == 400
    assert static.failed(good) == []


@pytest.mark.parametrize(
    ("text", "changes", "complaint"),
    [
        ("\n".join(f"/*{16 * i:04x}*/ BPT.TRAP 0x1 ;" for i in range(16)), {}, "stub: 16 instructions"),
        (sass([*HOT, "@P0 RED.E.ADD.F32 desc[UR4][R2.64], R5 "]), {}, "atomics: 1"),
        (sass([*HOT, "@!UP0 ATOMG.E.ADD PT, RZ, R5 "]), {}, "atomics: 1"),
        (sass([*HOT, "ATOMS.ADD RZ, [R2], R5 "]), {}, "atomics: 1"),
        (sass([*HOT, "LDL R55, [R1+0x10] "]), {}, "spills: 1 in the hot loop, allowed 0"),
        (sass([*HOT, "LDL R55, [R1+0x10] "], loop=False), {}, "spills: 1 in the hot loop, allowed 0"),
        (sass([*HOT, *["STL [R1], R5 "] * 9]), {"kernel": "_cca_bwd_kernel", "wanted": 2}, "spills: 9"),
        (sass(["HMMA.16816.F32.BF16 R24, R4, R8, R24 "]), {}, "matrix: no HGMMA"),
        (sass(["FFMA R24, R4, R8, R24 "]), {}, "matrix: none in the hot loop"),
        (sass(HOT), {"registers": 168}, "registers: 168 x 128 threads x 4 programs"),
        (sass(HOT), {"shared": 240 * 1024, "wanted": 1}, "shared memory"),
        (sass(HOT), {"shared": 60 * 1024}, "shared memory"),
        (sass(HOT), {"compile_s": 33.0}, "compiler: 33.0 s"),
        (sass(HOT), {"stack": 8}, "stack: 8 bytes, allowed 0"),
        (
            sass(HOT),
            {"stack": 136, "kernel": "_cca_bwd_kernel", "wanted": 2},
            "stack: 136 bytes, allowed 128",
        ),
        (sass(HOT[:-1]), {}, "TMA: 1 UTMALDG"),
        (sass([*HOT, STORES[0]]), {"kernel": "_cca_bwd_kernel", "wanted": 2}, "TMA: 1 UTMASTG"),
        (
            sass([*HOT, "LDGSTS.E.64 [R7], desc[UR4][R2.64] "]),
            {},
            "narrow loads: 2 in the hot loop, allowed 1",
        ),
        (sass([*HOT, "MUFU.EX2 R6, R9 "]), {}, "overwritten operands: of 1"),
        (sass([*HOT, "@P0 LDS.128 R4, [R9] "]), {}, "overwritten operands: of 1"),
    ],
)
def test_each_guard_catches(text: str, changes: dict[str, Any], complaint: str) -> None:
    assert any(x.startswith(complaint) for x in static.failed(row(text, **changes)))


def test_what_is_no_fault() -> None:
    weights = ["MUFU.EX2 R6, R9 ", *HOT, "STS [R6], R9 ", "FADD R8, R6, R7 "]  # made anew in every round
    assert static.failed(row(sass(weights))) == []
    claimed = row(sass([*HOT, "ATOMS.OR RZ, [R2], R5 ", "REDUX.OR UR4, R2 "]))
    assert claimed["atomics"] == 0
    outside = row("        /*fff0*/                   LDL R55, [R1] ;\n" + sass(HOT))
    assert outside["spills"] == 1 and outside["spills_hot"] == 0
    few = row(sass([*HOT, *STORES, *["STL [R1], R5 "] * 8]), kernel="_cca_bwd_kernel", wanted=2)
    assert static.failed(few) == []
    one_set = row(sass(HOT, loop=False))
    assert one_set["matrix_hot"] == {"HGMMA": 1} and static.failed(one_set) == []


def test_code_that_waits_behind_the_end_is_no_loop() -> None:
    """It branches back into the loop's middle: what lies between, after the loop, runs once."""
    lines = ["FADD R0, R0, R1 "] * 400
    lines[300] = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8] "
    lines[301] = f"@!P1 BRA 0x{16 * 390:x} "
    lines[303] = f"BRA.U !UP0, 0x{16 * 300:x} "
    lines[310:330] = ["LDL R55, [R1] "] * 20
    lines[389] = "EXIT "
    lines[391] = f"BRA 0x{16 * 302:x} "
    text = "\n".join(f"        /*{16 * i:04x}*/                   {x};" for i, x in enumerate(lines))
    found = static.read_sass(text)
    assert (found["spills"], found["spills_hot"], found["matrix_hot"]) == (20, 0, {"HGMMA": 1})
    assert static.read_sass(text, whole=True)["spills_hot"] == 20


def test_comparison_with_committed() -> None:
    good = row(sass(HOT))
    file: dict[str, Any] = {"triton": "3.7.1", "known": {}, "rows": {"a": good}}
    assert static.check({"a": good}, file, "3.7.1") == []
    grown = row(sass(HOT, 470))
    assert static.check({"a": grown}, file, "3.7.1") == ["a: instructions: 470, committed 400"]
    assert static.check({"a": grown}, file, "9.9.9") == []  # another version: absolute guards alone
    more = row(sass([*HOT, HOT[-1]]))
    assert static.check({"a": more}, file, "3.7.1") == [
        "a: TMA: {'UTMALDG': 3} in the hot loop, committed {'UTMALDG': 2}"
    ]
    spilling = row(sass([*HOT, "LDL R55, [R1] "]))
    assert len(static.check({"a": spilling}, file, "9.9.9")) == 1
    file["known"] = {"a": {"figures": {"spills": 1}, "reason": "on purpose"}}
    assert static.check({"a": spilling}, file, "3.7.1") == []
    worse = row(sass([*HOT, "LDL R55, [R1] ", "LDL R56, [R1+0x4] "]))
    assert static.check({"a": worse}, file, "3.7.1") == [
        "a: spills: 2 in the hot loop, allowed 0; known are 1"
    ]
    assert static.check({"a": good}, file, "3.7.1") == [
        "a: known to miss the guard of spills, but holds it now"
    ]


def with_triton(code: str) -> None:
    """Runs `code` in a process that does not interpret kernels, with bench/static.py imported."""
    root = Path(static.__file__).resolve().parents[1]
    head = "import sys; sys.path[:0] = sys.argv[1:]\nimport static\n"
    subprocess.run(
        [sys.executable, "-c", head + code, str(root / "bench"), str(root)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
        timeout=120,
    )


@compiles
def test_launches_come_from_the_library() -> None:
    """Another choice in the library's table is another launch here."""
    with_triton(
        "from retro_kernels.ops.cca import tiles\n"
        "tiles.forward_config = lambda *a: tiles.Config(32, 2, 5)\n"
        "v = static.Variant(90, 'forward', 64, 'bf16', 'none')\n"
        "(launch,) = static.launches(v)\n"
        "o = {**dict(zip(launch.kernel.arg_names, launch.args)), **launch.options}\n"
        "assert (o['BN'], o['num_warps'], o['num_stages'], o['TMA']) == (32, 2, 5, True), o\n"
    )


@compiles
def test_which_launches_of_decoding_overlap() -> None:
    """From sm_90 on, one that may begin early waits for the one before it, and the first may not: what it reads may
    still be written. Nobody behind the last one is let in early."""
    with_triton(
        """
for arch in (80, 89, 90, 100, 120):
    for part, dim, mode in (
        ("decode", 64, "relative"), ("absorbed", 896, "decode"), ("absorbed", 896, "decode-many")
    ):
        chain = static.launches(static.Variant(arch, part, dim, "bf16", mode))
        assert len(chain) >= 3, chain
        for i, launch in enumerate(chain):
            given = dict(zip(launch.kernel.arg_names, launch.args))
            overlaps = arch in (90, 100)
            early = launch.options.get("launch_pdl", False)
            assert early == (overlaps and i > 0), (arch, part, mode, i)
            assert given.get("WAITS", False) == early, (arch, part, mode, i)
            assert given.get("LETS_NEXT", False) == (overlaps and i + 1 < len(chain)), (arch, part, mode, i)
"""
    )


def test_kernels_in_cuda_have_no_more_spills_than_those_in_triton() -> None:
    """Of decoding over states, in the extension as it was built. 1,024 wide, 32 rows need more registers than there
    are."""
    if not native.WITH_CUDA:
        pytest.skip("the extension is built without CUDA")
    if not os.access(static.cuobjdump(), os.X_OK):
        pytest.skip("this triton comes without cuobjdump")
    from retro_kernels import _C

    command = [str(static.cuobjdump()), "-arch", "sm_90", "-sass", _C.__file__]
    sass = subprocess.run(command, capture_output=True, text=True).stdout
    found = {}
    for kernel in re.split(r"Function : ", sass)[1:]:
        if of := re.match(r"\S*absorbed_decode_kernelI\d*(\w+?)Li(\d)ELi(\d)E", kernel):
            found[of[1], 128 * int(of[2]), 16 * int(of[3])] = static.read_sass(kernel)
    if not found:
        pytest.skip("the extension has no code for sm_90")
    assert len(found) == 16, sorted(found)
    for (dtype, width, rows), row in found.items():
        assert row["matrix_hot"] and row["atomics"] == 0, (dtype, width, rows)
        most = 24 if (width, rows) == (1024, 32) else 8 if (width, rows) == (896, 32) else 0
        assert row["spills_hot"] <= most, (dtype, width, rows, row["spills_hot"])


def test_constants_are_made_without_max_and_min() -> None:
    """In Triton 3.5, which is allowed, they make values: what takes a constant then does not compile."""
    ops = Path(static.__file__).resolve().parents[1] / "retro_kernels" / "ops"
    made = [
        line
        for path in ops.rglob("*.py")
        for line in path.read_text().splitlines()
        if ": tl.constexpr =" in line
    ]
    assert len(made) > 20 and not [line for line in made if re.search(r"\b(max|min)\(", line)]
