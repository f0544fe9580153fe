"""What one forward pass shows about a model: which layers feed which, and where each gradient comes from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.feedback import ENTRIES, time_basis
from ulr_snn.credit.kinds import Auto, CreditKind, Learned
from ulr_snn.credit.maps import Full, Path, window
from ulr_snn.errors import UsageError
from ulr_snn.losses.evaluation import LossTreatment
from ulr_snn.losses.named import Objective
from ulr_snn.model.graph import leaves, passes_through
from ulr_snn.model.passes import Pass
from ulr_snn.noise.kinds import OutputNoise, WeightNoise
from ulr_snn.sites.records import CurrentRecord, Record

STEPS = ("Round", "Sign", "Floor", "Ceil", "Trunc", "Heaviside", "Fix")  # functions of torch with derivative zero


@dataclass
class Structure:
    """What the first pass shows: the credit in use, and where each site's credit comes from.

    direct: sites whose spikes reach the outputs without passing another spike. exact, feeds: per site, the layers whose
    input current its spikes reach so: those by a product of known derivatives, and those by a learned map, with its
    path. paired: layers whose input current also depends on the events otherwise than by spikes, so that only
    differences between copies tell what spikes do. recurrent: per site with a learned recurrent current, the path of
    its spikes to it. from_outputs: sites with learned feedback from the outputs: those that act on the outputs only
    through something that is not differentiable, those with a learned map that feed a layer at other time steps or one
    too wide for a matrix between the two, and black boxes whose outputs do not belong to inputs one by one.
    """

    credit: CreditKind
    direct: set[str]
    exact: dict[str, list[str]]
    feeds: dict[str, dict[str, Path]]
    paired: set[str]
    recurrent: dict[str, Path]
    from_outputs: list[str]
    output_functions: int | None  # functions of time that resolve the outputs; None: outputs without a time axis
    parameters: dict[str, list[str]]  # parameter -> "outputs" and sites that its gradient comes from
    differentiable: bool  # whether the loss has a gradient in the outputs
    responding: set[str]  # black boxes with a learned response
    driven: set[str] | None  # sites that see the events otherwise than by spikes; None where it does not matter
    treatment: LossTreatment = field(default_factory=LossTreatment)  # how the losses are taken
    weights: dict[str, WeightNoise] = field(default_factory=dict)  # parameters with noise of their own
    products: bool = True  # whether maps are taken as products, and recurrent weights as they are
    recurs: set[str] = field(default_factory=set)  # sites with recurrent weights of ours
    quiet: set[str] = field(default_factory=set)  # sites whose spikes nobody reads, but for their own reset: no noise
    pools: bool = True  # whether there is max pooling
    changes: bool = True  # whether the model changes spikes in place
    current_noise: bool = False  # whether there are sites with noise on their input current
    detached: list[str] = field(default_factory=list)  # callables without a gradient, where nobody has said so

    @property
    def needs_pairs(self) -> bool:
        """Whether there is feedback that only pairs of copies can teach."""
        return bool(self.from_outputs or self.paired)

    @property
    def all_exact(self) -> bool:
        """Whether credit "feedback" is made of products of known derivatives alone, in all layers."""
        learned = any(self.feeds.values()) or self.recurrent or self.from_outputs or self.current_noise
        return self.credit.name == "feedback" and self.products and not (learned or self.treatment.gradientless)

    @property
    def has_readout(self) -> bool:
        """Whether any parameter's gradient is exact, through the outputs alone."""
        return any(sources == ["outputs"] for sources in self.parameters.values())

    @property
    def untrained(self) -> list[str]:
        """Trainable parameters that no gradient reaches."""
        return [name for name, sources in self.parameters.items() if not sources]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        p: Pass,
        credit: CreditKind,
        maps: str,
        driven_by_events: Callable[[], set[str]],
        read_by_nobody: Callable[[list[str]], set[str]],
    ) -> "Structure":
        """driven_by_events, read_by_nobody: see `Forward`; called where it matters."""
        if isinstance(credit, Auto):
            credit = credit.chosen(differentiable=bool(p.ends))
        if not p.ends and credit.goes_back:
            raise UsageError(
                f"the loss has no gradient with respect to the outputs, which credit={credit.name!r} needs; "
                "use credit='global', or noise={'outputs': OutputNoise()}"
            )
        reached = {"outputs": leaves([end for end, _ in p.ends])}
        reached |= {record.site: leaves([record.x]) for record in p.records}
        direct = {r.site for r in p.records if reaches(r, reached["outputs"])}
        nowhere = [
            r.site
            for r in p.records
            if r.site not in direct and not any(reaches(r, reached[t.site]) for t in p.records if t is not r)
        ]
        quiet = read_by_nobody(nowhere) if nowhere else set()
        exact, feeds, recurrent, from_outputs = {}, {}, {}, []
        if isinstance(credit, Learned):
            exact, feeds, recurrent, from_outputs = routes(p, reached, set(nowhere), maps != "learned")
            from_outputs = [site for site in from_outputs if site not in quiet]
        fed = {target for paths in feeds.values() for target in paths}
        driven = driven_by_events() if fed else None
        paired = fed & driven if fed else set()
        parameters = {
            name: [source for source, ids in reached.items() if id(q) in ids and source not in quiet]
            for name, q in model.named_parameters()
            if q.requires_grad
        }
        functions = None
        if p.outputs.ndim >= 3:
            functions = 1
            if (
                isinstance(credit, Learned)
                and p.error is not None
                and (p.error - p.error[:1]).abs().max() > 1e-6 * p.error.abs().max()
            ):
                functions = credit.time_functions
        differentiable = p.error is not None
        responding = {r.site for r in p.records if isinstance(r, CurrentRecord) and r.elementwise}
        recurs = {r.site for r in p.records if r.fed_back is not None}
        maps_of = direct, exact, feeds, paired, recurrent, from_outputs
        found = *maps_of, functions, parameters, differentiable, responding
        currents = any(isinstance(r, CurrentRecord) for r in p.records)
        kinds = {"products": maps != "learned", "recurs": recurs, "quiet": quiet}
        return cls(credit, *found, driven, **kinds, pools=p.pools, changes=p.changes, current_noise=currents)

    def summarise(self, outputs: Tensor) -> Tensor:
        """o [rows, O]: outputs over time on the output functions, so that ΔL = e · Δo."""
        if self.output_functions is None:
            return outputs.flatten(1)
        basis = time_basis(self.output_functions, len(outputs), outputs)
        return torch.einsum("rt,tbo->bro", basis, outputs.flatten(2)).flatten(1)

    def summarise_error(self, error: Tensor) -> Tensor:
        """e [rows, O] that belongs to `summarise`."""
        return self.summarise(error if self.output_functions is None else error / len(error))


