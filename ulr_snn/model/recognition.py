"""Models of other libraries on the scans of `ulr_snn`'s own neurons, where their structure allows it.

A pass over a few samples is recorded: which modules run in every time step, and what each of them reads. A model is a
chain if every module reads the output of the module before it in the same step. If its neurons also have the equations
of `LIF` or `RecurrentLIF`, the chain runs over the whole sequence in place of the model, with the same parameters,
names and sites. The chain must reproduce the recording. If only the beginning of a model is a chain, and nothing behind
it reads more than its last output, the model's own code runs the rest (`tail.py`). Otherwise it runs the whole model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.call import Call, no_side_effects
from ulr_snn.model.chain import Chain, NoChain
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.events import Frames
from ulr_snn.model.finding import OF_SHAPES
from ulr_snn.model.links import check_module
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.recorded_pass import RecordedPass
from ulr_snn.noise.kinds import CurrentNoise, WeightNoise
from ulr_snn.sites.binding import Layers, inside, spiking_layers

SAMPLES, STEPS = 3, 96  # samples and time steps of a batch that are recorded


@full_precision()
def recognise(
    model: nn.Module,
    call: Call,
    frames: Frames,
    dtype: torch.dtype,
    noise: Mapping[str, Any],
    whole: bool = False,
    plain: bool = True,
) -> Chain:
    """Returns the chain that is equivalent to a model on frames [T, B, ...] like these, or raises NoChain. call: how
    the model is called; noise: see `ULR`; whole: the chain must be all of the model; plain: see `find_layers`."""
    for name, site in noise.items():
        if isinstance(site, CurrentNoise) or (isinstance(site, WeightNoise) and site.per_sample):
            raise NoChain(f"there is noise of its own at {name}")
    if not any(isinstance(neuron, StepNeuron) for _, neuron in spiking_layers(model)):
        raise NoChain("")
    if call.inputs.slots or len(call.view.slots) != 1:
        raise NoChain("it has several inputs, or several of its outputs are read")
    lengths = {len(frames)} if call.way == "static" else {min(STEPS, len(frames)), len(frames)}
    for steps in sorted(lengths):
        try:
            return chain_of(model, call, frames[:steps, :SAMPLES].to(dtype), noise, whole, plain)
        except NoChain:
            raise
        except Exception as error:  # the model may need all time steps
            if steps == len(frames) and not isinstance(error, OF_SHAPES):
                raise
            reason = error
    raise NoChain(f"it cannot be recorded, {type(reason).__name__}") from reason


def chain_of(
    model: nn.Module, call: Call, x: Tensor, noise: Mapping[str, Any], whole: bool, plain: bool = True
) -> Chain:
    """Records a model with events x [T, B, ...] and returns its chain. A single step or sample is taken twice. Raises
    NoChain, and any error of the model."""
    if len(x) == 1 and call.way == "static":
        raise NoChain("it runs a single time step")
    x = x.repeat(2 if len(x) == 1 else 1, 2 if x.shape[1] == 1 else 1, *[1] * (x.ndim - 2)).contiguous()
    cuts: list[str] = []
    layers = find_layers(model, lambda: x, call, noise, cuts, plain)
    whole = whole or bool(cuts)  # plan lists modules that cut the graph, which it finds in whole models only
    check_neurons(model, layers)
    why = unfit(model, layers)
    stepping = [neuron for _, neuron in layers if isinstance(neuron, StepNeuron) and not neuron.scans]
    if why and (whole or all(isinstance(neuron.ours(x), str) for neuron in stepping)):
        raise NoChain(why)
    with no_side_effects(model), without_dropout(model):
        recorded = RecordedPass.of(model, call, x, layers)
        try:
            if not why:
                return recorded.chain()
        except NoChain as error:
            why = str(error)
        beginning = None if whole else recorded.beginning(why)
        if beginning is None:
            raise NoChain(why)
        return beginning


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turns torch's dropout off within this context. In a chain it draws the masks of all time steps at once."""
    dropping = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    try:
        for module in dropping:
            module.training = False
        yield
    finally:
        for module in dropping:
            module.training = True


def check_neurons(model: nn.Module, layers: Layers) -> None:
    """Raises NoChain for a model that is a single layer, or has other layers than those of libraries."""
    if any(name == "model" for name, _ in layers) and not model._modules.get("model"):
        raise NoChain("it is a single layer")
    for name, neuron in layers:
        if isinstance(neuron, SpikingNeuron | BlackBox):
            raise NoChain(f"{name} is no neuron of another library")


def unfit(model: nn.Module, layers: Layers) -> str:
    """Returns which module keeps a model from being a chain; nothing if there is none."""
    names = {name for name, _ in layers}
    try:
        for name, module in model.named_modules():
            check_module(name, module, neuron=any(inside(name, site) for site in names))
    except NoChain as error:
        return str(error)
    return ""
