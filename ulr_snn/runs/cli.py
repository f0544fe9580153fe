"""The command line: `ulr-snn train|evaluate|compare|plan|diagnose|report`, also as `python -m ulr_snn`.

A wrong use ends with one line on stderr and exit code 2, an interruption with 130, a diverged run with 1. Arguments are
parsed before torch is imported, which takes seconds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import ulr_snn
from ulr_snn.errors import OwnError, UsageError
from ulr_snn.errors.arguments import Count, Draws, Positive, Whole, typed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    own: Exception | None = None
    try:
        args, unknown = _parser().parse_known_args(argv)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        from ulr_snn.runs.commands import run

        run(args)
    except OwnError as raised:
        own = raised.error
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (UsageError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _fail(str(error), 2)
    except FloatingPointError as error:  # training diverged; a traceback would not help
        return _fail(str(error), 1)
    if own is not None:  # here, where no other exception is added to its traceback
        raise own
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ulr-snn", description="Trains spiking neural networks by likelihood ratios.")
    parser.add_argument("--version", action="version", version=f"ulr-snn {ulr_snn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="train|evaluate|compare|plan|diagnose|report")

    train = commands.add_parser("train", help="train a network and evaluate it on the test set")
    train.set_defaults(command="train", parser=train)
    _add_task(train)
    train.add_argument("--lr", type=typed(Positive), metavar="X", help="learning rate (default: that of ulr_snn.train)")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: the next free runs/DATA-NNN")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    _add_length(train)
    _add_machine(train)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained network on the test set")
    evaluate.set_defaults(command="evaluate", parser=evaluate)
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what `ulr-snn train` wrote")
    evaluate.add_argument("--mode", choices=("deterministic", "stochastic"), default="deterministic")
    evaluate.add_argument(
        "--copies", type=typed(Count), default=1, metavar="K", help="runs of each sample, with stochastic firing"
    )
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
    compare.add_argument("--run-dir", type=Path, metavar="DIR", help="default: the next free runs/compare-DATA-NNN")
    _add_length(compare)
    _add_machine(compare)

    plan = commands.add_parser("plan", help="show which parameter gets its gradient how, without training")
    plan.set_defaults(command="plan", parser=plan)
    _add_task(plan)
    plan.set_defaults(threads=None)

    diagnose = commands.add_parser("diagnose", help="measure bias and noise of the estimators' gradients of one batch")
    diagnose.set_defaults(command="diagnose", parser=diagnose)
    _add_task(diagnose, estimator=False)
    diagnose.add_argument("--checkpoint", type=Path, metavar="RUN_DIR", help="weights of a run, in place of new ones")
    diagnose.add_argument("--draws", type=typed(Draws), default=32, metavar="N", help="steps of each estimator")
    diagnose.add_argument("--picture", type=Path, metavar="PNG", help="draws the table into this file")
    diagnose.add_argument("--threads", type=typed(Count), metavar="N", help="CPU threads (default: PyTorch's)")

    report = commands.add_parser("report", help="write the report of a run, one HTML file")
    report.set_defaults(command="report", parser=report)
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what `ulr-snn train` wrote")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    report.add_argument("--files-only", action="store_true", help="without running the network on test data")
    _add_data_root(report)
    _add_machine(report)
    return parser


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
    parser.add_argument("--data-root", type=os.path.abspath, metavar="DIR", help="where the recordings lie")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if any)")
    parser.add_argument("--threads", type=typed(Count), metavar="N", help="CPU threads (default: PyTorch's)")
