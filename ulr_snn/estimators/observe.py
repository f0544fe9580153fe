"""Observes the first pass of a training: treatment of the losses, sources of credit, parameters with noise."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ulr_snn.credit.kinds import Auto
from ulr_snn.credit.structure import LOSS, Structure, treatment_of
from ulr_snn.errors import UsageError
from ulr_snn.estimators.config import Config
from ulr_snn.losses.evaluation import parameters_of
from ulr_snn.model.batch import Batch
from ulr_snn.model.forward import Forward
from ulr_snn.model.graph import leaves, share_nodes
from ulr_snn.model.passes import Pass
from ulr_snn.model.replay import driven_by_events, sites_without_effect
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.sites.variance import BY_SAMPLE, lower_variance_weights
from ulr_snn.sites.weights import SOURCE, choose


def observed(
    forward: Forward,
    p: Pass,
    batch: Batch,
    config: Config,
    driven: set[str] | None = None,
    weights: Mapping[str, WeightNoise] | None = None,
) -> Structure:
    """Returns the structure shown by the pass p of one copy, and replaces the loss evaluation of p.

    driven: sites that read the input not only by spikes, if known; weights: noise on parameters, if chosen before.
    """
    model = forward.bound.model
    check_reads(p)
    treatment = treatment_of(batch.objective, p, config.credit, config.noise, model)
    treatment = replace(treatment, in_time=config.credit.reward_to_go)
    learnable = len(treatment.gradientless) < len(batch.objective.losses)
    if learnable and config.credit.goes_back and not p.outputs.is_floating_point():
        raise UsageError(
            f"the model returned {p.outputs.dtype}, which has no derivative; return floating-point numbers, or use "
            "credit='global'"
        )
    forward = replace(forward, treatment=treatment)
    if treatment.smoothed or treatment.flipped or treatment.in_time:
        p.evaluation = forward.evaluate(batch, p.outputs, p.activity, p.copies)
    else:
        p.evaluation = replace(p.evaluation, treatment=treatment)
    structure = Structure.of(
        model,
        p,
        config.credit,
        config.maps,
        lambda: driven_by_events(forward, batch, p) if driven is None else driven,
        lambda sites: sites_without_effect(forward, batch, p, sites),
    )
    structure.treatment, structure.brought = treatment, p.evaluation.brought(model)
    if structure.joint and (treatment.gradientless or config.sampling.multi_sample):
        why = "one of the losses has no gradient" if treatment.gradientless else "ULR got multi_sample"
        raise UsageError(f"functions in the model's code fire, and {why}; use credit='global'")
    if isinstance(config.credit, Auto) and "outputs" not in config.noise:
        structure.detached = [name for i, name in batch.objective.own.items() if i in treatment.gradientless]
    learned = [(source, target) for source, paths in structure.feeds.items() for target in paths]
    if config.maps == "exact" and learned:
        raise UsageError(
            f"ULR got maps='exact', but no derivative leads from the spikes of {learned[0][0]} to the current of "
            f"{learned[0][1]}; use maps='auto'"
        )
    structure.weights = dict(chosen_weights(forward, p, batch, config, structure) if weights is None else weights)
    structure.parameters |= {name: [SOURCE] for name in structure.weights}
    of_loss = {id(q) for q in parameters_of(p.evaluation.others)}
    left = [name for name, q in model.named_parameters() if name in structure.untrained and id(q) in of_loss]
    structure.parameters |= {name: [LOSS] for name in left}
    if config.sampling.by_layer and structure.weights:
        raise UsageError("ULR got layerwise, but parameters have noise of their own (see plan); use one alone")
    if config.sampling.multi_sample and treatment.gradientless and not structure.credit.unbiased:
        raise UsageError("ULR got multi_sample, but one of the mixed losses has no gradient; use credit='global'")
    return structure


def check_reads(p: Pass) -> None:
    """Raises UsageError for a loss that depends on what the model computes in the pass besides its outputs, as a
    forward hook may keep it: the loss has its gradient in the outputs alone."""
    if p.evaluation.reading:
        spikes = {id(leaf) for record in p.records for leaf in record.leaves}
        inside = [p.outputs, *(record.x for record in p.records)]
        if leaves(p.evaluation.reading) & spikes or share_nodes(p.evaluation.reading, inside):
            raise UsageError(
                "the loss reads what the model computes besides its outputs, such as spikes that a hook keeps, and "
                "would have no gradient there; let the model return it, and read it by output='all'"
            )


def chosen_weights(
    forward: Forward, p: Pass, batch: Batch, config: Config, structure: Structure
) -> dict[str, WeightNoise]:
    """Returns weight noise: as asked for, where no other noise reaches, and where its expected variance is less."""
    model = forward.bound.model

    def outcome() -> Tensor:
        forward.log.extra += 1
        return forward.run(batch, p.copies).outputs.detach()

    weights = choose(model, config.noise, structure.untrained, outcome)
    if isinstance(config.credit, Auto) and structure.credit.by_losses:
        for record in p.records:
            better = lower_variance_weights(model, record, structure.parameters, config.noise)
            weights |= dict.fromkeys(better, BY_SAMPLE)
    return weights


def warnings_of(structure: Structure, passes: int) -> list[str]:
    """Returns the warnings about a model and a loss. passes: number of forward passes of a step."""
    found = []
    if structure.untrained:
        names = ", ".join(structure.untrained)
        found.append(f"no gradient reaches {names}; print(ulr_snn.plan(...)) says why")
    if structure.detached:
        found.append(without_gradient(structure, passes))
    return found


def without_gradient(structure: Structure, passes: int) -> str:
    """Returns the warning that losses of the user's own have no gradient."""
    return (
        f"the loss {' and '.join(structure.detached)} gives the outputs no gradient, so every step takes {passes} "
        f"forward pass{'es' * (passes > 1)}; leave out detach(), item() and torch.tensor(...) if it should have one, "
        "else ask for credit='global' or noise={'outputs': OutputNoise()}"
    )
