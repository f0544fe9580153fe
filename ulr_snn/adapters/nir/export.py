"""`to_nir`: writes the layers of a trained model."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ulr_snn.adapters import adapted, library_of
from ulr_snn.adapters.base import StepNeuron
from ulr_snn.adapters.nir.graph import NO_LEAK, Inexact, Writer, array, library, pair
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Positive, checked
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.chain import EachStep, NoChain, OverTime, Shape
from ulr_snn.model.entry import Biased, Scaled, Synapse
from ulr_snn.model.finding import find_call
from ulr_snn.model.mode import mode_of
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage
from ulr_snn.model.recognition import recognise

if TYPE_CHECKING:
    from nir import NIRGraph

CONTAINERS = (nn.Sequential, EachStep)  # Fold is one, too
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in evaluation
BY_ROW = "spikingjelly"  # its layers derive from torch's, and take rows in both of its modes
Part = tuple[str, nn.Module, int]  # name, module, and axes of time and samples before its features


@checked
@torch.no_grad()
def to_nir(model: nn.Module, example: Tensor, dt: Positive = 1e-4) -> "NIRGraph":
    """Returns a trained model as a NIR graph, with the same outputs up to rounding where it is read with time steps dt.

    example: events [T, B, ...] of a batch, of which only the shape counts. dt: length of a time step in seconds;
    snnTorch reads 1e-4 only. A mean over time before linear layers is left to the reader, which takes it of the
    outputs. Raises UsageError for a layer that has no exact counterpart, by its name.
    """
    writer = Writer(library(), dt, tuple(example.shape[2:]))
    with mode_of(model, training=False):
        for part in with_norms_folded(parts_of(model, example)):
            write(writer, *part)
    return writer.finished()


def parts_of(model: nn.Module, example: Tensor) -> Iterator[Part]:
    """Yields the layers of a model in their order. Raises UsageError unless the model is a chain of layers."""
    kind: type = type(model)
    own_code = getattr(kind, "forward", None) is not nn.Sequential.forward and library_of(kind) is None
    if isinstance(model, nn.Sequential) and not own_code:
        yield from flat("", model, 1 if any(by_step(module) for module in model.modules()) else 2)
        return
    batch = Batch.of(model, example, torch.zeros(example.shape[1], dtype=torch.int64), None, resolve("ce_count"))
    try:
        with torch.enable_grad():  # it reads autograd graphs
            chain = recognise(model, find_call(model, batch)[0], batch.frames, batch.dtype, {}, whole=True)
    except NoChain as error:
        why = f": {error}" if str(error) else ""
        raise UsageError(
            f"to_nir takes a chain of layers, as an nn.Sequential, and {kind.__name__} is not known to be one{why}"
        ) from None
    for i, stage in enumerate(chain.stages):
        yield from flat(str(i), stage, 2)


def by_step(module: nn.Module) -> bool:
    """Returns whether a module is a neuron of another library that takes one time step a call."""
    neuron = adapted(module)
    return isinstance(neuron, StepNeuron) and not neuron.by_sequence


def flat(name: str, module: nn.Module, lead: int) -> Iterator[Part]:
    """Yields the layers in a container, or the layer itself."""
    kind: type = type(module)
    of = library_of(kind)
    if of == "norse" and kind.__name__ == "Lift":
        yield from flat(name, module.get_submodule("lifted_module"), 1)
    elif isinstance(module, CONTAINERS):
        for child, part in module.named_children():
            yield from flat(f"{name}.{child}".lstrip("."), part, 1 if isinstance(module, Fold) else lead)
    else:
        yield name, module, 1 if of == BY_ROW else lead


def with_norms_folded(parts: Iterator[Part]) -> list[Part]:
    """Returns the layers with each batch norm folded into the linear layer or convolution before it."""
    found: list[Part] = []
    for name, module, lead in parts:
        before = found[-1][1] if found else None
        folds = next((fold for linear, fold in FOLDS.items() if isinstance(before, linear)), None)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and folds is not None:
            found[-1] = (found[-1][0], folds(before, module), lead)
        else:
            found.append((name, module, lead))
    return found


def write(writer: Writer, name: str, module: nn.Module, lead: int) -> None:
    """Writes a layer. Raises UsageError, with the layer's name and the reason, if that cannot be exact."""
    kind: type = type(module)
    bases = kind.__mro__ if library_of(kind) == BY_ROW else (kind,)
    writes = next((WRITERS[base] for base in bases if base in WRITERS), None)
    try:
        if writes is not None:
            writes(writer, module, lead)
        elif library_of(kind) == "norse":
            write_norse(writer, module)
        elif isinstance(neuron := adapted(module), StepNeuron | str):
            write_library(writer, neuron)
        elif not isinstance(module, NOTHING):
            raise Inexact("no node that snnTorch and Norse read computes the same")
    except Inexact as error:
        raise UsageError(f"to_nir cannot write layer {name} ({kind.__name__}): {error}") from None


