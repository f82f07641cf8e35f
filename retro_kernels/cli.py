"""The command line. Nothing heavy is imported before the arguments have been read.

A verb prints its result on standard output, with --json as one JSON object, and everything else on standard error.
Exit status: 0 where all that was asked is done, 2 for arguments or input that cannot be used (one line says why), 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .config import PRESETS, FailedElsewhere, InputError, TrainConfig, as_seed, parse_overrides, processes

PROG = "retro-kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    if not _open_what_is_closed():
        _complain(
            PROG, "standard output is closed, so that the result would be lost. Give > FILE, or > /dev/null."
        )
        return 2
    _print_any_character()
    try:
        args = _parser().parse(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as stop:  # --help, --version, or a bad argument that has been reported
        return int(stop.code or 0)
    verb = f"{PROG} {args.verb}"
    try:
        _check_processes(args.verb)
        args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who was reading has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        if _speaks():
            _complain(verb, str(interrupt) or "interrupted")
        return 130
    except FailedElsewhere:
        return 2
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        # The library says with these what cannot be used. A traceback is a bug's, for RETRO_DEBUG=1 anybody's.
        if os.environ.get("RETRO_DEBUG"):
            raise
        _complain(verb, _message(error))
        return 2
    except RuntimeError as error:
        if os.environ.get("RETRO_DEBUG") or not _lacks_memory(error):
            raise
        told = str(error).partition(" See documentation")[0].splitlines()[0].rstrip(". ")
        _complain(verb, f"{told}. {_SMALLER.get(args.verb, '')}")
        return 2


_SMALLER = {
    "train": "Give a smaller --batch-size; with --accumulate as many times larger a step computes the same.",
    "eval": "Give a smaller --batch-size.",
}
"""What needs less memory."""


def _lacks_memory(error: RuntimeError) -> bool:
    """What torch raises is a type of its own for a GPU, and for the CPU none."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _check_processes(verb: str) -> None:
    if verb in ("train", "info") or "TORCHELASTIC_RUN_ID" not in os.environ or processes() == 1:
        return
    message = f"{verb}: torchrun started {processes()} processes, and all would do the same in one place. "
    kind = InputError if _speaks() else FailedElsewhere
    raise kind(f"{message}Only train divides its work among them; start this verb without torchrun.")


def _speaks() -> bool:
    """Of the processes that torchrun started, one."""
    return processes() == 1 or os.environ["RANK"] == "0"


def _open_what_is_closed() -> bool:
    """Whether there is a standard output. In place of what the caller closed comes /dev/null, which cannot be read: or
    the next file that is opened has its number, and gets what libraries print there."""
    while (number := os.open(os.devnull, os.O_WRONLY)) <= 2:
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    return sys.stdout is not None


def _print_any_character() -> None:
    """What the terminal's encoding lacks is printed as a question mark: hours of work are not to end at a sign."""
    if not _prints_unicode() and isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout.errors in ("strict", "surrogateescape"):  # the latter in the locale C
            sys.stdout.reconfigure(errors="replace")


def _prints_unicode() -> bool:
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")


def _complain(verb: str, message: str) -> None:
    message = " ".join(message.split())
    with contextlib.suppress(OSError):  # the exit status tells, where nothing else can
        print(f"{verb}: {message.removeprefix(verb.rpartition(' ')[2] + ': ')}", file=sys.stderr)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, InputError) or str(error) else repr(error)


