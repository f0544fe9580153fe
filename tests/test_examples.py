"""Every example runs and learns; `digits` meets the bound that the README states."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from tests.helpers import beside_torchvision, library_of
from ulr_snn import ULR, Global, Independent

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORDINGS = Path(os.environ.get("ULR_SNN_DATA", EXAMPLES.parents[1] / "shared" / "data"))
REACHES = {  # epochs and test accuracy, or minus the loss on the test part; updates and mean return of cartpole
    "train_digits": (15, 0.90),
    "own_loop": (4, 0.85),
    "black_box": (4, 0.85),
    "written_out": (3, 0.85),
    "objectives": (5, 0.85),
    "two_processes": (20, 0.92),  # 0.88 if the first half does not learn
    "snntorch_tutorial": (4, 0.6),
    "norse_recurrent": (6, 0.5),
    "spikingjelly_conv": (6, 0.5),
    "cartpole": (40, 300),  # an untrained policy has less than 60
    "static_images": (4, 0.8),
    "regression": (6, -0.02),
    "autoencoder": (6, -0.06),
    "population": (5, 0.8),
    "lightning_loop": (4, 0.85),
    "accelerate_loop": (4, 0.85),
    "pictures": (3, 0.85),
}
BESIDE_TORCHVISION = {"lightning_loop": "lightning", "accelerate_loop": "accelerate"}
NEEDS = {  # library, recordings, and into how many parts they are cut, of which one is used
    "snntorch_tutorial": ("snntorch", "saccade-mnist", 4),
    "norse_recurrent": ("norse", "spoken-digits", 4),
    "spikingjelly_conv": ("spikingjelly", "saccade-mnist", 8),
}
IMPORTS = {  # packages that an example without recordings imports
    "cartpole": ("gymnasium", "snntorch"),
    "static_images": ("snntorch",),
    "regression": ("snntorch",),
    "population": ("snntorch",),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)  # where an example may write
    monkeypatch.setenv("ULR_SNN_CACHE", str(tmp_path))
    library, data, cut = NEEDS.get(path.stem, (None, None, 1))
    if path.stem in BESIDE_TORCHVISION:
        beside_torchvision(BESIDE_TORCHVISION[path.stem])
    if library is not None:
        library_of(library)
        pytest.importorskip("tonic")
        if not (RECORDINGS / data).exists():
            pytest.skip(f"needs the recordings of {data}, under ULR_SNN_DATA or beside the repository")
        monkeypatch.setenv("ULR_SNN_DATA", str(RECORDINGS))
    for package in IMPORTS.get(path.stem, ()):
        library_of(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(path.stem)  # by name, so that a process that it starts finds it, too
    if library is not None:
        whole = module.recordings()
        monkeypatch.setattr(module, "recordings", lambda: [part.subset(range(len(part))[::cut]) for part in whole])
    epochs, bound = REACHES[path.stem]
    found = module.main(epochs)
    assert (found if bound > 0 else -found) >= bound


def test_a_policy_takes_steps_and_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in IMPORTS["cartpole"]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    cartpole = importlib.import_module("cartpole")
    estimator = ULR(credit=Global(reward_to_go=True), sampling=Independent(4))
    model = cartpole.trained(2, estimator)
    assert all(q.grad is not None and q.grad.any() for q in model.parameters())
    rewards = model(torch.zeros(60, 5, 1))[..., 0]
    assert ((rewards == 1) | (rewards == 0)).all() and (rewards.diff(dim=0) <= 0).all()  # 1 until the end, then 0
    torch.manual_seed(0)
    untrained = cartpole.returns(cartpole.Balance())
    assert (untrained >= 1).all() and untrained.mean() < 60
