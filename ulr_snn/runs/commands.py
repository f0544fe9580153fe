"""The commands of the command line: what each does with its parsed arguments. `ulr_snn.runs.cli` parses them."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ulr_snn
from ulr_snn import data
from ulr_snn.errors import OwnError, UsageError
from ulr_snn.errors.arguments import accepts
from ulr_snn.kernels import ranks
from ulr_snn.model.mode import pick_device
from ulr_snn.runs import directory
from ulr_snn.runs.models import reference

# Arguments recorded in a checkpoint, so that `evaluate` can build the same data and model.
RECORDED = ("data", "data_root", "model", "batch_size", "lr", "seed", "credit", "copies")
OPEN = ("data_root", "epochs", "max_steps", "device")  # a run may go on elsewhere, and for longer


def run(args: Namespace) -> None:
    """Runs the command that the arguments name."""
    if args.threads:
        torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


def train(args: Namespace) -> None:
    """Trains a network in a run directory, and prints its test accuracy."""
    config = {name: getattr(args, name) for name in dict.fromkeys(RECORDED + OPEN)}
    if args.resume and not args.changed:
        _check_same_run(args.run_dir, config)
    train_set, test_set = _load(args.data, args.data_root, args.download)
    model = _build_model(config, train_set)
    with ranks.launched(pick_device(args.device)) as rank, _run_directory(args, config) as run:
        loader = data.loader(train_set, batch_size=args.batch_size, shuffle=True, seed=args.seed)
        if rank:
            torch.manual_seed(args.seed + rank)  # so that ranks drop other neurons
        result = ulr_snn.train(
            model,
            ranks.shared(loader),
            epochs=args.epochs,
            val_loader=data.loader(test_set, batch_size=args.batch_size),
            estimator=_estimator(config),
            lr=args.lr,
            device=args.device,
            seed=args.seed,
            max_steps=args.max_steps,
            run_dir=run,
            resume="changed" if args.changed else args.resume,
            save_every=args.save_every,
            progress=args.progress,
        )
    metrics = result.metrics
    if rank == 0:
        print(
            f"test accuracy {100 * metrics['test_accuracy']:.2f} % after {metrics['epochs']} epochs, "
            f"{metrics['seconds']:.1f} s of training; see {run.path}"
        )


def evaluate(args: Namespace) -> None:
    """Prints accuracy and loss of a trained network on the test set."""
    config = directory.read_config(args.run_dir)
    if not config:
        raise UsageError(
            f"the run in '{args.run_dir}' was not started by `ulr-snn train`, so its data and model are not "
            "known: load its weights with ulr_snn.runs.directory.load_checkpoint and call ulr_snn.evaluate"
        )
    _, test_set = _load(config["data"], args.data_root or config["data_root"])
    model = _build_model(config, test_set)
    directory.load_checkpoint(args.run_dir, model, best=args.best)
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


def compare(args: Namespace) -> None:
    """Trains a network by several methods, prints the table, and writes it with its picture."""
    train_set, test_set = _load(args.data, args.data_root, args.download)
    folder = _made(args.run_dir) if args.run_dir else _next_free(Path("runs"), f"compare-{args.data}")
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
        found.save(folder / "compare.json")
        found.plot(folder / "compare.png")
    print(f"{found}\n\nsee {folder}")


def plan(args: Namespace) -> None:
    """Prints which parameter gets its gradient how."""
    train_set, _ = _load(args.data, args.data_root, args.download)
    model = _build_model(vars(args), train_set)
    batch = next(iter(data.loader(train_set, batch_size=args.batch_size)))
    print(ulr_snn.plan(model, batch, estimator=_estimator(vars(args))))


def diagnose(args: Namespace) -> None:
    """Prints bias and noise of the estimators' gradients of one batch."""
    if args.picture is not None and not args.picture.parent.is_dir():
        raise UsageError(f"--picture '{args.picture}' cannot be written: name a file in a folder that exists")
    train_set, _ = _load(args.data, args.data_root, args.download)
    model = _build_model(vars(args), train_set)
    batch = next(iter(data.loader(train_set, batch_size=args.batch_size, shuffle=True, seed=args.seed)))
    if args.checkpoint is not None:
        directory.load_checkpoint(args.checkpoint, model)
    found = ulr_snn.diagnose(model, batch, draws=args.draws, reference_draws=4 * args.draws, seed=args.seed)
    print(found)
    if args.picture is not None:
        found.plot(args.picture)