class _Parser(argparse.ArgumentParser):
    """One line for an error, with the nearest thing that exists."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=_Formatter)
        self.verbs: dict[str, _Parser] = {}
        self.given: list[str] = []

    def parse(self, argv: list[str]) -> argparse.Namespace:
        for parser in self.verbs.values():
            parser.given = argv
        args, unknown = self.parse_known_args(argv)
        if unknown:
            parser = self.verbs.get(getattr(args, "verb", ""), self)
            parser.error(parser._unknown(unknown) or f"unexpected argument {unknown[0]!r}")
        return args

    def _unknown(self, words: Sequence[str]) -> str | None:
        """What to say of the first word that looks like an option and is none."""
        options = [word.partition("=")[0] for word in words if re.match("--?[a-z]", word)]
        option = next((word for word in options if word not in self._option_string_actions), None)
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return option and f"unknown option {option}{_nearest(option, known)}"

    def error(self, message: str) -> NoReturn:
        if "are required" in message:  # a mistyped option is missing as well
            message = self._unknown(self.given[1:]) or message
        if found := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            name, given, allowed = found.groups()
            choices = [choice.strip("' ") for choice in allowed.split(",")]
            what = "unknown verb" if name == "verb" else f"{name}:"
            message = f"{what} {given!r}{_nearest(given, choices) or '; choose from ' + ', '.join(choices)}"
        message = message.rstrip(".")
        _complain(
            self.prog,
            f"{message}{'' if message.endswith('?') else '.'} {self.prog} --help shows what there is",
        )
        raise SystemExit(2)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _nearest(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _number(
    kind: type, low: float | None = None, above: float | None = None, high: float | None = None
) -> Callable[[str], Any]:
    """A converter that says what is allowed."""
    allowed = " ".join(
        part
        for part in (
            "an integer" if kind is int else "a number",
            f"of at least {low:g}" if low is not None else "",
            f"above {above:g}" if above is not None else "",
            f"and at most {high:g}" if high is not None else "",
        )
        if part
    )

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}") from None
        inside = (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )
        if not inside or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return convert


_COUNT, _NATURAL = _number(int, low=1), _number(int, low=0)


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROG, description="RETRO: language models that retrieve, from raw text to a trained model."
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> _Parser:
        made = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        made.set_defaults(run=run)
        parser.verbs[name] = made
        return made

    info = verb("info", _info, "which backends work here, and why the others do not")
    info.add_argument(
        "--set",
        metavar="SET",
        help="what this retrieval set holds instead, after reading and checking all of it",
    )
    _add_demo(
        verb("demo", _demo, "train, evaluate and generate on real text that is already here, in minutes")
    )
    _add_index(verb("index", _index, "build a retrieval set from text"))
    _add_search(verb("search", _search, "print the neighbours of a text"))
    _add_train(verb("train", _train, "train a model, with a retrieval set or without"))
    _add_eval(
        verb("eval", _eval, "bits per byte of held-out text: RETRO on, off, shuffled, filtered by leakage")
    )
    _add_generate(verb("generate", _generate, "continue a prompt, retrieving at every chunk"))
    _add_neighbours(
        verb(
            "neighbours", _neighbours, "find the neighbours of a training corpus once, for train --neighbours"
        )
    )
    _add_dedup(verb("dedup", _dedup, "find training text that copies evaluation text"))
    bench = verb("bench", _bench, "time the kernels and the steps (in a checkout)")
    bench.add_argument("-k", default="", metavar="NAME", help="only cases whose name matches")
    bench.add_argument("--out", metavar="FILE", help="result file (default: in bench/results)")
    bench.add_argument("--quick", action="store_true", help="one round a case")
    for name, made in parser.verbs.items():
        if name != "bench":
            what = "the manifest as one" if name == "index" else "one"
            made.add_argument("--json", action="store_true", help=f"print {what} JSON object")
    return parser


def _add_text(parser: _Parser, flag: str, *, help: str) -> None:
    parser.add_argument(flag, required=True, nargs="+", action="extend", metavar="PATH", help=help)


def _add_set(parser: _Parser, *, required: bool, help: str) -> None:
    parser.add_argument("--set", required=required, metavar="SET", help=help)


def _add_run(parser: _Parser) -> None:
    parser.add_argument("--run", required=True, dest="model", metavar="RUN", help="trained model")
    parser.add_argument(
        "--base", metavar="FOLDER", help="where the pretrained model lies now that the run was made from"
    )


def _run(args: argparse.Namespace, opened: bool = False) -> Any:
    """What `_add_run` reads, for `evaluate` and `generate`, which open it themselves where that need not be before."""
    if args.base is None and not opened:
        return args.model
    from .runs import load_run, pick_device

    return load_run(args.model, pick_device(args.device), base=args.base)


def _add_device(
    parser: _Parser,
    default: str | None = "auto",
    help: str = "cpu, cuda, cuda:1; default: a GPU where there is one",
) -> None:
    parser.add_argument("--device", default=default, metavar="D", help=help)


def _add_dtype(parser: _Parser, auto: str) -> None:
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help=f"arithmetic; auto: {auto}"
    )


def _add_retriever(
    parser: _Parser, default: str | None = None, names: str = "dense, bm25, random, dense+bm25, dense+edit, …"
) -> None:
    parser.add_argument(
        "--retriever",
        default=default,
        metavar="NAME",
        help=f"{names} (default: {default or 'as trained'})",
    )


def _add_demo(parser: _Parser) -> None:
    parser.add_argument(
        "--corpus", metavar="PATH", help="text to use (default: the packages of Python's standard library)"
    )
    parser.add_argument(
        "--out", default="demo", metavar="DIR", help="where set, models and report go (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=_COUNT, default=None, metavar="N", help="training steps of each model (default: 560)"
    )
    parser.add_argument("--embedder", metavar="PATH", help="as for index")
    parser.add_argument(
        "--seed",
        type=_NATURAL,
        default=0,
        metavar="N",
        help="of what is held out, the models and what is generated (default: %(default)s)",
    )


def _add_index(parser: _Parser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="folders, text files, .jsonl, .parquet, packed or not (.gz, .xz, .bz2, .zst), - for stdin",
    )
    parser.add_argument("--out", required=True, metavar="SET", help="folder of the retrieval set")
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="SentencePiece model or tokenizer.json (default: one is trained on the text)",
    )
    parser.add_argument(
        "--vocab-size",
        type=_COUNT,
        metavar="N",
        help="entries of the tokenizer that is trained (default: 16,384, or as many as the text supports)",
    )
    parser.add_argument(
        "--embedder",
        metavar="PATH",
        help="folder or name of a BERT, or hashing (default: all-MiniLM-L6-v2; to append, the set's own)",
    )
    parser.add_argument(
        "--embedder-dtype",
        choices=("float32", "bfloat16"),
        help="arithmetic of a BERT, the same for all parts of a set (default: what is fast on the device)",
    )
    parser.add_argument("--index", metavar="FACTORY", help="FAISS factory string (default: chosen by size)")
    parser.add_argument(
        "--trained-index",
        metavar="SET",
        help="train no index, fill the emptied one of that set: parts with the same one are merged list by list",
    )
    parser.add_argument(
        "--tune",
        type=_number(float, above=0, high=1),
        nargs="?",
        const=0.95,
        metavar="RECALL",
        help="find the fastest search setting with this recall@10 (default: 0.95); exit status 2 where none has it",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only such files of folders, by name or relative path: '*.py'; may be given again",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="no such files and folders of folders; may be given again",
    )
    parser.add_argument("--chunk-size", type=_COUNT, metavar="M", help="tokens in a chunk (default: 64)")
    parser.add_argument(
        "--part", metavar="I/N", help="only every N-th document from the I-th (0-based) on, to be merged"
    )
    parser.add_argument(
        "--append", action="store_true", help="add the text to the set SET instead of building one"
    )
    parser.add_argument("--merge", action="store_true", help="the PATHs are sets; join them into SET")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a set made from other text, drop unfinished work on other text",
    )
    _add_device(parser, default=None, help="cpu (default), cuda, cuda:1, or auto: a GPU where there is one")


def _add_search(parser: _Parser) -> None:
    parser.add_argument("text", metavar="TEXT", help="what to find neighbours of")
    _add_set(parser, required=True, help="retrieval set")
    parser.add_argument(
        "-k", type=_COUNT, metavar="N", help="neighbours to show (default: 5, or as many as there are)"
    )
    _add_retriever(parser, "dense")
    _add_device(parser)


def _add_train(parser: _Parser) -> None:
    """The options are the fields of TrainConfig. Those not given stay out of the namespace: --resume keeps
    the old ones."""
    special = {
        "data": {"nargs": "+", "action": "extend", "metavar": "PATH"},
        "model": {"nargs": "+", "action": "extend", "metavar": "FIELD=VALUE"},
        "preset": {"metavar": "NAME", "choices": PRESETS},
        "dtype": {"choices": ("auto", "fp32", "bf16")},
        "out": {"metavar": "RUN"},
        "set": {"metavar": "SET"},
        "retrofit": {"metavar": "RUN"},
        "tokenizer": {"metavar": "MODEL"},
        "neighbours": {"metavar": "FILE"},
        "retriever": {"metavar": "NAME"},
        "device": {"metavar": "D"},
    }
    comments = _field_comments()
    for entry in dataclasses.fields(TrainConfig):
        flag = "--" + entry.name.replace("_", "-")
        options: dict[str, Any] = {"help": comments[entry.name], **special.get(entry.name, {})}  # type: ignore[dict-item]
        if "choices" in options and "metavar" in options:  # which hides what can be chosen
            options["help"] += ": " + ", ".join(options["choices"])
        if entry.default is False:
            options["action"] = "store_true"
        elif entry.name not in special:
            options["type"] = _number(int, 0) if "int" in str(entry.type) else _number(float, 0)
            options["metavar"] = "N" if "int" in str(entry.type) else "X"
        if entry.default is not False and entry.default not in (dataclasses.MISSING, None, ()):
            options["help"] += f" (default: {entry.default})"
        aliases = (
            ["-k"] if entry.name == "num_neighbours" else ["--lr"] if entry.name == "learning_rate" else []
        )
        # a run that goes on has its data noted
        required = entry.default is dataclasses.MISSING and entry.name != "data"
        parser.add_argument(
            flag, *aliases, dest=entry.name, required=required, default=argparse.SUPPRESS, **options
        )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in RUN from its checkpoint, with its own text and options; start where there is none",
    )
    parser.add_argument(
        "--stop-after", type=_COUNT, metavar="N", help="stop with a checkpoint after N steps of this call"
    )


def _field_comments() -> dict[str, str]:
    """The string under each field of TrainConfig. Read from the source, so that help and code cannot disagree."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: comment.value.value.replace("%", "%%")  # type: ignore[union-attr, attr-defined]
        for field, comment in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(comment, ast.Expr)
    }