def write_neuron(writer: Writer, module: LIF, lead: int = 0) -> None:
    """Writes neurons of ulr_snn. lead: axes of time and samples before the features, in all of these functions."""
    recurrent: Any = module.recurrent
    weight = None if recurrent is None else array(recurrent.weight)
    writer.spiking(module.beta.clamp(0, 1), module.threshold, module.reset, weight)


def write_library(writer: Writer, neuron: StepNeuron | str) -> None:
    """Writes a neuron of another library that has the equations of `LIF`."""
    found = neuron if isinstance(neuron, str) else neuron.ours(torch.zeros(1, 1, *writer.shape))
    if isinstance(found, str):
        raise Inexact(found)
    entry, ours = found
    for module in entry:
        WRITERS[type(module)](writer, module, 2)
    write_neuron(writer, ours)


def write_linear(writer: Writer, module: nn.Linear, lead: int) -> None:
    """Writes a linear layer. It may stand behind a mean over time, with which it changes places."""
    if len(writer.shape) != 1:
        raise Inexact(f"it gets features {writer.shape}; put nn.Flatten before it")
    if writer.over_time == "sum":
        writer.before_reduction()
    weight, nir = writer.scaled(module.weight), writer.nir
    node = nir.Linear(weight) if module.bias is None else nir.Affine(weight, array(module.bias))
    writer.add("linear", node, (len(weight),))


def write_convolution(writer: Writer, module: nn.Conv2d, lead: int) -> None:
    """Writes a convolution."""
    writer.before_reduction()
    if module.padding_mode != "zeros":
        raise Inexact(f"NIR pads with zeros, not by {module.padding_mode!r}")
    weight = dense(module.weight, module.groups)
    bias = np.zeros(len(weight), np.float32) if module.bias is None else array(module.bias)
    node = writer.convolution(writer.scaled(weight), bias, module.stride, module.padding, module.dilation)
    shape = shape_after(nn.Conv2d, module, writer.shape)
    if tuple(node.output_type["output"]) != shape:
        raise Inexact(f"NIR takes kernels as square, and this one is {tuple(module.kernel_size)}")
    writer.add("convolution", node, shape)


def dense(weight: Tensor, groups: int) -> Tensor:
    """Returns the weight of a convolution in groups as that of one without: NIR reads the number of input channels from
    the weight."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    found = weight.new_zeros(len(weight), inputs * groups, *weight.shape[2:])
    for i in range(groups):
        rows = slice(i * outputs, (i + 1) * outputs)
        found[rows, i * inputs : (i + 1) * inputs] = weight[rows]
    return found


def shape_after(kind: Any, module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the features of what a module, of a class that is or derives from `kind`, makes of features [C, H, W]."""
    row = next(module.parameters(), torch.zeros(0)).new_zeros(1, *shape)
    return tuple(kind.forward(module, row).shape[1:])


def write_pooling(writer: Writer, module: nn.AvgPool2d, lead: int) -> None:
    """Writes an average pooling as a sum, whose factor is undone later."""
    writer.before_reduction()
    size, stride = pair(module.kernel_size), pair(module.stride)
    if pair(module.padding) != (0, 0) or module.ceil_mode:
        raise Inexact("its windows must lie inside; leave padding and ceil_mode out")
    node = writer.nir.SumPool2d(np.array(size), np.array(stride), np.zeros(2, int))
    writer.add("pooling", node, shape_after(nn.AvgPool2d, module, writer.shape))
    writer.gain *= module.divisor_override or size[0] * size[1]


def write_flatten(writer: Writer, module: nn.Flatten | Shape, lead: int) -> None:
    """Writes a flattening of features."""
    axes = len(writer.shape)
    ends = (lead, -1) if isinstance(module, Shape) else (module.start_dim, module.end_dim)
    first, last = (axis - lead - axes if axis >= 0 else axis for axis in ends)  # from the end
    shape = tuple(torch.zeros(writer.shape).flatten(first, last).shape) if -axes <= first <= last < 0 else None
    if shape is None or (isinstance(module, Shape) and shape != tuple(module.features)):
        raise Inexact("it does more than to flatten the features of a time step")
    if shape != writer.shape:
        writer.before_reduction()
        writer.add("flatten", writer.nir.Flatten(np.array(writer.shape), start_dim=first, end_dim=last), shape)


