"""The structure of a model as its first pass shows it: which layers feed which, and where each gradient comes from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.feedback import time_basis
from ulr_snn.credit.kinds import Auto, CreditKind, Learned
from ulr_snn.credit.maps import Full, Path, window
from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.losses.evaluation import LossTreatment
from ulr_snn.losses.named import NamedLoss, Objective
from ulr_snn.model.graph import leaves, passes_through
from ulr_snn.model.passes import Pass
from ulr_snn.noise.kinds import OutputNoise, WeightNoise
from ulr_snn.sites.records import CurrentRecord, Record

STEPS = ("Round", "Sign", "Floor", "Ceil", "Trunc", "Heaviside", "Fix")  # functions of torch with derivative zero


# exact, feeds, recurrent and from_outputs of `Structure`
Routes = tuple[dict[str, list[str]], dict[str, dict[str, Path]], dict[str, Path], list[str]]
FLIPS = 1024  # most output spikes of a sample, over all time steps, of which each is flipped

LOSS = "loss"  # source of parameters that the loss alone reads


@dataclass
class Structure:
    """The credit in use, and the source of each site's credit.

    direct: sites whose spikes reach the outputs without passing another spike. exact, feeds: for each site, the layers
    whose input current its spikes reach in the same way: by a product of known derivatives (exact), or by a learned map
    with this path (feeds). paired: layers whose input current also depends on the events without passing spikes, so
    that only differences between copies show the effect of spikes. recurrent: the paths of learned recurrent currents.
    from_outputs: sites with learned feedback from the outputs. These act on the outputs only through something without
    a derivative, or feed a layer at other time steps by a learned map, or feed a layer too wide for a matrix, or are
    black boxes whose outputs do not each belong to one input.
    """

    credit: CreditKind
    direct: set[str]
    exact: dict[str, list[str]]
    feeds: dict[str, dict[str, Path]]
    paired: set[str]
    recurrent: dict[str, Path]
    from_outputs: list[str]
    output_functions: int | None  # functions of time that resolve the outputs; None: outputs without a time axis
    parameters: dict[str, list[str]]  # parameter -> sources of its gradient: "outputs", sites, or LOSS alone
    differentiable: bool  # whether the loss has a gradient in the outputs
    responding: set[str]  # black boxes with a learned response
    driven: set[str] | None  # sites that depend on events without passing spikes; None: not looked for
    treatment: LossTreatment = field(default_factory=LossTreatment)  # which losses are smoothed or have no gradient
    weights: dict[str, WeightNoise] = field(default_factory=dict)  # parameters with noise of their own
    products: bool = True  # whether maps are products of derivatives, and recurrent weights are read
    recurs: set[str] = field(default_factory=set)  # neurons of `ulr_snn` with recurrent weights
    noiseless: set[str] = field(default_factory=set)  # sites whose spikes only their own reset reads; they get no noise
    pools: bool = True  # whether there is max pooling
    changes: bool = True  # whether the model changes spikes in place
    current_noise: bool = False  # whether there are sites with noise on their input current
    detached: list[str] = field(default_factory=list)  # names of loss functions without a gradient
    brought: list[Tensor] = field(default_factory=list)  # parameters that the losses bring themselves
    joint: bool = False  # whether credit goes through code whose state is not known, so that all passes must be linked

    @property
    def needs_pairs(self) -> bool:
        """True if there is feedback that can be learned only from pairs of copies."""
        return bool(self.from_outputs or self.paired)

    @property
    def all_exact(self) -> bool:
        """True if credit "feedback" consists of products of known derivatives in all layers."""
        learned = any(self.feeds.values()) or self.recurrent or self.from_outputs or self.current_noise
        return self.products and not self.credit.unbiased and not (learned or self.treatment.gradientless)

    @property
    def has_readout(self) -> bool:
        """True if a parameter's gradient comes from the outputs alone, and so is exact."""
        return any(sources == ["outputs"] for sources in self.parameters.values())

    @property
    def untrained(self) -> list[str]:
        """The trainable parameters that no gradient reaches."""
        return [name for name, sources in self.parameters.items() if not sources]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        p: Pass,
        credit: CreditKind,
        maps: str,
        driven_by_events: Callable[[], set[str]],
        sites_without_effect: Callable[[list[str]], set[str]],
    ) -> "Structure":
        """Finds the structure from a first pass p. driven_by_events, sites_without_effect: see replay.py."""
        credit = chosen(credit, differentiable=bool(p.ends))
        reached = {"outputs": leaves([end for end, _ in p.ends])}
        reached |= {record.site: leaves([record.x]) for record in p.records}
        direct = {r.site for r in p.records if reaches(r, reached["outputs"])}
        nowhere = [
            r.site
            for r in p.records
            if r.site not in direct and not any(reaches(r, reached[t.site]) for t in p.records if t is not r)
        ]
        noiseless = sites_without_effect(nowhere) if nowhere else set()
        products = maps != "learned"
        noiseless |= {r.site for r in p.records if r.site in nowhere and inside(r)}  # such as a reset's own decision
        joint = isinstance(credit, Learned) and any(inside(r) for r in p.records)
        if joint:
            check_joint(p, credit, products, set(nowhere) - noiseless)
        find = joint_routes if joint else routes
        exact, feeds, recurrent, from_outputs = find(p, reached, set(nowhere), products, credit)
        fed = {target for paths in feeds.values() for target in paths}
        driven = driven_by_events() if fed else None
        parameters = {
            name: [source for source, ids in reached.items() if id(q) in ids and source not in noiseless]
            for name, q in model.named_parameters()
            if q.requires_grad
        }
        boxes = [r for r in p.records if isinstance(r, CurrentRecord)]
        return cls(
            credit,
            direct,
            exact,
            feeds,
            paired=fed & (driven or set()),
            recurrent=recurrent,
            from_outputs=[site for site in from_outputs if site not in noiseless],
            output_functions=output_functions(p, credit),
            parameters=parameters,
            differentiable=p.error is not None,
            responding={r.site for r in boxes if r.elementwise},
            driven=driven,
            products=products,
            recurs={r.site for r in p.records if r.fed_back is not None},
            noiseless=noiseless,
            pools=p.pools,
            changes=p.changes,
            current_noise=bool(boxes),
            joint=joint,
        )

    def summarise(self, outputs: Tensor) -> Tensor:
        """Projects outputs over time on the output functions, o [rows, O], so that ΔL = e · Δo."""
        if self.output_functions is None:
            return outputs.flatten(1)
        basis = time_basis(self.output_functions, len(outputs), outputs)
        return torch.einsum("rt,tbo->bro", basis, outputs.flatten(2)).flatten(1)

    def summarise_error(self, error: Tensor) -> Tensor:
        """Returns e [rows, O] that belongs to o of `summarise`."""
        return self.summarise(error if self.output_functions is None else error / len(error))


