"""The command line: `ulr-snn train|evaluate|compare|plan|diagnose|report`, also as `python -m ulr_snn`.

A wrong use ends with one line on stderr and exit code 2. A run that diverged, found no room on the disk or lost a
process of its loader ends with one line and 1, one that Ctrl-C or SIGTERM ended with one line and 130 or 143. Arguments
are parsed before torch is imported, which takes seconds.
"""

import argparse
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

import ulr_snn
from ulr_snn.errors import LoaderError, OwnError, RankError, SaveError, Terminated, UsageError
from ulr_snn.errors.arguments import Count, Draws, FilePath, Interval, Positive, Threads, Whole, typed

# What errors advise, and what a command line has in its place.
OPTIONS = {
    "resume='changed'": "--changed",
    "resume=True and run_dir=": "--resume --run-dir ",
    " root=": " --data-root",
    "download=True": "--download",
    "an even number or antithetic=False": "an even number",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    own: Exception | None = None
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if (getattr(args, "resume", False) or getattr(args, "changed", False)) and args.run_dir is None:
            args.parser.error("--resume needs the --run-dir of the run that is to go on")
        with _ended_by_interrupt(argv is None):
            from ulr_snn.runs.commands import run
        run(args)
    except OwnError as raised:
        own = raised.error
    except KeyboardInterrupt as error:
        return _fail(_advised(error) or "interrupted", 130)
    except Terminated as error:
        return _fail(_advised(error), 143)
    except (FloatingPointError, SaveError, LoaderError, RankError) as error:  # of which a traceback would not tell more
        return _fail(_advised(error), 2 if isinstance(error, UsageError) else 1)
    except (UsageError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _fail(_advised(error), 2)
    if own is not None:  # here, where no other exception is added to its traceback
        raise own
    return 0


def _advised(error: BaseException) -> str:
    """Returns the sentence of an error, with the options of this command line in place of arguments of Python's."""
    text = ". ".join([str(error), *getattr(error, "__notes__", [])])
    for ours, option in OPTIONS.items():
        text = text.replace(ours, option)
    return re.sub(r"(?<![/\w-])run_dir(?=[ ,:;])", "--run-dir", text)


@contextmanager
def _ended_by_interrupt(whole: bool) -> Iterator[None]:
    """Ends the process at once at Ctrl-C inside the context, where libraries load that may swallow KeyboardInterrupt.

    whole: the process runs this command alone. Otherwise nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    if not whole or before is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return

    def end(*_: object) -> NoReturn:
        os.write(2, b"ulr-snn: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, code: int) -> int:
    print(f"ulr-snn: {' '.join(message.split())}", file=sys.stderr)
    return code


# --- arguments


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong uses in one line and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message} (see {self.prog} --help)", 2))


class _Versions(argparse.Action):
    """Prints the versions on which a result depends, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        others = f"torch {version('torch')}, numpy {version('numpy')}, Python {platform.python_version()}"
        print(f"ulr-snn {ulr_snn.__version__} ({others})")
        raise SystemExit(0)


def _path(text: str) -> Path:
    return Path(typed(FilePath)(text))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ulr-snn", description="Trains spiking neural networks by likelihood ratios.")
    parser.add_argument("--version", action=_Versions, nargs=0, help="print the versions of this, torch, NumPy, Python")
    commands = parser.add_subparsers(required=True, metavar="train|evaluate|compare|plan|diagnose|report")

    _add_train(commands.add_parser("train", help="train a network and evaluate it on the test set"))

    evaluate = commands.add_parser("evaluate", help="evaluate a trained network on the test set")
    evaluate.set_defaults(command="evaluate", parser=evaluate)
    evaluate.add_argument("run_dir", type=_path, metavar="RUN_DIR", help="what `ulr-snn train` wrote")
    evaluate.add_argument("--mode", choices=("deterministic", "stochastic"), default="deterministic")
    evaluate.add_argument(
        "--copies", type=typed(Count), default=1, metavar="K", help="runs of each sample, with stochastic firing"
    )
    evaluate.add_argument("--best", action="store_true", help="weights of the best epoch, not of the last")
    _add_data_root(evaluate)
    _add_machine(evaluate)

    compare = commands.add_parser("compare", help="train a network by several methods, side by side")
    compare.set_defaults(command="compare", parser=compare)
    _add_task(compare, estimator=False)
    compare.add_argument(
        "--methods", nargs="+", default=["ulr", "surrogate"], metavar="METHOD", help="ulr, surrogate, ..."
    )
    compare.add_argument(
        "--lr", type=typed(Positive), nargs="+", metavar="X", help="learning rates, each a training of its own"
    )
    compare.add_argument("--run-dir", type=_path, metavar="DIR", help="default: the next free runs/compare-DATA-NNN")
    _add_length(compare)
    _add_machine(compare)

    plan = commands.add_parser("plan", help="show which parameter gets its gradient how, without training")
    plan.set_defaults(command="plan", parser=plan)
    _add_task(plan)
    plan.set_defaults(threads=None)

    diagnose = commands.add_parser("diagnose", help="measure bias and noise of the estimators' gradients of one batch")
    diagnose.set_defaults(command="diagnose", parser=diagnose)
    _add_task(diagnose, estimator=False)
    diagnose.add_argument("--checkpoint", type=_path, metavar="RUN_DIR", help="weights of a run, in place of new ones")
    diagnose.add_argument("--draws", type=typed(Draws), default=32, metavar="N", help="steps of each estimator")
    diagnose.add_argument("--picture", type=_path, metavar="PNG", help="draws the table into this file")
    diagnose.add_argument("--threads", type=typed(Threads), metavar="N", help="CPU threads (default: PyTorch's)")

    report = commands.add_parser("report", help="write the report of a run, one HTML file")
    report.set_defaults(command="report", parser=report)
    report.add_argument("run_dir", type=_path, metavar="RUN_DIR", help="what `ulr-snn train` wrote")
    report.add_argument("--out", type=_path, metavar="FILE", help="default: RUN_DIR/report.html")
    report.add_argument("--files-only", action="store_true", help="without running the network on test data")
    _add_data_root(report)
    _add_machine(report)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command="train", parser=parser)
    _add_task(parser)
    parser.add_argument("--lr", type=typed(Positive), metavar="X", help="learning rate (default: that of train)")
    parser.add_argument("--run-dir", type=_path, metavar="DIR", help="default: the next free runs/DATA-NNN")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--changed", action="store_true", help="go on with other options than those of its start")
    parser.add_argument(
        "--save-every",
        type=typed(Interval),
        metavar="N",
        help="checkpoints after so many steps, or 30s, 10m, 2h (default: 10m), and after every epoch",
    )
    _add_length(parser)
    _add_machine(parser)


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=typed(Count), default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-steps", type=typed(Count), metavar="N", help="stop after so many steps")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="without progress bars")


def _add_task(parser: argparse.ArgumentParser, estimator: bool = True) -> None:
    parser.add_argument("data", metavar="DATA", help="digits (needs no download), nmnist, shd, ... (see docs/data.md)")
    _add_data_root(parser)
    parser.add_argument("--download", action="store_true", help="let tonic fetch recordings that are missing")
    parser.add_argument("--model", metavar="MODULE:FACTORY", help="factory(sample_shape, classes) -> nn.Module")
    parser.add_argument("--batch-size", type=typed(Count), default=64, metavar="N")
    parser.add_argument("--seed", type=typed(Whole), default=0, metavar="N", help="of weights, order and noise")
    if estimator:
        parser.add_argument("--credit", choices=("auto", "global", "feedback", "residual"), help="default: auto")
        parser.add_argument("--copies", type=typed(Count), metavar="K", help="runs of each sample in a step")


def _add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", type=lambda text: os.path.abspath(_path(text)), metavar="DIR", help="where the recordings lie"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")
    parser.add_argument("--threads", type=typed(Threads), metavar="N", help="CPU threads (default: PyTorch's)")