def write_bias(writer: Writer, module: Biased, lead: int) -> None:
    """Writes the bias of recurrent weights, into the layer before them."""
    node, nir, bias = writer.nodes[writer.last], writer.nir, writer.gain * array(module.module.bias)
    if not isinstance(node, nir.Affine | nir.Linear):
        raise Inexact("its recurrent weights have a bias, and no linear layer stands before it to take that")
    writer.nodes[writer.last] = nir.Affine(node.weight, bias + getattr(node, "bias", 0))


def write_scale(writer: Writer, module: Scaled, lead: int) -> None:
    """Leaves a factor to what follows."""
    if isinstance(module.factor, Tensor) and module.factor.numel() > 1:
        raise Inexact("it multiplies the current of each neuron by a factor of its own")
    writer.gain /= float(module.factor)


def write_synapse(writer: Writer, module: Synapse, lead: int) -> None:
    """Refuses a current that leaks before the membrane does."""
    raise Inexact(
        "its equations are those of a LIF neuron behind a synapse, whose reset the libraries read differently"
    )


def write_readout(writer: Writer, module: LeakyReadout, lead: int) -> None:
    """Writes leaky integrators."""
    writer.before_reduction()
    leak = np.maximum(1 - writer.full(module.beta.clamp(0, 1)), NO_LEAK)
    writer.integrator(leak, 1 / leak)


def write_reduction(writer: Writer, module: TimeAverage | OverTime, lead: int) -> None:
    """Leaves a reduction over time to the reader."""
    writer.before_reduction()
    writer.over_time = "sum" if isinstance(module, OverTime) and module.kind.startswith("Sum") else "mean"


FOLDS: dict[type, Callable[[Any, Any], nn.Module]] = {nn.Linear: fuse_linear_bn_eval, nn.Conv2d: fuse_conv_bn_eval}
WRITERS: dict[type, Callable[[Writer, Any, int], None]] = {
    LIF: write_neuron,
    RecurrentLIF: write_neuron,
    nn.Linear: write_linear,
    nn.Conv2d: write_convolution,
    nn.AvgPool2d: write_pooling,
    nn.Flatten: write_flatten,
    Shape: write_flatten,
    Biased: write_bias,
    Scaled: write_scale,
    Synapse: write_synapse,
    LeakyReadout: write_readout,
    TimeAverage: write_reduction,
    OverTime: write_reduction,
}


def write_norse(writer: Writer, module: Any) -> None:
    """Writes a neuron of Norse. Its membrane moves by a (i - v), and its current jumps before it leaks."""
    kind = type(module).__name__.removesuffix("Cell")
    if kind not in ("LIF", "LIFBox", "LIFRecurrent", "LIBox", "IAF"):
        raise Inexact("no node of NIR has its equations; LIF, LIFBox, LIFRecurrent, LIBox and IAF have one")
    p = module.p
    if any(bool((torch.as_tensor(getattr(p, name, 0.0)) != 0).any()) for name in ("v_leak", "v_reset")):
        raise Inexact("it leaks or resets to a value other than 0, which the importers leave out")
    if getattr(p, "reset_method", None) is not None and p.reset_method.__name__ != "reset_value":
        raise Inexact("it resets by subtraction at once, before the leak")
    if kind == "IAF":
        writer.spiking(1.0, p.v_th, "zero")
        return
    leak = writer.full(module.dt * p.tau_mem_inv)
    if kind == "LIBox":
        writer.before_reduction()
        writer.integrator(leak, np.ones(writer.shape))
    elif kind == "LIFBox":
        writer.spiking(1 - leak, writer.full(p.v_th) / leak, "zero")
    else:
        if kind == "LIFRecurrent":
            writer.add("linear", writer.nir.Linear(writer.scaled(module.input_weights)), (len(module.input_weights),))
            leak = writer.full(module.dt * p.tau_mem_inv)
        writer.before_reduction()
        threshold, of_current = writer.gain * writer.full(p.v_th) / leak, writer.full(module.dt * p.tau_syn_inv)
        writer.filtered(1 / of_current, 1 / leak, threshold, "zero")
        if kind == "LIFRecurrent":
            writer.connected(array(module.recurrent_weights).astype(np.float64), threshold)
        writer.gain = 1.0