def treatment_of(
    objective: Objective, p: Pass, credit: CreditKind, noise: Mapping[str, Any], model: nn.Module
) -> LossTreatment:
    """How the objective's losses are taken. Of those without a gradient, `noise` may say so by an OutputNoise (or None)
    for "outputs"; else credit "auto" smooths those whose outputs are no spikes: a parameter comes after the last spike,
    or the loss is known to look at sums."""
    # A gradient that is zero everywhere (of a sign, of rounding) tells no more than none.
    gradientless = p.evaluation.without_gradient(flat=isinstance(credit, Auto))
    site = noise.get("outputs", OutputNoise() if isinstance(credit, Auto) else None)
    smoothed = (
        gradientless if isinstance(noise.get("outputs"), OutputNoise) or reads_out(p, model) else objective.of_totals
    )
    smoothed = smoothed & gradientless if isinstance(site, OutputNoise) else frozenset()
    return LossTreatment(dict.fromkeys(smoothed, site), gradientless - smoothed)


def reads_out(p: Pass, model: nn.Module) -> bool:
    """Whether the outputs depend on a parameter otherwise than by spikes."""
    reached = leaves([p.outputs])
    return any(id(q) in reached for q in model.parameters())


def routes(
    p: Pass, reached: dict[str, set[int]], nowhere: set[str], products: bool
) -> tuple[dict[str, list[str]], dict[str, dict[str, Path]], dict[str, Path], list[str]]:
    """exact, feeds, recurrent, from_outputs of `Structure`.

    reached: ids of the leaves that a site's drive depends on. nowhere: sites from which no differentiable path leads to
    the outputs or to another layer. products: whether maps are taken as exact vector-Jacobian products where there are
    some, and recurrent weights as they are."""
    exact: dict[str, list[str]] = {}
    feeds: dict[str, dict[str, Path]] = {}
    recurrent: dict[str, Path] = {}
    from_outputs = []
    for i, r in enumerate(p.records):
        targets = [t for t in p.records if t is not r and reaches(r, reached[t.site])]
        mixed = isinstance(r, CurrentRecord) and not r.elementwise  # what its inputs do to its outputs is not learned
        later = {t.site for t in p.records[i + 1 :]}
        exact[r.site] = [
            t.site for t in targets if products and not mixed and t.site in later and not steps_between(r, t)
        ]
        others = [t for t in targets if t.site not in exact[r.site]]
        in_step = [] if mixed else [target for target in others if feeds_in_step(r, target)]
        paths = {target.site: path_between(r, target) for target in in_step}
        feeds[r.site] = {target: path for target, path in paths.items() if math.prod(path.size) <= ENTRIES}
        learns = r.fed_back is not None and r.neuron.learns_recurrence and not products
        if learns:
            path = Full(tuple(r.spikes.shape[2:]), tuple(r.fed_back.shape[2:]))
            if math.prod(path.size) <= ENTRIES:
                recurrent[r.site] = path
        too_wide = len(feeds[r.site]) < len(others) or (learns and r.site not in recurrent)
        if too_wide or r.site in nowhere or mixed:
            from_outputs.append(r.site)
    return exact, feeds, recurrent, from_outputs


def steps_between(source: Record, target: Record) -> bool:
    """Whether a step function lies between spikes and a current: rounding and such, whose derivative is zero."""
    return passes_through(target.arrived, {id(leaf) for leaf in source.leaves}, STEPS)


def reaches(source: Record, ids: set[int]) -> bool:
    """Whether any spikes of the layer are among the leaves of these ids."""
    return any(id(leaf) in ids for leaf in source.leaves)


def feeds_in_step(source: Record, target: Record) -> bool:
    """Whether spikes of the source act on the target's input current of their own time step."""
    if target.current.shape[:2] != source.spikes.shape[:2]:
        return False
    if target.trace is None or target.whole:
        return True
    middle = len(target.current) // 2
    own_step = source.leaves if source.whole else [source.leaves[middle]]
    seen = leaves([target.arrived[middle]])
    return any(id(leaf) in seen for leaf in own_step)


def path_between(source: Record, target: Record) -> Path:
    """How the spikes of one layer act on the input current of another."""
    shapes = tuple(source.spikes.shape[2:]), tuple(target.current.shape[2:])
    result = target.x if target.trace is None else target.arrived[-1]
    return window(result, source.leaves[-1], *shapes) or Full(*shapes)