def chosen(credit: CreditKind, differentiable: bool) -> CreditKind:
    """Returns the credit for a loss that is differentiable in the outputs or is not. Raises UsageError if the credit
    needs the loss's gradient."""
    if isinstance(credit, Auto):
        return credit.chosen(differentiable)
    if credit.goes_back and not differentiable:
        raise UsageError(
            f"the loss has no gradient with respect to the outputs, which credit={credit.name!r} needs; "
            "use credit='global', or noise={'outputs': OutputNoise()}"
        )
    return credit


def output_functions(p: Pass, credit: CreditKind) -> int | None:
    """Returns the number of functions of time that resolve the outputs; None for outputs without a time axis."""
    if p.outputs.ndim < 3:
        return None
    error = p.error
    if error is None or not isinstance(credit, Learned):
        return 1
    change, size = ranks.greatest(torch.stack([(error - error[:1]).abs().max(), error.abs().max()]))
    varies = bool(change > 1e-6 * size)
    return credit.time_functions if varies else 1


def treatment_of(
    objective: Objective, p: Pass, credit: CreditKind, noise: Mapping[str, Any], model: nn.Module
) -> LossTreatment:
    """Decides which of an objective's losses are smoothed, and which have no gradient. noise["outputs"], an OutputNoise
    or None, decides for the losses without a gradient. Without it, credit "auto" smooths losses of outputs that are no
    spikes: a parameter comes after the last spike, or the loss reads sums. Of output spikes it takes the effect of
    each, where that is cheap."""
    # A gradient that is zero everywhere (of a sign, of rounding) is as useless as none.
    gradientless = p.evaluation.without_gradient(flat=isinstance(credit, Auto))
    site = noise.get("outputs", OutputNoise() if isinstance(credit, Auto) else None)
    smoothed = (
        gradientless if isinstance(noise.get("outputs"), OutputNoise) or reads_out(p, model) else objective.of_totals
    )
    smoothed = smoothed & gradientless if isinstance(site, OutputNoise) else frozenset()
    flipped = (gradientless - smoothed) & flippable(objective, p) if isinstance(credit, Auto) else frozenset()
    return LossTreatment(dict.fromkeys(smoothed, site), flipped, gradientless - smoothed - flipped)


def flippable(objective: Objective, p: Pass) -> frozenset[int]:
    """Returns the losses that may be evaluated with every output spike flipped: with a name, or objects of a library.
    A function of the user's own may cost too much."""
    outputs = p.outputs
    if outputs.ndim != 3 or not outputs.requires_grad or outputs.shape[0] * outputs.shape[2] > FLIPS:
        return frozenset()  # without a graph, outputs are no spikes but what a simulator made of them
    if ranks.anywhere(bool(((outputs != 0) & (outputs != 1)).any()))[0]:
        return frozenset()
    return frozenset(i for i, (_, loss) in enumerate(objective.losses) if isinstance(loss, NamedLoss) or loss.reads_one)


