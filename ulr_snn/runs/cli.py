"""The command line: `ulr-snn train|evaluate|compare|plan|diagnose`, also as `python -m ulr_snn`.

A wrong use ends with one line on stderr and exit code 2, an interruption with 130, a diverged run with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import ulr_snn
from ulr_snn import data
from ulr_snn.diagnose import Draws
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Positive, Whole, typed
from ulr_snn.runs import directory
from ulr_snn.runs.models import reference

# Arguments recorded in a checkpoint, so that `evaluate` can build the same data and model.
_RECORDED = ("data", "data_root", "model", "batch_size", "lr", "seed", "credit", "copies")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    own: Exception | None = None
    try:
        args.command(args)
    except _OfFactory as raised:
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


class _OfFactory(Exception):
    """Carries an exception of the user's model factory past the handlers of wrong uses."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _fail(message: str, code: int) -> int:
    print(f"ulr-snn: {' '.join(message.split())}", file=sys.stderr)
    return code


# --- commands


def _train(args: argparse.Namespace) -> None:
    if args.resume and args.run_dir is None:
        raise UsageError("--resume needs the --run-dir of the run that is to go on")
    config = {name: getattr(args, name) for name in _RECORDED}
    if args.resume:
        _check_same_run(args.run_dir, config)
    train_set, test_set = _load(args.data, args.data_root, args.download)
    model = _build_model(config, train_set)
    with _run_directory(args, config) as run:
        result = ulr_snn.train(
            model,
            data.loader(train_set, batch_size=args.batch_size, shuffle=True, seed=args.seed),
            epochs=args.epochs,
            val_loader=data.loader(test_set, batch_size=args.batch_size),
            estimator=_estimator(config),
            lr=args.lr,
            device=args.device,
            seed=args.seed,
            max_steps=args.max_steps,
            run_dir=run,
            resume=args.resume,
            progress=args.progress,
        )
    metrics = result.metrics
    print(
        f"test accuracy {100 * metrics['test_accuracy']:.2f} % after {metrics['epochs']} epochs, "
        f"{metrics['seconds']:.1f} s of training; see {run.path}"
    )


def _evaluate(args: argparse.Namespace) -> None:
    config = directory.read_config(args.run_dir)
    if not config:
        raise UsageError(
            f"the run in '{args.run_dir}' was not started by `ulr-snn train`, so its data and model are not "
            "known: load its weights with ulr_snn.runs.directory.load_checkpoint and call ulr_snn.evaluate"
        )
    _, test_set = _load(config["data"], args.data_root or config["data_root"])
    model = _build_model(config, test_set)
    directory.load_checkpoint(args.run_dir, model)
    metrics = ulr_snn.evaluate(
        model,
        data.loader(test_set, batch_size=config["batch_size"]),
        mode=args.mode,
        copies=args.copies,
        estimator=_estimator(config),
        device=args.device,
    )
    print(
        f"test accuracy {100 * metrics['accuracy']:.2f} %, loss {metrics['loss']:.4f}, "
        f"{metrics['samples']} samples, {args.mode} firing"
    )


def _compare(args: argparse.Namespace) -> None:
    train_set, test_set = _load(args.data, args.data_root, args.download)
    folder = args.run_dir or _next_free(Path("runs"), f"compare-{args.data}")
    with _emptied(folder):
        found = ulr_snn.compare(
            _build_model(vars(args), train_set),
            data.loader(train_set, batch_size=args.batch_size, shuffle=True, seed=args.seed),
            data.loader(test_set, batch_size=args.batch_size),
            args.methods,
            epochs=args.epochs,
            lr=args.lr,
            device=args.device,
            seed=args.seed,
            max_steps=args.max_steps,
            progress=args.progress,
        )
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder / "compare.json")
        found.plot(folder / "compare.png")
    print(f"{found}\n\nsee {folder}")


def _plan(args: argparse.Namespace) -> None:
    train_set, _ = _load(args.data, args.data_root, args.download)
    model = _build_model(vars(args), train_set)
    batch = next(iter(data.loader(train_set, batch_size=args.batch_size)))
    print(ulr_snn.plan(model, batch, estimator=_estimator(vars(args))))


def _diagnose(args: argparse.Namespace) -> None:
    train_set, _ = _load(args.data, args.data_root, args.download)
    model = _build_model(vars(args), train_set)
    batch = next(iter(data.loader(train_set, batch_size=args.batch_size, shuffle=True, seed=args.seed)))
    if args.checkpoint is not None:
        directory.load_checkpoint(args.checkpoint, model)
    found = ulr_snn.diagnose(model, batch, draws=args.draws, reference_draws=4 * args.draws, seed=args.seed)
    print(found)
    if args.picture is not None:
        found.plot(args.picture)


