"""The command line: ``python -m runningbn COMMAND``.

Each command is a `Command`: its name, its help, its arguments and the function that runs it. That function imports the
packages of the command, so that ``--help`` and the other commands work without its extra.

Exit statuses: 0 for success; 1 if ``inspect``, ``diff`` or ``diagnose`` found something, as defined in their help; 2
for wrong arguments, a file that cannot be read, code that fails or a package that is not installed; 130 after Ctrl-C;
141 if the reader of a pipe has closed it.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runningbn.inspection.criteria import CRITERIA
from runningbn.inspection.errors import CheckpointError
from runningbn.inspection.reading import Source
from runningbn.recalibration.text import positive_integer

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C (128 + SIGINT)
PIPE_CLOSED = 141  # what it reports for a program that wrote to a closed pipe (128 + SIGPIPE)
USAGE_ERROR = 2  # what argparse exits with


@dataclass(frozen=True)
class Command:
    """One subcommand. ``run`` returns the exit status; ``modules`` are the modules of ``runningbn[extra]``."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    extra: str = ""
    modules: tuple[str, ...] = ()


def _writable(text: str) -> Path:
    """A path whose folder exists; checked before the training instead of after it."""
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
    parser.add_argument(
        "--seeds", type=positive_integer, metavar="K", help="runs per contender (default: 3, with --quick 1)"
    )
    parser.add_argument(
        "--json", type=_writable, metavar="PATH", help="also write settings and every run's numbers here"
    )


def _run_demo(arguments: argparse.Namespace) -> int:
    from runningbn.demo.command import run_demo

    run_demo(quick=arguments.quick, output=arguments.output, seeds=arguments.seeds, json_output=arguments.json)
    return 0


def _add_diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    from runningbn.diagnosis.command import add_arguments

    add_arguments(parser)


def _run_diagnose(arguments: argparse.Namespace) -> int:
    from runningbn.diagnosis.command import run

    return run(arguments)


def _add_no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _run_backends(arguments: argparse.Namespace) -> int:
    from runningbn import kernels
    from runningbn.kernels import cpu, cpu_step

    rows = [("backend", "version", "takes", "here")]
    for name, backend in kernels.BACKENDS.items():
        reason = backend.unavailable()
        rows.append((name, backend.version() or "-", kernels.TAKES[name], f"no: {reason}" if reason else "yes"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    forced = kernels.forced_backend()
    print(f"\n{forced!r} is forced." if forced else "\nThe first backend that supports an input is used.")
    if cpu.unavailable() is None:
        reason = cpu_step.unavailable()
        print(f"Steps on the CPU are prepared in {f'Python, which takes longer: {reason}' if reason else 'C'}.")
    print("torch.compile traces plain torch operations and fuses them itself.")
    return 0


CHECKPOINT_HELP = (
    "a file of torch.save or safetensors, a pickle of numpy arrays, an index of shards, a folder of save_pretrained or "
    "torch.distributed.checkpoint; FILE:KEY for a part of it, such as last.pth:state_dict_ema"
)

INSPECT_EPILOG = """\
Criteria:

{criteria}

Exit status: 0 without errors (there may be warnings), 1 with errors, which make evaluation wrong,
2 for a file that cannot be read or has no BatchNorm statistics."""

DIFF_EPILOG = """\
The numbers are those of the report of update_bn_stats, with A as old and B as new:
mean moved/std is |mean_B - mean_A| / sqrt(var_B + eps), var B/A the ratio of the variances.

Exit status: 0 if all layers were compared, however far they moved, 1 if some could not be (a layer in only
one of the two, different channels, numbers that are not finite), 2 for a file that cannot be read."""


def _described(name: str, severity: str, sentence: str) -> str:
    return textwrap.fill(f"{name} ({severity}): {sentence}", 96, initial_indent="  ", subsequent_indent="      ")


def _eps(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def _add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eps", type=_eps, help="of the layers, which only models saved whole hold (default: theirs, or 1e-5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Source.parse, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    _add_reading_arguments(parser)
    criteria = "\n".join(_described(each.name, each.severity, each.sentence) for each in CRITERIA)
    parser.epilog = INSPECT_EPILOG.format(criteria=criteria)


def _run_inspect(arguments: argparse.Namespace) -> int:
    from runningbn.inspection.commands import run_inspect

    return run_inspect(arguments.checkpoint, eps=arguments.eps, as_json=arguments.json)


def _add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Source.parse, metavar="A", help=CHECKPOINT_HELP)
    parser.add_argument("b", type=Source.parse, metavar="B", help="another")
    _add_reading_arguments(parser)
    parser.epilog = DIFF_EPILOG


def _run_diff(arguments: argparse.Namespace) -> int:
    from runningbn.inspection.commands import run_diff

    return run_diff(arguments.a, arguments.b, eps=arguments.eps, as_json=arguments.json)


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
        name="inspect",
        help="check the BatchNorm statistics in a checkpoint, without the code of its model",
        add_arguments=_add_inspect_arguments,
        run=_run_inspect,
        extra="cli",
        modules=("rich", "safetensors"),
    ),
    Command(
        name="diff",
        help="show how far the BatchNorm statistics moved from one checkpoint to another",
        add_arguments=_add_diff_arguments,
        run=_run_diff,
        extra="cli",
        modules=("rich", "safetensors"),
    ),
    Command(
        name="diagnose",
        help="test whether a model evaluates badly because of its BatchNorm layers; imports and runs your code",
        add_arguments=_add_diagnose_arguments,
        run=_run_diagnose,
    ),
    Command(
        name="backends",
        help="list the kernels, with their versions, and why one cannot be used on this machine",
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
        status = command.run(arguments)
        sys.stdout.flush()
        return status
    except CheckpointError as error:
        print(f"runningbn {command.name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # Discard buffered output; otherwise flushing it at exit raises again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
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