def _add_eval(parser: _Parser) -> None:
    _add_run(parser)
    _add_text(parser, "--data", help="held-out text")
    _add_set(parser, required=False, help="retrieval set (default: the one trained with)")
    parser.add_argument("-k", type=_COUNT, metavar="N", help="neighbours of each chunk (default: as trained)")
    _add_retriever(parser)
    parser.add_argument(
        "--window", type=_COUNT, metavar="N", help="tokens in a window (default: the training sequence)"
    )
    parser.add_argument(
        "--stride", type=_COUNT, metavar="N", help="tokens between windows (default: half a window)"
    )
    parser.add_argument(
        "--batch-size", type=_COUNT, default=8, metavar="N", help="windows at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=_NATURAL,
        default=0,
        metavar="N",
        help="of the shuffled neighbours, and of the retriever random (default: %(default)s)",
    )
    parser.add_argument("--plot", metavar="PNG", help="draw bits per byte against the leakage filter")
    _add_dtype(parser, "fp32 on a CPU, bf16 on a GPU that multiplies in it")
    _add_device(parser)


def _add_generate(parser: _Parser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from stdin")
    _add_run(parser)
    _add_set(parser, required=False, help="retrieval set (default: the one trained with)")
    parser.add_argument(
        "--max-tokens",
        type=_COUNT,
        default=200,
        metavar="N",
        help="how many to generate at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, low=0),
        default=0.8,
        metavar="T",
        help="0: the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=_COUNT, metavar="N", help="sample from the N likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=_number(float, above=0, high=1),
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (default: all)",
    )
    parser.add_argument(
        "--seed", type=_NATURAL, default=0, metavar="N", help="of what is drawn (default: %(default)s)"
    )
    parser.add_argument("-k", type=_COUNT, metavar="N", help="neighbours of each chunk (default: as trained)")
    _add_retriever(parser)
    parser.add_argument(
        "--ignore-end", action="store_true", help="go on where the model would end the document"
    )
    parser.add_argument(
        "--show-neighbours", action="store_true", help="print what was retrieved for each chunk"
    )
    _add_dtype(parser, "bf16 where the device multiplies in it")
    _add_device(parser)


def _add_neighbours(parser: _Parser) -> None:
    _add_text(parser, "--data", help="text that will be trained on")
    _add_set(parser, required=True, help="retrieval set")
    parser.add_argument("--out", required=True, metavar="FILE", help="file of neighbours")
    parser.add_argument(
        "--per-chunk",
        type=_COUNT,
        default=16,
        metavar="N",
        help="neighbours kept of each chunk, more "
        "than are used, for other documents to be dropped (default: %(default)s)",
    )
    _add_retriever(parser, "dense", "dense, bm25, bm25:tokens or random")
    _add_device(parser)


def _add_dedup(parser: _Parser) -> None:
    _add_text(parser, "--data", help="training text")
    _add_text(parser, "--against", help="evaluation text")
    parser.add_argument(
        "--out",
        metavar="JSONL",
        help="write the training documents that are no copies; interrupted, the same command goes on",
    )
    parser.add_argument(
        "--threshold",
        type=_number(float, above=0, high=1),
        default=0.8,
        metavar="J",
        help="Jaccard index of 13-grams from which on a document counts as a copy (default: %(default)s)",
    )


def _print_json(values: Any) -> None:
    print(json.dumps(values, ensure_ascii=not _prints_unicode()))


def _info(args: argparse.Namespace) -> None:
    from . import info

    if args.set is not None:
        held = info.of_set(args.set)
        _print_json(held) if args.json else print(
            "\n".join(f"{name}: {value}" for name, value in held.items())
        )
        return
    found = info.collect()
    _print_json(found) if args.json else print(info.table(found))


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    options = {name: getattr(args, name) for name in ("corpus", "steps", "embedder", "seed")}
    try:
        result = demo(args.out, **options)
    except KeyboardInterrupt as stopped:
        given = [(name, value) for name, value in {"out": args.out, **options}.items() if value]
        words = [PROG, "demo", *(word for name, value in given for word in (f"--{name}", str(value)))]
        message = str(stopped) or "Interrupted."
        raise KeyboardInterrupt(f"{message} Continue with: {shlex.join(words)}") from None
    _print_json(result) if args.json else print(result["report"])


_INDEX_UNUSED = (
    (
        "append",
        "the set has its own",
        ("tokenizer", "vocab_size", "index", "trained_index", "chunk_size", "embedder_dtype"),
    ),
    (
        "merge",
        "the sets are joined as they are",
        (
            *("tokenizer", "vocab_size", "trained_index", "embedder", "embedder_dtype"),
            *("include", "exclude", "chunk_size"),
        ),
    ),
)
"""Options of `index` that say nothing with --append or --merge, and why."""


def _index(args: argparse.Namespace) -> None:
    from . import retrieval

    if args.append + args.merge + (args.part is not None) > 1:
        raise InputError("--append, --merge and --part exclude one another.")
    for mode, reason, options in _INDEX_UNUSED:
        given = [name for name in options if getattr(args, name) not in (None, [])]
        if getattr(args, mode) and given:
            raise InputError(f"--{given[0].replace('_', '-')} does not go with --{mode}: {reason}.")
    common: dict[str, Any] = {"overwrite": args.overwrite}
    if args.device is not None:
        from .runs import pick_device

        common["device"] = pick_device(args.device)
    reading = {"include": args.include, "exclude": args.exclude, "embedder": args.embedder}
    recall = {} if args.tune is None else {"recall": args.tune}
    if args.append:
        manifest = retrieval.append_to_retrieval_set(args.out, args.paths, **common, **reading)
        if args.tune is not None:
            manifest = retrieval.tune_retrieval_set(args.out, args.tune, device=common.get("device"))
    elif args.merge:
        manifest = retrieval.merge_retrieval_sets(args.paths, args.out, index=args.index, **common, **recall)
    else:
        manifest = retrieval.build_retrieval_set(
            args.paths,
            args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            embedder_dtype=args.embedder_dtype,
            index=args.index,
            trained_index=args.trained_index,
            part=_part(args.part),
            **({} if args.chunk_size is None else {"chunk_size": args.chunk_size}),
            **common,
            **reading,
            **recall,
        )
    index = manifest["index"]
    _print_json(manifest) if args.json else print(
        f"{args.out}: {manifest['num_chunks']:,} chunks of {manifest['num_documents']:,} documents, "
        f"index {index['factory']}, recall@{index['k']} {index['recall']:.3f}"
    )
    if args.tune is not None and not index["reached"]:
        raise InputError(
            f"the set {args.out} is whole and kept, but no search setting of its index {index['factory']} reaches "
            f"--tune {args.tune}: recall@{index['k']} is {index['recall']:.4f}. Give an --index that finds more (Flat "
            "finds all), or ask for less; nothing is embedded again."
        )


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise InputError(f"--part is {text!r}; it must be I/N, such as 0/4.")
    return int(found[1]), int(found[2])


def _search(args: argparse.Namespace) -> None:
    from .retrieval import Retriever
    from .runs import pick_device

    retriever = Retriever.from_pretrained(args.set, device=pick_device(args.device), retriever=args.retriever)
    count = min(5, retriever.num_chunks) if args.k is None else args.k
    retriever.check_num_neighbours(count)
    hits = retriever.search_text(args.text, count)
    if not hits:
        shared = {"bm25": "word", "bm25:tokens": "token"}.get(args.retriever.partition("+")[0])
        why = (
            f": no chunk shares a {shared} with the text. --retriever dense finds by meaning"
            if shared
            else ""
        )
        _complain(f"{PROG} search", f"no neighbour{why}")
    if args.json:
        _print_json({"text": args.text, "neighbours": [hit.to_dict() for hit in hits]})
        return
    for rank, hit in enumerate(hits, 1):
        print(f"{rank}. {hit.title}  (chunk {hit.chunk:,}, distance {hit.distance:.3f})")
        print("\n".join("   │ " + line for line in hit.text.strip("\n").splitlines()))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _keep_memory(device: str) -> None:
    """Memory that a step on a CPU gives back stays with the process, for the next one: before the system gives it again
    it clears every page, which takes a good part of a step.

    Of glibc's allocator alone, and only where the environment does not set it."""
    import ctypes

    import torch

    if device != "cpu" and torch.cuda.is_available():
        return
    if not {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}.isdisjoint(os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system's library
        mallopt = ctypes.CDLL(None).mallopt
        # before glibc 2.35 half a heap at most, without which the other setting does harm
        if mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _train(args: argparse.Namespace) -> None:
    from pathlib import Path

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    counted = "num_neighbours" in given
    if args.resume:
        from .runs import SETTINGS, resumed

        folder = Path(args.out)
        if (folder / SETTINGS).exists():  # what is given is to make sense together with what the run has
            given = resumed(folder, given)
    if "data" not in given:
        raise InputError(
            "train: --data is missing. Give folders or files of text; only a run that --resume continues has its own."
        )
    config = TrainConfig.from_dict(given)
    # of what was given alone: a plain decoder's run has a number noted, too
    if counted and not config.set:
        raise InputError("train: num_neighbours needs a retrieval set (--set).")
    if config.set is None and parse_overrides(config.model).get("cca_layers") and _speaks():
        told = "without --set the plain decoder is trained; its cca_layers are those of a later --retrofit"
        _complain(f"{PROG} train", told)
    from .train import train

    _keep_memory(config.device)
    summary = train(config, resume=args.resume, stop_after=args.stop_after)
    if not _speaks():
        return
    if args.json:
        _print_json(summary)
        return
    # neither is in the summaries of earlier versions
    from_file, without = summary.get("neighbours_from_file"), summary.get("without_neighbours")
    print(
        f"{summary['run']}: step {summary['steps']:,}, loss {summary['loss']:.4f}, "
        f"{summary['parameters']:,} parameters, "
        f"{summary['tokens_per_second']:,.0f} tokens/s in {summary['dtype']}, {summary['stall_share']:.1%} of the time "
        f"waiting for {'neighbours' if config.set else 'data'}"
        + ("" if without is None else f", {without:.1%} of the chunks without a neighbour")
        + ("" if from_file is None else f", {from_file:.1%} of the neighbours from {config.neighbours}")
        if summary["seconds"]
        else f"{summary['run']}: nothing left to do at step {summary['steps']:,}"
    )


def _eval(args: argparse.Namespace) -> None:
    from .evaluate import evaluate, table

    _keep_memory(args.device)
    result = evaluate(
        _run(args),
        args.data,
        set=args.set,
        num_neighbours=args.k,
        retriever=args.retriever,
        batch_size=args.batch_size,
        plot=args.plot,
        window=args.window,
        stride=args.stride,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
    )
    _print_json(result) if args.json else print(table(result))


def _generate(args: argparse.Namespace) -> None:
    from .evaluate import check_plain
    from .generate import generate, show_chunks

    as_seed("generate", args.seed)  # what is wrong with the others the parser has said
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt on stdin is not UTF-8 (byte {error.start:,}). Convert it to UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"the prompt on stdin cannot be read: {error.strerror or error}.") from None

    run = _run(args, opened=args.show_neighbours)
    if args.show_neighbours and not run.model.config.cca_layers:
        check_plain("generate", run, {"--show-neighbours": True})
    shown: list[str] = []

    def show(text: str) -> None:  # the prompt comes with the first word, when all has been found usable
        print(text if shown else prompt + text, end="", flush=True)
        shown.append(text)

    result = generate(
        run,
        prompt,
        set=args.set,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        num_neighbours=args.k,
        retriever=args.retriever,
        ignore_end=args.ignore_end,
        device=args.device,
        dtype=args.dtype,
        on_text=None if args.json else show,
    )
    if args.json:
        _print_json(result)
        return
    print("" if shown else prompt)
    if args.show_neighbours:
        print(show_chunks(result["chunks"]))


def _neighbours(args: argparse.Namespace) -> None:
    from .retrieval import Retriever
    from .retrieval.neighbours import check_out, check_retriever, precompute
    from .runs import pick_device, progress_bar, text_of

    check_out(args.out)
    retriever = Retriever.from_pretrained(args.set, device=pick_device(args.device), retriever=args.retriever)
    check_retriever(retriever)
    text = text_of(args.data, None, "neighbours: there is no text to find any of", True)
    corpus = text.tokenise(retriever.tokenizer, retriever.chunk_size)
    documents = retriever.find_documents(corpus.hashes).numpy()[corpus.of_chunks()]
    with progress_bar(len(corpus.chunks), "searching", "chunk") as bar:
        result = precompute(
            retriever, corpus.chunks, documents, args.out, per_chunk=args.per_chunk, progress=bar.update
        )
    _print_json(result) if args.json else print(
        f"{args.out}: neighbours of {result['rows']:,} chunks, {result['per_chunk']} for each; "
        f"{result['filled']:.1%} of the places are filled, {result['without_neighbours']:.1%} of the chunks have none"
    )


def _dedup(args: argparse.Namespace) -> None:
    from .retrieval.dedup import deduplicate

    result = deduplicate(args.data, args.against, out=args.out, threshold=args.threshold)
    if args.json:
        _print_json(result)
        return
    for copy in result["copies"]:
        print(f"{copy['jaccard']:.3f}  {copy['title']}  copies  {copy['against']}")
    skipped = sum(result["skipped"].values())
    print(
        f"{len(result['copies']):,} of {result['documents']:,} documents are copies"
        + (f"; {skipped:,} were left out" if skipped else "")
    )


def _bench(args: argparse.Namespace) -> None:
    import subprocess
    from pathlib import Path

    script = Path(__file__).resolve().parent.parent / "bench" / "run.py"
    if not script.exists():
        raise InputError(
            "bench runs in a checkout of the repository, where the folder bench/ is; this is an installed package."
        )
    command = [
        sys.executable,
        str(script),
        "-k",
        args.k,
        *(["--out", args.out] if args.out else []),
        *(["--quick"] if args.quick else []),
    ]
    if status := subprocess.run(command).returncode:
        raise InputError(
            "no benchmark matches." if status == 5 else f"a benchmark failed (exit status {status})."
        )


if __name__ == "__main__":
    raise SystemExit(main())
