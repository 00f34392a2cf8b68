"""Measure the loss layer, and make tables and figures of what was measured.

    python -m launch.benchmark run --model llama3-8b --out runs/bench.jsonl
    python -m launch.benchmark run --suite standard --out runs/standard.jsonl
    torchrun --nproc-per-node 4 -m launch.benchmark run --model llama3-8b --out runs/tp4.jsonl
    python -m launch.benchmark profile --model llama3-8b --implementations cce-tp-exact
    python -m launch.benchmark table runs/*.jsonl
    python -m launch.benchmark plot runs/*.jsonl --out-dir runs/figures

`run` compares every implementation that is installed: first with fp32 (who is wrong is reported
and not timed), then in time, in units of one E @ C^T by the vendor library at the same shape in
the same run, and in memory. `profile` says of a step which kernels its time goes to, and when none
ran. Both need neither matplotlib nor a GPU; on a CPU they are only good to try them.
docs/benchmarks.md says what is counted, launch/benchmark/records.py what is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from launch.benchmark.catalogue import (
    DEFAULT_TOKENS,
    DTYPES,
    IDS,
    IMPLEMENTATIONS,
    INPUTS,
    MODELS,
    Case,
    Options,
    Shape,
    parse_implementations,
    parse_shard,
    parse_sizes,
    played_cases,
)
from launch.benchmark.suites import SUITES, suite

_OPTION_FLAGS = tuple(Options.__slots__)
_SECONDS, _RUNS = 0.5, 10
_HOW_TO_GO_ON = """This process cannot use it any more. The same command with --resume goes on
with what is not in the file of --out."""
_PACKAGES = {
    "run": ("tqdm", "tabulate"),
    "profile": ("tqdm", "tabulate"),
    "table": ("tabulate",),
    "plot": ("matplotlib",),
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line, and the caller's to print."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = "\n".join(f"  {name:18} {text}" for name, text in IMPLEMENTATIONS.items())
    root = _Parser(
        prog="python -m launch.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True)
    for command, add, text in (
        ("run", _add_run_arguments, "measure, and write one record per implementation and case"),
        ("profile", _add_profile_arguments, "account for a step by kernels, and write the same"),
    ):
        each = commands.add_parser(
            command,
            help=text,
            epilog=f"implementations:\n{names}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_case_arguments(each)
        add(each)
    table = commands.add_parser("table", help="records as Markdown, on standard output")
    table.add_argument("files", nargs="+", metavar="FILE")
    plot = commands.add_parser("plot", help="records as figures")
    plot.add_argument("files", nargs="+", metavar="FILE")
    plot.add_argument("--out-dir", required=True, metavar="DIR")
    plot.add_argument("--format", choices=("png", "svg"), default="png")
    return root


def _add_case_arguments(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what is measured (any number of shapes)")
    add = what.add_argument
    add("--model", action="append", default=[], metavar="NAME", help=", ".join(MODELS))
    add("--shape", action="append", default=[], metavar="N,D,V", help="tokens, hidden, vocabulary")
    add("--suite", action="append", default=[], metavar="NAME", help=", ".join(SUITES))
    add("--snapshot", metavar="PATH", help="file of a trained model, or folder of --cce-capture")
    add("--tokens", type=int, metavar="N", help=f"of a model ({DEFAULT_TOKENS}) or snapshot (all)")
    add("--inputs", choices=INPUTS, help="made-up inputs (random)")
    add("--seed", type=int, default=0, help="of made-up inputs (0)")
    add("--dtype", choices=DTYPES, help="of inputs (bf16)")
    add("--tf32", action="store_true", help="fp32 products in TF32")
    add("--shard", metavar="r/W", help="only the rows of rank r of W, without a group")
    add("--shards-of", type=int, metavar="W", help="each rank of a group of W, played in turn")
    add("--ids", metavar="ORDER,...", help=f"on the ranks of --shards-of: {', '.join(IDS)}")
    add("--tensor-parallel", metavar="W,...", help="ranks that hold the vocabulary (all there are)")
    add("--sequence-parallel", action="store_true", help="each rank holds a part of the tokens")
    add("--implementations", metavar="NAME,...", help="default: all; names below")
    loss = command.add_argument_group("options of the loss")
    add = loss.add_argument
    add("--bias", action="store_true", help="add a bias to the logits")
    add("--softcap", type=float, metavar="X")
    add("--z-loss", type=float, metavar="X", default=0.0)
    add("--label-smoothing", type=float, metavar="X", default=0.0)
    add("--statistics", action="store_true", help="of the logits, beside the loss")
    add("--grad-weight-out", action="store_true", help="dC is added to a given fp32 tensor")
    add("--workspace-mib", type=float, metavar="X", help="cap on this library's temporaries")
    add(
        "--keep-logits-mib",
        type=float,
        metavar="X",
        default=0.0,
        help="logits that this library's exact filter keeps for the backward pass (0)",
    )
    add(
        "--keep-logits-in-grad",
        action=argparse.BooleanOptionalAction,
        help="as many as fit dC's memory, the far field fewer (default: where it can be)",
    )
    add("--forward-only", action="store_true")
    out = command.add_argument_group("what is written")
    add = out.add_argument
    add("--out", metavar="FILE", help="JSON lines; records are added to it")
    add("--resume", action="store_true", help="leave out what FILE has of this revision already")
    add("--commit", metavar="REV", help="revision to record where there is no git checkout")


def _add_run_arguments(run: argparse.ArgumentParser) -> None:
    add = run.add_argument_group("how").add_argument
    add(
        "--seconds-per-case",
        type=float,
        default=_SECONDS,
        metavar="S",
        help=f"of measuring for each of forward, and forward + backward ({_SECONDS})",
    )
    add("--host-time", action="store_true", help="also the host's time per call")


def _add_profile_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("how").add_argument
    add("--runs", type=int, default=_RUNS, metavar="R", help=f"of the step ({_RUNS})")
    command.set_defaults(seconds_per_case=_SECONDS, host_time=False)


def cases(args: argparse.Namespace, snapshot: Any, world_size: int) -> list[Case]:
    """What the command line asks for.

    Args:
        args: of `run` or `profile`.
        snapshot: what `--snapshot` names, or None.
        world_size: ranks that measure together.

    Raises:
        ValueError: flags that do not fit together, or a value outside its range.
    """
    if args.tokens is not None and args.tokens < 1:
        raise ValueError(f"--tokens: expected a positive integer, got {args.tokens}")
    if not args.seconds_per_case > 0:
        raise ValueError(f"--seconds-per-case: expected a number > 0, got {args.seconds_per_case}")
    for flag, given in (("--shard", args.shard), ("--shards-of", args.shards_of)):
        if given is not None and world_size > 1:
            raise ValueError(f"{flag}: expected one process, got {world_size} ranks")
    if args.shards_of is not None and args.shard:
        raise ValueError("--shards-of: expected without --shard")
    if args.shards_of is None and args.ids:
        raise ValueError("--ids: expected together with --shards-of")
    options = Options(**{name: getattr(args, name) for name in _OPTION_FLAGS})
    names = parse_implementations(args.implementations)
    if args.suite:
        return _suite_cases(args, options, names, world_size)
    common: dict[str, Any] = {
        "dtype": args.dtype or "bf16",
        "tf32": args.tf32,
        "options": options,
        "shard": parse_shard(args.shard) if args.shard else None,
        "sequence_parallel": args.sequence_parallel,
        "host_time": args.host_time,
        "implementations": names,
    }
    sizes = _team_sizes(args, world_size)
    if snapshot is not None:
        if args.model or args.shape or args.inputs:
            raise ValueError("--snapshot: expected without --model, --shape and --inputs")
        shape = snapshot.shape
        shape = Shape(min(args.tokens or shape.tokens, shape.tokens), shape.hidden, shape.vocab)
        found = [Case(shape=shape, inputs="snapshot", ranks=size, **common) for size in sizes]
        return _played(args, found)
    common["inputs"] = args.inputs or "random"
    tokens = args.tokens or DEFAULT_TOKENS
    found = [Case(shape=Shape.of_model(name, tokens), name=name, **common) for name in args.model]
    found += [Case(shape=Shape.parse(text), **common) for text in args.shape]
    found = [replace(case, ranks=size) for case in found for size in sizes]
    if not found:
        raise ValueError("--model, --shape, --snapshot or --suite: expected one of them, got none")
    return _played(args, found)


def _played(args: argparse.Namespace, found: list[Case]) -> list[Case]:
    if args.shards_of is None:
        return found
    return [each for case in found for each in played_cases(case, args.shards_of, args.ids)]


def _team_sizes(args: argparse.Namespace, world_size: int) -> tuple[int | None, ...]:
    if args.tensor_parallel is None and not args.sequence_parallel:
        return (None,)
    sizes = (world_size,)
    if args.tensor_parallel is not None:
        sizes = parse_sizes(args.tensor_parallel)
    for size in sizes:
        if world_size % size:
            raise ValueError(
                f"--tensor-parallel: expected sizes that divide the {world_size} ranks, got {size}"
            )
    if args.sequence_parallel and 1 in sizes:
        raise ValueError("--sequence-parallel: expected several ranks to a vocabulary, got 1")
    return sizes


def _suite_cases(
    args: argparse.Namespace, options: Options, names: tuple[str, ...] | None, world_size: int
) -> list[Case]:
    given = {
        **{"--model": args.model, "--shape": args.shape, "--snapshot": args.snapshot},
        **{"--tokens": args.tokens, "--dtype": args.dtype, "--tf32": args.tf32},
        **{"--shard": args.shard, "--host-time": args.host_time},
        **{"--shards-of": args.shards_of, "--ids": args.ids},
        **{"--tensor-parallel": args.tensor_parallel},
        **{"--sequence-parallel": args.sequence_parallel},
        **{f"--{name.replace('_', '-')}": True for name in options.changed()},
    }
    for flag, value in given.items():
        if value:
            raise ValueError(f"{flag}: expected without --suite, which says it itself")
    found = [case for name in dict.fromkeys(args.suite) for case in suite(name)]
    kept = []
    for case in found:
        own = case.implementations or tuple(IMPLEMENTATIONS)
        chosen = own if names is None else tuple(name for name in own if name in names)
        # What one rank's rows cost without the others is not a question to a group.
        together = world_size % (case.ranks or 1) == 0 and not (case.shard and world_size > 1)
        if chosen and together:
            kept.append(replace(case, implementations=chosen, inputs=args.inputs or case.inputs))
    if not kept:
        raise ValueError("--implementations: expected one that the suite measures, got none")
    return kept


def run(args: argparse.Namespace) -> int:
    """Measure, or profile; writes and shows on rank 0 alone.

    Returns:
        The exit status: 1 if a GPU was lost on the way.

    Raises:
        ValueError: what was asked for cannot be measured.
    """
    from tqdm import tqdm

    from launch.benchmark import inputs, machine, records, tables
    from launch.benchmark.outcome import DeviceLost
    from launch.benchmark.parallel import World
    from launch.benchmark.session import Session

    world = World.from_environment()
    snapshot = inputs.load(args.snapshot) if args.snapshot and not args.suite else None
    plan = cases(args, snapshot, world.size)
    profiling = args.command == "profile"
    if args.resume and not args.out:
        raise ValueError("--resume: expected together with --out, whose records it looks at")
    if profiling and args.runs < 1:
        raise ValueError(f"--runs: expected a positive integer, got {args.runs}")
    first, commit = world.rank == 0, args.commit or machine.commit()
    if args.out and first:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    total = sum(len(case.implementations or IMPLEMENTATIONS) for case in plan)
    with world, tqdm(total=total, unit="row", disable=None if first else True) as bar:
        session = Session(
            world,
            seconds=args.seconds_per_case,
            seed=args.seed,
            snapshot=snapshot,
            commit=commit,
        )
        kind = "profile" if profiling else "timing"
        done = _done(args, commit, world)
        for case in plan:
            given = list(case.implementations or IMPLEMENTATIONS)
            names = [name for name in given if session.key(case, name, kind) not in done]
            bar.update(len(given) - len(names))
            if not names:
                continue
            rows, lost = [], None
            measured = session.measure(case, names)
            if profiling:
                measured = session.profile(case, names, args.runs)
            try:
                for record in measured:
                    rows.append(record)
                    bar.set_description(f"{case.shape} {record['implementation']}", refresh=False)
                    bar.update()
                    if args.out and first:
                        records.append(Path(args.out), record)
            except DeviceLost as error:
                lost = error
            if first and rows:
                shown = [records.clean(record) for record in rows]
                heading = f"{records.case_label(shown[0])}; {records.source_label(shown[0])}"
                bar.write(f"\n{heading}\n{tables.terminal(shown)}", file=sys.stdout)
            if lost is not None:
                world.abandon()
                if first:
                    how = "" if lost.name is None else f"\n{_HOW_TO_GO_ON}"
                    print(f"launch.benchmark: the GPU was lost to {lost}{how}", file=sys.stderr)
                return 1
    return 0


def _done(args: argparse.Namespace, commit: str | None, world: Any) -> set[str]:
    """Keys of what the file has already, for all ranks as the first one finds it.

    Raises:
        ValueError: on all ranks, if the file holds something else than records.
    """
    from launch.benchmark import records

    if not args.resume:
        return set()
    if commit is None or commit.endswith("-dirty"):
        raise ValueError(
            f"--resume: expected a revision without changes, or --commit, got {commit}"
        )
    found: set[str] | str = set()
    if world.rank == 0:
        try:
            found = records.finished(Path(args.out))
        except ValueError as error:
            found = str(error)
    found = world.gather(found)[0]
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _require(*packages: str) -> None:
    """Say what is not installed before anything is measured, not after."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{package}: expected to be installed (pip install 'cce-tp[bench]'), got none"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        args = parser().parse_args(arguments)
        _require(*_PACKAGES[args.command])
        if args.command in ("run", "profile"):
            return run(args)
        from launch.benchmark import records

        found = records.read(args.files)
        if args.command == "table":
            from launch.benchmark import tables

            print(tables.markdown(found))
        else:
            from launch.benchmark import figures

            for line in figures.draw(found, Path(args.out_dir), args.format):
                print(line)
    except ValueError as error:
        print(f"launch.benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