def reads_out(p: Pass, model: nn.Module) -> bool:
    """Returns whether the outputs depend on a parameter without passing a spike."""
    reached = leaves([p.outputs])
    return any(id(q) in reached for q in model.parameters())


def routes(p: Pass, reached: dict[str, set[int]], nowhere: set[str], products: bool, credit: CreditKind) -> Routes:
    """Returns exact, feeds, recurrent and from_outputs of `Structure`. reached: ids of the leaves that a site's drive
    depends on. nowhere: sites without a differentiable path to the outputs or to another layer. products: see there.
    All are empty with a credit that does not learn feedback."""
    exact: dict[str, list[str]] = {}
    feeds: dict[str, dict[str, Path]] = {}
    recurrent: dict[str, Path] = {}
    from_outputs: list[str] = []
    if not isinstance(credit, Learned):
        return exact, feeds, recurrent, from_outputs
    entries = credit.limits.entries
    for i, r in enumerate(p.records):
        targets = [t for t in p.records if t is not r and reaches(r, reached[t.site])]
        mixed = isinstance(r, CurrentRecord) and not r.elementwise  # its response is not learned
        later = {t.site for t in p.records[i + 1 :]}
        exact[r.site] = [
            t.site for t in targets if products and not mixed and t.site in later and not steps_between(r, t)
        ]
        others = [t for t in targets if t.site not in exact[r.site]]
        in_step = [] if mixed else [target for target in others if feeds_in_step(r, target)]
        paths = {target.site: path_between(r, target) for target in in_step}
        feeds[r.site] = {target: path for target, path in paths.items() if math.prod(path.size) <= entries}
        too_wide = len(feeds[r.site]) < len(others)
        if r.fed_back is not None and r.neuron.learns_recurrence and not products:
            path = Full(tuple(r.spikes.shape[2:]), tuple(r.fed_back.shape[2:]))
            if math.prod(path.size) <= entries:
                recurrent[r.site] = path
            else:
                too_wide = True
        if too_wide or r.site in nowhere or mixed:
            from_outputs.append(r.site)
    return exact, feeds, recurrent, from_outputs


def inside(record: Record) -> bool:
    """Returns whether a function of the model's own code fires at a site."""
    return bool(getattr(record.neuron, "inside", False))


def joint_routes(p: Pass, reached: dict[str, set[int]], *_: Any) -> Routes:
    """Returns the same as `routes` where credit goes through all layers and time steps in one product."""
    return (
        {r.site: [t.site for t in p.records if t is not r and reaches(r, reached[t.site])] for r in p.records},
        {},
        {},
        [],
    )


def check_joint(p: Pass, credit: CreditKind, products: bool, nowhere: set[str]) -> None:
    """Raises UsageError if credit cannot go through all layers in one product. nowhere: sites with an effect, but
    without a derivative of it."""
    site = next(r.site for r in p.records if inside(r))
    why = ""
    if credit.unbiased:
        why = f"credit={credit.name!r} needs layers one by one"
    elif not products:
        why = "maps='learned' needs layers one by one"
    elif boxes := [r.site for r in p.records if isinstance(r, CurrentRecord)]:
        why = f"{boxes[0]} has noise on its current"
    elif nowhere:
        why = f"no derivative leads from the spikes of {min(nowhere)} to the loss"
    elif stepped := [r.site for r in p.records for t in p.records if t is not r and steps_between(r, t)]:
        why = f"a function without a derivative, such as rounding, follows the spikes of {stepped[0]}"
    if why:
        raise UsageError(
            f"{site} fires by a function in the model's code, through which credit goes only in one product with all "
            f"other layers, but {why}; use credit='global' or ulr_snn's own neurons"
        )


def steps_between(source: Record, target: Record) -> bool:
    """Returns whether a function with derivative zero, such as rounding, lies between spikes and a current."""
    return passes_through(target.arrived, {id(leaf) for leaf in source.leaves}, STEPS)


def reaches(source: Record, ids: set[int]) -> bool:
    """Returns whether any spikes of the layer are among the leaves of these ids."""
    return any(id(leaf) in ids for leaf in source.leaves)


def feeds_in_step(source: Record, target: Record) -> bool:
    """Returns whether spikes of the source act on the target's input current of their own time step."""
    if target.x.shape[:2] != source.spikes.shape[:2]:
        return False
    if target.trace is None or target.whole:
        return True
    middle = len(target.x) // 2
    own_step = source.leaves if source.whole else [source.leaves[middle]]
    seen = leaves([target.arrived[middle]])
    return any(id(leaf) in seen for leaf in own_step)


def path_between(source: Record, target: Record) -> Path:
    """Returns the path from the spikes of one layer to the input current of another."""
    result = target.x if target.trace is None else target.arrived[-1]
    assert target.current is not None  # only records of time chunks have none
    shapes = tuple(source.spikes.shape[2:]), tuple(target.current.shape[2:])
    return window(result, source.leaves[-1], *shapes) or Full(*shapes)
