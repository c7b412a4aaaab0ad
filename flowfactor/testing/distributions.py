"""Checks of priors, encoders and decoders: parts that give distributions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from flowfactor.control import Control, Schedule
from flowfactor.encoders import SparseWeights
from flowfactor.priors import Prior, SpikeAndSlab
from flowfactor.testing.contract import BATCHES, Contract, changed, check_gradients, check_module, like_of, quiet

DRAWS = 20_000
ENOUGH = 400.0  # effective draws by which an importance-weighted mean is judged


def check_prior(p: Prior | SpikeAndSlab, *, without: Iterable[str] = ()) -> None:
    r"""Checks that a prior keeps what objectives rely on.

    Of a `Prior`: the batch and event shapes of ``at(t, control)`` and of log densities and draws, under every kind of
    control and time; gradients of log densities; log densities against draws, by importance sampling from a wider normal:
    $E\,p/r = 1$ and the moments that it gives against those of draws, within six standard errors (left out where too few
    draws count, as in many dimensions). Of a `SpikeAndSlab`: its divergence against its log densities at draws. Of both:
    copies, ``state_dict``, double precision.

    Args:
        p: The prior.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``p`` is no prior.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_prior(ff.priors.Diffusion(ff.priors.GaussianMixture(2, components=3), num_flows=2))
    """
    contract = Contract(p, without)
    if isinstance(p, SpikeAndSlab):
        return _check_sparse(contract, p)
    if not isinstance(p, Prior):
        raise TypeError(f"check_prior takes a flowfactor.priors.Prior or SpikeAndSlab, got {type(p).__name__}")
    flows = getattr(p, "num_flows", 2)
    double = copy.deepcopy(p).double() if contract.keeps("double") else p
    for module in (p, double):
        like = like_of(module) if module is p else like_of(module).double()
        for batch in BATCHES:
            for kind, control in contract.controls(batch, flows, like):
                if kind.startswith("weights") or isinstance(control, Schedule):
                    control = _positive(control)
                for t in (1, contract.rand(*batch, like=like)):
                    what = f"{kind} and batch {list(batch)}, in {like.dtype}"
                    q = contract.attempt(f"at() takes {what}", lambda t=t, c=control, m=module: m.at(t, c))
                    lead = q.batch_shape
                    fits = isinstance(q, Distribution) and tuple(q.event_shape) == (p.dim,) and lead in ((), batch)
                    contract.require(f"at() with {what}", fits, q, f"a Distribution with event [{p.dim}]")
                    z = contract.randn(*batch, p.dim, like=like)
                    contract.tensor(f"log_prob ({what})", q.log_prob(z), batch, like)
                    contract.tensor(f"draws ({what})", _seeded(lambda q=q: q.sample((3,))), (3, *lead, p.dim), like)
    like = like_of(double)
    z, index = contract.randn(5, p.dim, like=like), torch.arange(5, device=like.device) % flows

    def density(m: Prior) -> Sequence[Tensor]:
        return [m.at(contract_times(like), index).log_prob(z)]

    def contract_times(like: Tensor) -> Tensor:
        return torch.arange(5.0, device=like.device).to(like) / 3

    double = changed(double, contract)
    whole = quiet(lambda: density(double)[0])
    each = [double.at(t, int(k)).log_prob(x) for t, k, x in zip(contract_times(like), index, z, strict=True)]
    contract.close("each element of a batch as by itself", whole, torch.stack(each))
    _check_density(contract, double.at(0.7, flows - 1))
    check_module(contract, double, density)
    check_gradients(contract, double, density)
    contract.refuses("a time that does not fit the control", lambda: p.at(torch.zeros(2, device=like.device), index))
    return None


def check_encoder(e: nn.Module, shape: Sequence[int] | None = None, *, without: Iterable[str] = ()) -> None:
    """Checks that an encoder keeps what models rely on.

    It maps inputs ``[*batch, *shape]`` to a distribution with batch shape ``[*batch]``: a posterior of latents, a
    ``Categorical`` of flows or `SparseWeights`. Shapes under any leading dimensions, each sample as by itself,
    gradients of parameters against central differences, copies, ``state_dict``, double precision, refusals. It is looked at
    in evaluation mode.

    Args:
        e: The encoder.
        shape: Shape of one input, for example ``(C, H, W)``; None takes the encoder's ``event_shape``.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If no shape is known.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_encoder(ff.encoders.MLPEncoder((1, 8, 8), latent_dim=4))
    """
    contract = Contract(e, without)
    event = _shape("shape", shape, getattr(e, "event_shape", None))
    sizes = {"latent_dim": getattr(e, "latent_dim", None), "num_flows": getattr(e, "num_flows", None)}

    def moments(e: nn.Module, x: Tensor) -> list[Tensor]:
        q = e(x)
        batch = x.shape[: x.ndim - len(event)]
        fits = isinstance(q, Distribution | SparseWeights) and tuple(q.batch_shape) == tuple(batch)
        contract.require("the encoder gives a distribution of the batch", fits, q, f"batch shape {list(batch)}")
        if isinstance(q, Categorical):
            contract.require("it tells num_flows flows apart", q.logits.shape[-1] == sizes["num_flows"], q, sizes)
            return [q.logits]
        if isinstance(q, SparseWeights):
            return [q.spike_logits, q.mean]
        dim = sizes["latent_dim"] or q.event_shape[-1]
        contract.require("the posterior is one of latents [D]", tuple(q.event_shape) == (dim,), q, f"event [{dim}]")
        return [q.mean, q.variance]

    _check_mapping(contract, e, event, moments, "frames")


def check_decoder(d: nn.Module, latent_dim: int | None = None, *, without: Iterable[str] = ()) -> None:
    """Checks that a decoder keeps what models rely on.

    It maps latents ``[*batch, D]`` to a distribution of frames with batch shape ``[*batch]``, and ``mean`` to their means;
    otherwise as `check_encoder`.

    Args:
        d: The decoder.
        latent_dim: D; None takes the decoder's ``latent_dim``.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If no size of latents is known.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_decoder(ff.encoders.MLPDecoder(4, (1, 8, 8), likelihood="gaussian"))
    """
    contract = Contract(d, without)
    dim = latent_dim if latent_dim is not None else getattr(d, "latent_dim", None)
    event = _shape("latent_dim", None if dim is None else [dim], None)

    def outputs(d: Any, z: Tensor) -> list[Tensor]:
        p, mean = d(z), d.mean(z)
        frame = tuple(p.event_shape)
        fits = isinstance(p, Distribution) and tuple(p.batch_shape) == tuple(z.shape[:-1])
        contract.require("the decoder gives a distribution of the batch", fits, p, f"batch shape {list(z.shape[:-1])}")
        declared = tuple(getattr(d, "event_shape", frame))
        contract.require("frames have the event_shape", frame == declared, list(frame), list(declared))
        contract.tensor("the mean frame", mean, (*z.shape[:-1], *frame), z)
        x = Contract(d).rand(*frame, like=z)
        log_p = p.log_prob(x.expand(p.batch_shape + p.event_shape))
        contract.tensor("log_prob", log_p, z.shape[:-1], z)
        return [mean, log_p]

    _check_mapping(contract, d, event, outputs, "latents")


def _check_mapping(
    contract: Contract,
    part: nn.Module,
    event: tuple[int, ...],
    outputs: Callable[[Any, Tensor], list[Tensor]],
    what: str,
) -> None:
    """What encoders and decoders both promise."""
    part = copy.deepcopy(part).eval()
    double = copy.deepcopy(part).double() if contract.keeps("double") else part
    for module in (part, double):
        like = like_of(module)
        for batch in BATCHES:
            x = contract.rand(*batch, *event, like=like)
            promise = f"{what} {list(x.shape)} in {like.dtype}"
            for y in contract.attempt(promise, lambda x=x, m=module: outputs(m, x)):
                contract.tensor(f"outputs of {promise}", y, (*batch, *y.shape[len(batch) :]), x)
    like = like_of(double)
    x = contract.rand(2, 3, *event, like=like)
    whole, flat = outputs(double, x), outputs(double, x.reshape(6, *event))
    for a, b in zip(whole, flat, strict=True):
        contract.close("leading dimensions are as good as a flat batch", a.reshape(b.shape), b)
    if contract.keeps("permutation"):
        order = torch.tensor([4, 2, 0, 5, 1, 3], device=like.device)
        for a, b in zip(outputs(double, x.reshape(6, *event)[order]), flat, strict=True):
            contract.close("a permuted batch is permuted", a, b[order])
        for a, b in zip(outputs(double, x[0, 0]), whole, strict=True):
            contract.close("each sample as by itself", a, b[0, 0])
    check_module(contract, double, lambda m: outputs(m, x[0]))
    check_gradients(contract, double, lambda m: outputs(m, x[0]))
    contract.refuses(
        f"{what} of another shape", lambda: part(torch.zeros(2, *event[:-1], event[-1] + 1).to(like_of(part)))
    )
    contract.refuses(f"{what} of whole numbers", lambda: part(torch.zeros(2, *event, dtype=torch.long).to(like.device)))


def _check_density(contract: Contract, q: Distribution) -> None:
    """Log densities of a distribution of vectors against its draws, by importance sampling."""
    drawn = _seeded(lambda: q.sample((DRAWS,)))
    wide = Independent(Normal(drawn.mean(0), 1.3 * drawn.std(0) + 1e-6), 1)
    z = wide.mean + wide.stddev * contract.randn(DRAWS, drawn.shape[-1], like=drawn)
    w = (quiet(lambda: q.log_prob(z)) - wide.log_prob(z)).exp()
    if not float(w.sum() ** 2 / w.square().sum()) > ENOUGH:
        return

    def agree(promise: str, found: Tensor, error: Tensor, expected: Tensor) -> None:
        far = (found - expected).abs() > 6 * error + 1e-3 * (1 + expected.abs())
        contract.require(promise, not bool(far.any()), found.tolist(), f"{expected.tolist()} to {error.tolist()}")

    root = math.sqrt(DRAWS)
    agree("exp(log_prob) integrates to 1", w.mean(), w.std() / root, torch.ones_like(w.mean()))
    for power in (1, 2):
        terms, moments = w.unsqueeze(-1) * z**power, drawn**power
        error = (terms.var(0) + moments.var(0)).sqrt() / root
        agree(f"moment {power} by log_prob is that of draws", terms.mean(0), error, moments.mean(0))


def _check_sparse(contract: Contract, p: SpikeAndSlab) -> None:
    p = copy.deepcopy(p).double() if contract.keeps("double") else p
    like, steps = like_of(p), 3
    draws = [p.sample((5,), steps=steps, generator=torch.Generator(like.device).manual_seed(1)) for _ in range(2)]
    contract.close("equal generators draw equal weights", draws[0].weights, draws[1].weights)
    contract.tensor("weights", draws[0].weights, (5, steps, p.num_flows, 1), like)
    contract.tensor("log_prob", p.log_prob(draws[0]), (5,), like)
    rates = p.sample((DRAWS,), steps=steps, generator=torch.Generator(like.device).manual_seed(2)).spikes.mean(0)
    far = (rates - p.marginals(steps)).abs() > 6 * (rates * (1 - rates) / DRAWS).sqrt() + 1e-3
    contract.require("marginals are those of draws", not far.any(), rates.tolist(), p.marginals(steps).tolist())
    logits, place = contract.randn(steps, p.num_flows, like=like), contract.randn(steps, p.num_flows, 1, like=like)
    kind = torch.distributions.Laplace if p.slab == "laplace" else torch.distributions.LogNormal
    q = SparseWeights(logits, kind(place, torch.full_like(place, 0.5)))
    x = q.sample((DRAWS,), generator=torch.Generator(like.device).manual_seed(3))
    ratio = quiet(lambda: q.log_prob(x) - p.log_prob(x))
    error, kl = 6 * ratio.std() / math.sqrt(DRAWS), p.kl(q)
    contract.require("kl is the mean of the log ratio at draws", (kl - ratio.mean()).abs() < error, kl, ratio.mean())
    check_module(contract, p, lambda m: [m.log_prob(draws[0]), m.kl(q)])
    check_gradients(contract, p, lambda m: [m.log_prob(draws[0]), m.kl(q)])


def _positive(control: Any) -> Control:
    """The control with weights that are not negative: no density diffuses backwards."""
    if isinstance(control, Schedule):
        return Schedule([(start, _positive(c)) for start, c in zip(control.moments, control.controls, strict=True)])  # pyright: ignore[reportArgumentType]
    return control.abs() if isinstance(control, Tensor) and control.is_floating_point() else control


def _seeded(call: Callable[[], Tensor]) -> Tensor:
    """Draws of torch's distributions, from a seed of their own; the state of the global generators stays as it was."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return call()


def _shape(argument: str, given: Sequence[int] | None, own: Any) -> tuple[int, ...]:
    shape = own if given is None else given
    if shape is None:
        raise TypeError(f"the part does not say what inputs it takes: give {argument}=...")
    return tuple(int(size) for size in shape)