# --- parts of the commands


def _load(name: str, root: str | None, download: bool = False) -> tuple[data.EventDataset, ...]:
    """Loads the training and the test recordings as the data set's reference network takes them."""
    return data.load(name, root, download=download, **reference(name).options)


def _build_model(config: Mapping[str, Any], dataset: Any) -> nn.Module:
    """Builds the model that `config` names, with weights drawn from its seed."""
    torch.manual_seed(config["seed"])
    if config["model"] is None:
        return reference(config["data"]).model(dataset.sample_shape, dataset.classes)
    factory = _import_factory(config["model"])
    try:
        model = factory(dataset.sample_shape, dataset.classes)
    except UsageError:  # of a layer of this library
        raise
    except Exception as error:
        raise _OfFactory(error) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {config['model']} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _import_factory(spec: str) -> Any:
    module_name, separator, factory_name = spec.partition(":")
    if not (module_name and separator and factory_name):
        raise UsageError(f"--model takes module:factory, as in my_nets:conv_net, not '{spec}'")
    if os.getcwd() not in sys.path:  # unlike `python -m`, an installed script starts without it
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Another missing module is a bug in the user's code, which a traceback locates.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"--model {spec}: there is no module '{module_name}' here or installed") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"--model {spec}: module '{module_name}' has no function '{factory_name}'")
    return factory


def _estimator(config: Mapping[str, Any]) -> ulr_snn.ULR:
    given = {name: config[name] for name in ("credit", "copies") if config[name] is not None}
    return ulr_snn.ULR(**given)


def _check_same_run(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError unless a resumed run has the options of its start; its data may have moved."""
    if not run_dir.exists() or not any(run_dir.glob("checkpoint-*")):
        return
    for name, before in directory.read_config(run_dir).items():
        if name != "data_root" and config.get(name) != before:
            option = name if name == "data" else "--" + name.replace("_", "-")
            raise UsageError(
                f"the run in '{run_dir}' was started with {option} {before}, not {config.get(name)}: "
                "repeat its options, or name another --run-dir"
            )


@contextlib.contextmanager
def _run_directory(args: argparse.Namespace, config: Mapping[str, Any]) -> Iterator[directory.RunDirectory]:
    """Makes the run directory, by default the next free one, and removes it if nothing was saved."""
    path = args.run_dir or _next_free(Path("runs"), args.data)
    run = directory.RunDirectory(path, resume=args.resume, config=config)
    with _emptied(run.path):
        yield run


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Removes the folder at the end if it is empty."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _next_free(parent: Path, name: str) -> Path:
    """Makes and returns `parent/name-001`, or the first such directory that does not exist yet."""
    number = 1
    while True:
        path = parent / f"{name}-{number:03d}"
        try:  # making the directory claims it from runs that start at the same moment
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


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
    commands = parser.add_subparsers(required=True, metavar="train|evaluate|compare|plan|diagnose")

    train = commands.add_parser("train", help="train a network and evaluate it on the test set")
    train.set_defaults(command=_train, parser=train)
    _add_task(train)
    train.add_argument("--lr", type=typed(Positive), metavar="X", help="learning rate (default: that of ulr_snn.train)")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="default: the next free runs/DATA-NNN")
    train.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    _add_length(train)
    _add_machine(train)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained network on the test set")
    evaluate.set_defaults(command=_evaluate, parser=evaluate)
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what `ulr-snn train` wrote")
    evaluate.add_argument("--mode", choices=("deterministic", "stochastic"), default="deterministic")
    evaluate.add_argument(
        "--copies", type=typed(Count), default=1, metavar="K", help="runs of each sample, with stochastic firing"
    )
    _add_data_root(evaluate)
    _add_machine(evaluate)

    compare = commands.add_parser("compare", help="train a network by several methods, side by side")
    compare.set_defaults(command=_compare, parser=compare)
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
    plan.set_defaults(command=_plan, parser=plan)
    _add_task(plan)
    plan.set_defaults(threads=None)

    diagnose = commands.add_parser("diagnose", help="measure bias and noise of the estimators' gradients of one batch")
    diagnose.set_defaults(command=_diagnose, parser=diagnose)
    _add_task(diagnose, estimator=False)
    diagnose.add_argument("--checkpoint", type=Path, metavar="RUN_DIR", help="weights of a run, in place of new ones")
    diagnose.add_argument("--draws", type=typed(Draws), default=32, metavar="N", help="steps of each estimator")
    diagnose.add_argument("--picture", type=Path, metavar="PNG", help="draws the table into this file")
    diagnose.add_argument("--threads", type=typed(Count), metavar="N", help="CPU threads (default: PyTorch's)")
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
