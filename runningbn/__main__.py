"""The command line: ``python -m runningbn COMMAND``.

Each command is one `Command`: its name, its help, its arguments and the function that runs it. That function imports
what the command needs, so that ``--help`` and the other commands work without its extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C (128 + SIGINT)
USAGE_ERROR = 2  # what argparse exits with


@dataclass(frozen=True)
class Command:
    """One subcommand. ``run`` returns the exit status; ``modules`` are the imports that ``runningbn[extra]`` brings."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    extra: str = ""
    modules: tuple[str, ...] = ()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _writable(text: str) -> Path:
    """A path whose folder exists: told before minutes of training rather than after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def _png(text: str) -> Path:
    path = _writable(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return path


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="fewer seeds and fewer steps: a look, not a measurement")
    parser.add_argument(
        "--output", type=_png, default=Path("runningbn-demo.png"), metavar="PATH.png", help="the figure"
    )
    parser.add_argument("--seeds", type=_positive, metavar="K", help="runs per contender (default: 3, with --quick 1)")
    parser.add_argument(
        "--json", type=_writable, metavar="PATH", help="also write settings and every run's numbers here"
    )


def _run_demo(arguments: argparse.Namespace) -> int:
    from runningbn.demo import run_demo

    run_demo(quick=arguments.quick, output=arguments.output, seeds=arguments.seeds, json_output=arguments.json)
    return 0


def _add_no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _run_backends(arguments: argparse.Namespace) -> int:
    from runningbn import kernels

    rows = [("backend", "version", "takes", "here")]
    for name, backend in kernels.BACKENDS.items():
        reason = backend.unavailable()
        rows.append((name, backend.version() or "-", kernels.TAKES[name], f"no: {reason}" if reason else "yes"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    forced = kernels.forced_backend()
    print(f"\n{forced!r} is forced." if forced else "\nThe first that can takes an input.")
    print("torch.compile traces plain torch operations and fuses them itself.")
    return 0


COMMANDS = (
    Command(
        name="demo",
        help="train on handwritten digits with tiny batches: nn.BatchNorm, GroupNorm and RunningBatchNorm",
        add_arguments=_add_demo_arguments,
        run=_run_demo,
        extra="demo",
        modules=("matplotlib", "rich", "sklearn"),
    ),
    Command(
        name="backends",
        help="list the kernels, with their versions and the reason why one cannot be used here",
        add_arguments=_add_no_arguments,
        run=_run_backends,
    ),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runningbn", description="BatchNorm for small and correlated batches."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command.run(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in command.modules:
            raise
        remedy = f"pip install 'runningbn[{command.extra}]'"
        print(f"runningbn {command.name} needs {missing}, which is not installed: {remedy}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
