"""The Triton kernels against the reference in plain torch: on a GPU where there is one; and, in a process of its own
everywhere, in Triton's interpreter, which must be chosen before Triton is first imported."""

import functools
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ulr_snn import LIF, ULR, RecurrentLIF, TimeAverage, attach
from ulr_snn.credit.maps import Full
from ulr_snn.credit.recurrence import Recurrence
from ulr_snn.errors import UsageError
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.bits import pack_bits
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.reference import leaky_drive, scan
from ulr_snn.kernels.state import RESETS
from ulr_snn.model.neurons import step_mask
from ulr_snn.noise.firing import Gaussian, Logistic
from ulr_snn.noise.random import Noise
from ulr_snn.noise.secant import secant

triton = pytest.importorskip("triton")
tl = triton.language
kernels = importlib.import_module("ulr_snn.kernels.triton")
uniform = kernels.uniform

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACE = "cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
FIRING = {"logistic": Logistic(), "gaussian": Gaussian()}
LAWS = [None, *FIRING]
SHAPES = [(6, 3, 70), (1, 1, 1), (4, 2, 3, 4, 5), (3, 1, 300), (2, 3, 64)]  # 300: more than one program a row
TIE = 1e-5  # nearer than this to the uniform, rounding decides


@pytest.fixture(params=[PLACE])
def place(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors are that the kernels get."""
    return torch.device(request.param)


outside = pytest.mark.skipif(INTERPRETED, reason="starts processes of its own")


@pytest.mark.slow
@outside
def test_everything_here_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > len(SHAPES) * len(RESETS) * len(LAWS), done.stdout


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Absent())
run, made = JITFunction.run, []
JITFunction.run = lambda self, *args, warmup, **more: made.append(run(self, *args, warmup=True, **more))
from ulr_snn.kernels.triton import leaky_filter, lif_forward, recurrent_forward, recurrent_reverse, reverse_filter
%s
assert made and all(len(kernel.asm["cubin"]) for kernel in made)
print(len(made))
"""
SHORT = """
for shape, dtype in ((6, 3, 70), torch.bfloat16), ((1, 1, 1), torch.float32):
    a, words = torch.zeros(shape, dtype=dtype), [torch.zeros(shape[:2], dtype=torch.int32)] * 2
    one = torch.ones(shape[1], dtype=torch.int32)
    for reset in "subtract", "zero", "none":
        for law in None, "logistic", "gaussian":
            full = dict(mirrored=one.bool(), state=(a[0], a[0]), lengths=one, packed=True, x_dtype=dtype)
            bits = lif_forward(a, 0.9, 1.0, reset, 0.1, law, words, **full).bits
            lif_forward(a, 0.9, 1.0, reset, 0.1, law, words, dense=False, x_dtype=None)
            slope, over = (a, None) if law is None else (None, torch.ones(4))
            reverse_filter(a, 0.9, 1.0, reset, slope, a, 0.1, law, bits=bits, later=a[0], lengths=one, over=over)
        leaky_filter(a, 0.9, reset, a)
"""
RECURRENT = """
for n, dtype in (70, torch.bfloat16), (256, torch.float32), (1, torch.float32):
    a, words, weight = torch.zeros(6, 3, n, dtype=dtype), [torch.zeros(6, 3, dtype=torch.int32)] * 2, torch.zeros(n, n)
    one = torch.ones(3, dtype=torch.int32)
    for reset, law in ("subtract", None), ("zero", "logistic"), ("none", "gaussian"):
        state = (a[0], a[0]), one
        recurrent_forward(a, weight, 0.9, 1.0, reset, 0.1, law, words, one.bool() if law else None, *state)
        for_slope = (law or "logistic"), a, a[0], one, n == 70, None if law else torch.ones(4)
        recurrent_reverse(a, weight, 0.9, 1.0, reset, a, 0.1, *for_slope)
"""


@pytest.mark.slow
@outside
@pytest.mark.parametrize(("calls", "variants"), [(SHORT, 2 * 3 * (3 * 3 + 1)), (RECURRENT, 3 * 3 * 2)])
def test_the_compiler_takes_all_variants_without_a_gpu(calls, variants, tmp_path):
    settings = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE % calls], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == variants


# -- forward -----------------------------------------------------------------------------------------------


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