def report(args: Namespace) -> None:
    """Writes the report of a run, and prints its path."""
    from ulr_snn.runs.report import write_report

    config = {} if args.files_only else directory.read_config(args.run_dir)
    known: dict[str, Any] = {}
    if set(RECORDED) <= set(config):  # the run was started by the command line, so its network and data are known
        _, test_set = _load(config["data"], args.data_root or config["data_root"])
        known = {"model": _build_model(config, test_set), "estimator": _estimator(config), "device": args.device}
        known["loader"] = data.loader(test_set, batch_size=config["batch_size"])
    print(write_report(args.run_dir, out=args.out, **known))


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "plan": plan,
    "diagnose": diagnose,
    "report": report,
}


# --- parts of the commands


def _load(name: str, root: str | None, download: bool = False) -> tuple[data.EventDataset, ...]:
    """Loads the training and the test recordings as the data set's reference network takes them."""
    found = data.load(name, root, download=download, **reference(name).options)
    if not isinstance(found[0], data.EventDataset):
        raise UsageError(f"{name} is a signal without classes; train on it in Python, as docs/data.md shows")
    return found


def _build_model(config: Mapping[str, Any], dataset: Any) -> nn.Module:
    """Builds the model that `config` names, with weights drawn from its seed."""
    torch.manual_seed(config["seed"])
    if config["model"] is None:
        return reference(config["data"]).model(dataset.sample_shape, dataset.classes)
    factory = _import_factory(config["model"])
    if not accepts(factory, 2):
        raise UsageError(f"--model {config['model']} does not take (sample_shape, classes)")
    try:
        model = factory(dataset.sample_shape, dataset.classes)
    except UsageError:  # of a layer of this library
        raise
    except Exception as error:
        raise OwnError(error) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {config['model']} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _import_factory(spec: str) -> Any:
    module_name, separator, factory_name = spec.partition(":")
    if not (all(map(str.isidentifier, module_name.split("."))) and separator and factory_name):
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
    """Raises UsageError unless a resumed run has the options of its start; others of its options are open."""
    if not run_dir.exists() or not any(run_dir.glob("checkpoint-*")):
        return
    for name, before in directory.read_config(run_dir).items():
        if name not in OPEN and config.get(name) != before:
            option = name if name == "data" else "--" + name.replace("_", "-")
            raise UsageError(
                f"the run in '{run_dir}' was started with {option} {before}, not {config.get(name)}: "
                "repeat its options, name another --run-dir, or take the new ones by --changed"
            )


@contextlib.contextmanager
def _run_directory(args: Namespace, config: Mapping[str, Any]) -> Iterator[directory.RunDirectory]:
    """Makes the run directory, by default the next free one, and removes it if nothing was saved."""
    own = args.run_dir or (_next_free(Path("runs"), args.data) if ranks.rank() == 0 else Path())
    path = ranks.gathered(own)[0]
    run = directory.RunDirectory(path, resume=args.resume or args.changed, config=config)
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


def _made(folder: Path) -> Path:
    """Makes and returns the folder of a comparison. Raises UsageError if it cannot be written, or holds one already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir '{folder}' cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--run-dir '{folder}' cannot be written: give write access, or name another")
    if (folder / "compare.json").exists():
        raise UsageError(f"--run-dir '{folder}' holds a comparison already: name another")
    return folder


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