def normal(shape: tuple[int, ...], place: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(place)


def constants(shape: tuple[int, ...], place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """beta and threshold of every neuron, and a scale that broadcasts along the last of several dimensions."""
    features = shape[2:]
    few = (*features[:-1], 1) if len(features) > 1 else features
    beta, threshold, scale = (normal(s, place, k).sigmoid() for k, s in enumerate((features, features, few), 1))
    return beta, 0.5 + threshold, 0.2 + scale


def make_noise(rows: int, place: torch.device, mirrored: bool = False) -> Noise:
    sample = torch.arange(rows, dtype=torch.int32, device=place)
    return Noise(7, 3, sample // 2, sample % 2, mirrored=sample % 2 == 1 if mirrored else None)


@triton.jit
def write_uniforms(row1, row2, out, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(row1 + row).to(tl.uint32, bitcast=True)
    second = tl.load(row2 + row).to(tl.uint32, bitcast=True)
    tl.store(out + row * N + n, uniform(n, first, second), mask=n < N)


def test_uniforms_are_bit_for_bit_those_of_the_noise(place):
    noise, steps, rows, neurons = make_noise(4, place), 3, 4, 700
    out = torch.empty(steps, rows, neurons, device=place)
    write_uniforms[(steps * rows, triton.cdiv(neurons, 256))](*noise.words(2, 1, steps), out, neurons, 256)
    assert torch.equal(out, noise.uniform(2, 1, steps, torch.Size([neurons]), torch.float32))


def run_both(
    current: Tensor,
    constant: tuple,
    reset: str,
    law: str | None,
    noise: Noise,
    lengths: Tensor | None = None,
    **options,
) -> tuple:
    """What the kernel gives, and x and the spikes that the reference then says it should have given."""
    beta, threshold, scale = constant
    steps = len(current)
    drawn = {} if law is None else {"law": law, "words": noise.words(5, 0, steps), "mirrored": noise.mirrored}
    got = kernels.lif_forward(current, beta, threshold, reset, scale, lengths=lengths, **drawn, **options)
    # At every step the reference goes on with the kernel's spike, so that one near tie leaves the later steps alone.
    fired = got.spikes.float()
    x = scan(current.float(), beta, threshold, reset, lambda t, drive: fired[t])[1] / scale
    uniforms = noise.uniform(5, 0, steps, current.shape[2:], torch.float32)
    margin = x if law is None else FIRING[law].probability(x) - uniforms
    mask = 1 if lengths is None else step_mask(lengths, current)
    return got, x, torch.where(margin.abs() > TIE, (margin > 0).float() * mask, fired), margin


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spikes_are_those_of_the_reference(place, shape, reset, law):
    current = 0.5 + normal(shape, place)
    got, x, expected, margin = run_both(current, constants(shape, place), reset, law, make_noise(shape[1], place))
    assert torch.equal(got.spikes, expected)
    close(got.x, x)
    assert (margin.abs() > TIE).float().mean() > 0.99
    if got.spikes.numel() > 1:
        assert 0.1 < got.spikes.mean() < 0.9


@pytest.mark.parametrize("law", LAWS)
def test_constants_may_be_numbers(place, law):
    current = 0.5 + normal((4, 2, 40), place)
    numbers, noise = (0.8, 0.7, 0.4), make_noise(2, place)
    tensors = tuple(torch.tensor(number, device=place) for number in numbers)
    got, _, expected, _ = run_both(current, tensors, "zero", law, noise)
    assert torch.equal(got.spikes, expected)
    drawn = {} if law is None else {"law": law, "words": noise.words(5, 0, 4)}
    again = kernels.lif_forward(current, *numbers[:2], "zero", numbers[2], **drawn)
    assert torch.equal(again.spikes, got.spikes)
    assert torch.equal(again.x, got.x)


def test_without_noise_a_spike_needs_more_than_the_threshold(place):
    current = torch.tensor([1.0, 1.0 + 2e-7], device=place).view(1, 1, 2)
    assert kernels.lif_forward(current, 0.5, 1.0, "zero").spikes.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
def test_padding_does_not_fire_and_mirrored_rows_see_the_other_end(place, reset, law):
    shape = (5, 4, 37)
    current, lengths = 0.5 + normal(shape, place), torch.tensor([5, 1, 3, 2], device=place)
    constant, plain = constants(shape, place), make_noise(4, place)
    got, x, expected, _ = run_both(current, constant, reset, law, make_noise(4, place, mirrored=True), lengths)
    assert torch.equal(got.spikes, expected)
    close(got.x, x)
    other, full = (run_both(current, constant, reset, law, plain, until)[0] for until in (lengths, None))
    assert torch.equal(other.spikes[:, ::2], got.spikes[:, ::2])
    assert torch.equal(other.spikes[:, 1], got.spikes[:, 1]) == (law is None)
    assert not torch.equal(other.spikes, full.spikes)


@pytest.mark.parametrize("shape", SHAPES)
def test_spikes_as_bits(place, shape):
    current, noise, constant = 0.5 + normal(shape, place), make_noise(shape[1], place), constants(shape, place)
    both = run_both(current, constant, "subtract", "logistic", noise, packed=True)[0]
    assert torch.equal(both.bits, pack_bits(both.spikes.flatten(2)))
    beta, threshold, scale = constant
    drawn = {"law": "logistic", "words": noise.words(5, 0, shape[0]), "packed": True, "dense": False, "x_dtype": None}
    bits = kernels.lif_forward(current, beta, threshold, "subtract", scale, **drawn)
    assert torch.equal(bits.bits, both.bits)
    assert bits.spikes is None and bits.x is None
    assert torch.equal(bits.state[1], both.spikes[-1])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
def test_bfloat16_has_a_membrane_in_float32(place, reset, law):
    shape = (6, 2, 45)
    current, constant = (0.5 + normal(shape, place)).bfloat16(), constants(shape, place)
    got, x, expected, _ = run_both(current, constant, reset, law, make_noise(2, place), packed=True)
    assert got.spikes.dtype == torch.bfloat16
    assert torch.equal(got.spikes.float(), expected)
    assert torch.equal(got.bits, pack_bits(got.spikes))
    close(got.x, x)
    narrow = run_both(current, constant, reset, law, make_noise(2, place), x_dtype=torch.bfloat16)[0].x
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), x, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
def test_two_chunks_of_time_are_one_whole(place, reset, law):
    shape, cut = (7, 2, 3, 13), 3
    current, noise = 0.5 + normal(shape, place), make_noise(2, place, mirrored=True)
    beta, threshold, scale = constants(shape, place)
    lengths = torch.tensor([7, 5], device=place)

    def run(first: int, last: int, state=None):
        words = noise.words(5, first, last - first)
        drawn = {} if law is None else {"law": law, "words": words, "mirrored": noise.mirrored}
        now = current[first:last]
        return kernels.lif_forward(now, beta, threshold, reset, scale, state=state, lengths=lengths - first, **drawn)

    whole, early = run(0, 7), run(0, cut)
    late, forgetful = run(cut, 7, early.state), run(cut, 7)
    assert torch.equal(torch.cat([early.spikes, late.spikes]), whole.spikes)
    close(torch.cat([early.x, late.x]), whole.x, 1e-6)
    for end, same in zip(late.state, whole.state, strict=True):
        close(end, same, 1e-6)
    assert not torch.equal(forgetful.x, late.x)


# -- reverse -----------------------------------------------------------------------------------------------


def one_pass(shape: tuple[int, ...], reset: str, place: torch.device) -> tuple[LIF, Tensor, Tensor, Tensor]:
    """A layer, its scale, and x and spikes of a pass."""
    beta, threshold, scale = constants(shape, place)
    neuron = LIF(beta, threshold, reset).to(place)
    spikes, drive, _ = scan(normal(shape, place), beta, threshold, reset, lambda t, drive: (drive > 0).float())
    return neuron, scale, drive / scale, spikes


def expected_credit(
    neuron: LIF, slope: Tensor, x: Tensor, scale: Tensor, spikes: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    return Recurrence(neuron, slope.clone, spikes, lambda: x * scale + neuron.threshold).credit(a)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_credit_is_that_of_the_reference(place, shape, reset, packed):
    neuron, scale, x, spikes = one_pass(shape, reset, place)
    a, slope = normal(shape, place, 8), normal(shape, place, 9).sigmoid()
    form = {"bits": pack_bits(spikes.flatten(2))} if packed else {"spikes": spikes}
    settings = {"slope": slope, "x": x, "scale": scale, **form}
    total, g, first = kernels.reverse_filter(a, neuron.beta, neuron.threshold, reset, **settings)
    for got, expected in zip((total, g), expected_credit(neuron, slope, x, scale, spikes, a), strict=True):
        close(got, expected)
    assert torch.equal(first, g[0])
    assert torch.equal(total, a) == (reset == "none" or shape[0] == 1)
    none, alone, _ = kernels.reverse_filter(a, neuron.beta, neuron.threshold, reset, with_total=False, **settings)
    assert none is None
    close(alone, g, 1e-6)


@pytest.mark.parametrize("law", FIRING)
@pytest.mark.parametrize("reset", RESETS)
def test_the_slope_may_be_made_in_the_kernel(place, reset, law):
    shape, lengths = (6, 3, 70), torch.tensor([6, 2, 4], device=place)
    neuron, scale, x, spikes = one_pass(shape, reset, place)
    a = normal(shape, place, 8)
    settings = {"x": x, "scale": scale, "law": law, "spikes": spikes}
    for own in None, lengths:
        slope = FIRING[law].slope(x) / scale * (1 if own is None else step_mask(own, x))
        got = kernels.reverse_filter(a, neuron.beta, neuron.threshold, reset, lengths=own, **settings)
        for value, expected in zip(got, expected_credit(neuron, slope, x, scale, spikes, a), strict=False):
            close(value, expected)


@pytest.mark.parametrize("law", [None, "logistic"])
@pytest.mark.parametrize("reset", RESETS)
def test_credit_in_bfloat16(place, reset, law):
    shape = (6, 3, 70)
    neuron, scale, x, spikes = one_pass(shape, reset, place)
    a = normal(shape, place, 8).bfloat16()
    slope = (FIRING["logistic"].slope(x) / scale).bfloat16()
    expected = expected_credit(neuron, slope.float(), x, scale, spikes, a.float())
    settings = {"x": x.bfloat16(), "scale": scale, "spikes": spikes.bfloat16()}
    settings |= {"slope": slope} if law is None else {"law": law}
    total, g, first = kernels.reverse_filter(a, neuron.beta, neuron.threshold, reset, **settings)
    assert (total.dtype, g.dtype, first.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    close(total, expected[0], 2e-2)
    close(g, expected[1], 2e-2)


@pytest.mark.parametrize("reset", RESETS)
def test_credit_of_two_chunks_of_time_is_that_of_the_whole(place, reset):
    shape, cut = (7, 2, 3, 13), 3
    neuron, scale, x, spikes = one_pass(shape, reset, place)
    a, slope = normal(shape, place, 8), normal(shape, place, 9).sigmoid()

    def run(now: slice, later: Tensor | None = None):
        settings = {"slope": slope[now], "x": x[now], "spikes": spikes[now], "later": later}
        return kernels.reverse_filter(a[now], neuron.beta, neuron.threshold, reset, scale=scale, **settings)

    whole, late = run(slice(None)), run(slice(cut, None))
    early = run(slice(cut), late[2])
    for part in 0, 1:
        close(torch.cat([early[part], late[part]]), whole[part], 1e-6)
    close(early[2], whole[2], 1e-6)
    assert not torch.equal(run(slice(cut))[1], early[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_leaky_filter_is_the_gradient_of_the_drive(place, shape, reset, packed):
    neuron, _, _, spikes = one_pass(shape, reset, place)
    current, c = normal(shape, place).requires_grad_(), normal(shape, place, 8)
    leaky_drive(current, neuron.beta, neuron.threshold, reset, spikes).backward(c)
    form = {"bits": pack_bits(spikes.flatten(2))} if packed else {"spikes": spikes}
    g, first = kernels.leaky_filter(c, neuron.beta, reset, **form)
    close(g, current.grad)
    assert torch.equal(first, g[0])
    if shape[0] > 1:
        early, _ = kernels.leaky_filter(c[:1], neuron.beta, reset, later=g[1], **{k: v[:1] for k, v in form.items()})
        close(early, g[:1], 1e-6)


# -- recurrent layers --------------------------------------------------------------------------------------

LAYERS = [(4, 3, 70), (1, 1, 1), (2, 18, 33)]  # 70: more than one block; 18: more than one program


def weights(shape: tuple[int, ...], place: torch.device) -> Tensor:
    return normal((shape[2], shape[2]), place, 4) / shape[2] ** 0.5


def run_recurrent(
    current: Tensor,
    constant: tuple,
    weight: Tensor,
    reset: str,
    law: str | None,
    noise: Noise,
    lengths: Tensor | None = None,
) -> tuple:
    """What the kernel gives, and x, recurrent current and spikes that the reference then says it should have given."""
    beta, threshold, scale = constant
    steps = len(current)
    drawn = {} if law is None else {"law": law, "words": noise.words(5, 0, steps), "mirrored": noise.mirrored}
    got = kernels.recurrent_forward(current, weight, beta, threshold, reset, scale, lengths=lengths, **drawn)
    fired = got.spikes.float()
    back = functools.partial(torch.nn.functional.linear, weight=weight)
    _, drive, fed_back = scan(current.float(), beta, threshold, reset, lambda t, drive: fired[t], back)
    x = drive / scale
    uniforms = noise.uniform(5, 0, steps, current.shape[2:], torch.float32)
    margin = x if law is None else FIRING[law].probability(x) - uniforms
    mask = 1 if lengths is None else step_mask(lengths, current)
    return got, x, fed_back, torch.where(margin.abs() > TIE, (margin > 0).float() * mask, fired), margin


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("shape", LAYERS)
def test_recurrent_spikes_are_those_of_the_reference(place, shape, reset, law):
    current, weight, noise = 0.5 + normal(shape, place), weights(shape, place), make_noise(shape[1], place)
    got, x, fed_back, expected, margin = run_recurrent(current, constants(shape, place), weight, reset, law, noise)
    assert torch.equal(got.spikes, expected)
    close(got.x, x)
    close(got.fed_back, fed_back)
    assert (margin.abs() > TIE).float().mean() > 0.99
    assert shape[0] == 1 or got.fed_back.any()
    assert torch.equal(got.state[1], got.spikes[-1])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
def test_without_recurrent_weights_it_is_the_other_kernel_bit_for_bit(place, reset, law):
    shape = (5, 4, 37)
    current, lengths = 0.5 + normal(shape, place), torch.tensor([5, 1, 3, 2], device=place)
    beta, threshold, scale = constants(shape, place)
    noise = make_noise(4, place, mirrored=True)
    drawn = {} if law is None else {"law": law, "words": noise.words(5, 0, 5), "mirrored": noise.mirrored}
    given = beta, threshold, reset, scale
    alone = kernels.lif_forward(current, *given, lengths=lengths, **drawn)
    both = kernels.recurrent_forward(current, torch.zeros(37, 37, device=place), *given, lengths=lengths, **drawn)
    assert torch.equal(both.spikes, alone.spikes) and both.spikes.any()
    if INTERPRETED:  # compilers may fuse a product and a sum in one kernel and not in the other
        assert torch.equal(both.x, alone.x)
    close(both.x, alone.x)
    close(both.state[0], alone.state[0])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reset", RESETS)
def test_padding_and_mirrors_of_recurrent_layers(place, reset, law):
    shape = (5, 4, 37)
    current, lengths = 0.5 + normal(shape, place), torch.tensor([5, 1, 3, 2], device=place)
    constant, weight = constants(shape, place), weights(shape, place)
    mirrored, plain = make_noise(4, place, mirrored=True), make_noise(4, place)
    got, x, fed_back, expected, _ = run_recurrent(current, constant, weight, reset, law, mirrored, lengths)
    assert torch.equal(got.spikes, expected)
    close(got.x, x)
    close(got.fed_back, fed_back)
    other, full = (run_recurrent(current, constant, weight, reset, law, plain, until)[0] for until in (lengths, None))
    assert torch.equal(other.spikes[:, ::2], got.spikes[:, ::2])
    assert torch.equal(other.spikes[:, 1], got.spikes[:, 1]) == (law is None)
    assert not torch.equal(other.spikes, full.spikes)


@pytest.mark.parametrize("reset", RESETS)
def test_recurrent_layers_in_bfloat16(place, reset):
    shape = (5, 3, 45)
    current, weight = (0.5 + normal(shape, place)).bfloat16(), weights(shape, place)
    got, x, fed_back, expected, _ = run_recurrent(
        current, constants(shape, place), weight, reset, "logistic", make_noise(3, place)
    )
    assert got.spikes.dtype == got.fed_back.dtype == torch.bfloat16
    assert torch.equal(got.spikes.float(), expected)
    close(got.x, x)
    close(got.fed_back, fed_back, 2**-7)


@pytest.mark.parametrize("reset", RESETS)
def test_two_chunks_of_a_recurrent_layer_are_one_whole(place, reset):
    shape, cut = (7, 2, 39), 3
    current, noise, weight = 0.5 + normal(shape, place), make_noise(2, place), weights(shape, place)
    beta, threshold, scale = constants(shape, place)

    def run(first: int, last: int, state=None):
        drawn = {"law": "logistic", "words": noise.words(5, first, last - first), "state": state}
        return kernels.recurrent_forward(current[first:last], weight, beta, threshold, reset, scale, **drawn)

    whole, early = run(0, 7), run(0, cut)
    late, forgetful = run(cut, 7, early.state), run(cut, 7)
    for name in "spikes", "x", "fed_back":
        close(torch.cat([getattr(early, name), getattr(late, name)]), getattr(whole, name), 1e-6)
    for end, same in zip(late.state, whole.state, strict=True):
        close(end, same, 1e-6)
    assert not torch.equal(forgetful.fed_back, late.fed_back)


@pytest.mark.parametrize("secants", [False, True])
@pytest.mark.parametrize("law", FIRING)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("recurrent", [False, True])
def test_credit_by_law_or_secants(place, recurrent, reset, law, secants):
    for shape in [(2, 18, 70), (1, 1, 1)] if recurrent else [(3, 2, 70)]:
        neuron, scale, x, spikes = one_pass(shape, reset, place)
        a, weight, firing = normal(shape, place, 8), weights(shape, place) if recurrent else None, FIRING[law]
        lengths = (torch.arange(shape[1], device=place) % shape[0]) + 1
        over = torch.tensor([1.0, 30.0], device=place) if secants else None
        slope = firing.slope(x) if over is None else secant(firing.probability, x, over)
        slope = slope / scale * step_mask(lengths, x)
        path = Full(*[shape[2:]] * 2) if recurrent else None
        later = normal(shape[1:], place, 11)
        of_pass = slope.clone, spikes, lambda x=x, scale=scale, neuron=neuron: x * scale + neuron.threshold
        expected = Recurrence(neuron, *of_pass, path, weight).credit(a, later=later.clone())
        given = {"x": x, "scale": scale, "law": law, "spikes": spikes, "lengths": lengths, "over": over, "later": later}
        given |= {"beta": neuron.beta, "threshold": neuron.threshold, "reset": reset}
        run = functools.partial(kernels.recurrent_reverse, weight=weight) if recurrent else kernels.reverse_filter
        total, g, first = run(a, **given)
        for got, right in zip((total, g), expected, strict=True):
            close(got, right, 2e-5)
        assert torch.equal(first, g[0])
        if reset == "subtract":
            none, alone, _ = run(a, **given, with_total=False)
            assert none is None
            close(alone, g, 1e-6)


@pytest.mark.parametrize("reset", RESETS)
def test_recurrent_credit_of_two_chunks_is_that_of_the_whole(place, reset):
    shape, cut = (7, 2, 39), 3
    neuron, scale, x, spikes = one_pass(shape, reset, place)
    a, weight = normal(shape, place, 8), weights(shape, place)

    def run(now: slice, later: Tensor | None = None):
        of_pass = {"x": x[now], "spikes": spikes[now], "scale": scale, "law": "logistic", "later": later}
        return kernels.recurrent_reverse(a[now], weight, neuron.beta, neuron.threshold, reset, **of_pass)

    whole, late = run(slice(None)), run(slice(cut, None))
    early = run(slice(cut), late[2])
    for part in 0, 1:
        close(torch.cat([early[part], late[part]]), whole[part], 1e-6)
    assert not torch.equal(run(slice(cut))[1], early[1])


# -- wrong uses --------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_take(place):
    ok = torch.zeros(3, 2, 5, device=place)
    with pytest.raises(UsageError, match="float64"):
        kernels.lif_forward(ok.double(), 0.9, 1.0, "zero")
    with pytest.raises(UsageError, match="reset='soft'"):
        kernels.lif_forward(ok, 0.9, 1.0, "soft")
    with pytest.raises(UsageError, match="law='cauchy'"):
        kernels.lif_forward(ok, 0.9, 1.0, "zero", law="cauchy")
    with pytest.raises(UsageError, match="words"):
        kernels.lif_forward(ok, 0.9, 1.0, "zero", law="logistic")
    with pytest.raises(UsageError, match=r"\(2, 2\) in a place of shape \(3, 2\)"):
        kernels.lif_forward(ok, 0.9, 1.0, "zero", law="logistic", words=make_noise(2, place).words(0, 0, 2))
    with pytest.raises(UsageError, match="either slope or law"):
        kernels.reverse_filter(ok, 0.9, 1.0, "none")
    with pytest.raises(UsageError, match="needs x"):
        kernels.reverse_filter(ok, 0.9, 1.0, "zero", slope=ok, spikes=ok)
    with pytest.raises(UsageError, match="spikes or bits"):
        kernels.leaky_filter(ok, 0.9, "zero")
    with pytest.raises(UsageError, match=r"\(4, 4\) in a place of shape \(5, 5\)"):
        kernels.recurrent_forward(ok, torch.zeros(4, 4, device=place), 0.9, 1.0, "zero")
    with pytest.raises(UsageError, match="words"):
        kernels.recurrent_forward(ok, torch.zeros(5, 5, device=place), 0.9, 1.0, "zero", law="logistic")
    with pytest.raises(UsageError, match=r"\(3, 2, 4\) in a place of shape \(3, 2, 5\)"):
        kernels.leaky_filter(ok, 0.9, "zero", spikes=ok[..., :4])


def training_steps(
    kind: str, reset: str, place: torch.device, monkeypatch: pytest.MonkeyPatch, **options
) -> list[Tensor]:
    """The gradients after two steps of a net with a recurrent layer, by this code."""
    x = (torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(5)) < 0.4).float().to(place) * 3
    y, lengths = torch.arange(4, device=place) % 3, torch.tensor([5, 2, 5, 4], device=place)
    monkeypatch.setattr(dispatch, "choice", lambda like: (kind, "asked for"))
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 5), LIF(reset=reset), torch.nn.Linear(5, 4), RecurrentLIF(4, reset=reset)
    model = torch.nn.Sequential(*layers, TimeAverage(), torch.nn.Linear(4, 3)).to(place)
    with attach(model, ULR(**{"firing": Logistic(scale=0.3), **options}), seed=1, total_steps=20) as ulr:
        for _ in range(2):
            model.zero_grad()
            ulr.backward(x, y, lengths=lengths)
    return [q.grad for q in model.parameters()]


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the calls of the launchers."""
    calls = Counter()
    for name in "lif_forward", "reverse_filter", "recurrent_forward", "recurrent_reverse":
        launch = getattr(kernels, name)

        def call(*given, name=name, launch=launch, **named):
            calls[name] += 1
            return launch(*given, **named)

        monkeypatch.setattr(kernels, name, call)
    return calls


def same_gradients(ours: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ours, others, strict=True):
        assert other.any() and (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("options", [{}, {"credit": "residual"}, {"memory": "replay"}], ids=str)
def test_gradients_by_the_kernels_are_those_of_the_reference(place, options, reset, monkeypatch):
    used = counted(monkeypatch)
    expected = training_steps("reference", reset, place, monkeypatch, **options)
    assert not used
    same_gradients(training_steps("gpu", reset, place, monkeypatch, **options), expected)
    assert set(used) == {"lif_forward", "reverse_filter", "recurrent_forward", "recurrent_reverse"}


def test_gradients_with_the_derivative_are_those_of_the_reference(place, monkeypatch):
    firing = Logistic(scale=0.3, secants=0)
    expected = training_steps("reference", "zero", place, monkeypatch, firing=firing)
    same_gradients(training_steps("gpu", "zero", place, monkeypatch, firing=firing), expected)


def test_a_wide_recurrent_layer_runs_step_by_step(place, monkeypatch):
    used = counted(monkeypatch)
    expected = training_steps("reference", "subtract", place, monkeypatch)
    monkeypatch.setattr(limits, "recurrent", 3)
    same_gradients(training_steps("gpu", "subtract", place, monkeypatch), expected)
    assert set(used) == {"lif_forward", "reverse_filter"}


@pytest.mark.parametrize("broken", ["recurrent_forward", "recurrent_reverse"])
def test_nothing_replaces_a_kernel_that_fails(place, broken, monkeypatch):
    def fails(*given, **named):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(kernels, broken, fails)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        training_steps("gpu", "subtract", place, monkeypatch)
