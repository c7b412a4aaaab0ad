"""Checks of what is assembled from parts: models of sequences of frames."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from flowfactor.errors import require
from flowfactor.testing.contract import Contract, changed, check_module, like_of, quiet


def check_model(
    m: nn.Module,
    image_shape: Sequence[int] | None = None,
    *,
    num_frames: int = 5,
    loads_with: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
) -> None:
    """Checks that a model of sequences keeps what training, measures and plots rely on.

    Terms of the objective: finite scalars with gradients, the same under equal generators, in evaluation the mean over any
    batch, in the model's precision and in double; posteriors, decoded frames and transformed images: shapes under leading
    dimensions, each sample as by itself; `infer_factor` and `log_likelihood` where the model has them; copies,
    ``state_dict``, ``save_pretrained`` and ``from_pretrained``; refusals. All with a context, where ``m.context`` says that
    it takes one.

    Args:
        m: The model.
        image_shape: ``(C, H, W)``; None takes the ``event_shape`` of its decoder.
        num_frames: T+1, how many frames the sequences have that it is shown.
        loads_with: Parts of your own that ``from_pretrained`` has to be handed.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        ImportError: If the model can be saved and the extra ``io`` is not installed.
        TypeError: If no image shape is known.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_model(ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8)))
    """
    contract = Contract(m, without)
    shape = image_shape if image_shape is not None else getattr(getattr(m, "decoder", None), "event_shape", None)
    if shape is None:
        raise TypeError("the model's decoder does not say what frames it gives: give image_shape=(C, H, W)")
    model = changed(m, contract, 0.01)
    double = copy.deepcopy(model).double() if contract.keeps("double") else model
    for each in (model, double):
        like = like_of(each)
        batch = _Batch(contract, tuple(shape), num_frames, m, like)
        _check_terms(contract, copy.deepcopy(each), batch)
        _check_frames(contract, copy.deepcopy(each).eval(), batch)
    batch = _Batch(contract, tuple(shape), num_frames, m, like_of(double))
    check_module(contract, double.eval(), lambda m: _outputs(m, batch))
    _check_files(contract, double, batch, dict(loads_with or {}))
    frames, t, k = batch.frames, batch.t, batch.k
    holes = frames.clone()
    holes[0, 0, 0, 0, 0] = torch.nan
    if batch.also:
        contract.refuses("a context that is missing", lambda: double(frames, t, k))
        contract.refuses("the context of another batch", lambda: double(frames, t, k, **batch.rows(slice(1, None))))
    for what, call in (
        ("a single sequence without batch", lambda: double(frames[0], t, k, **batch.also)),
        ("bytes in place of frames", lambda: double((255 * frames).byte(), t, k, **batch.also)),
        ("frames of another shape", lambda: double(frames[..., :-1], t, k, **batch.also)),
        ("frames that are not finite", lambda: double(holes, t, k, **batch.also)),
        ("no sequence at all", lambda: double(frames[:0], t, k[:0], **batch.rows(slice(0)))),
        ("times of another number of frames", lambda: double(frames, t[:-1], k, **batch.also)),
        ("times that stand still", lambda: double(frames, torch.zeros_like(t), k, **batch.also)),
    ):
        contract.refuses(what, call)


class _Batch:
    """Sequences of random frames, so many of each flow, one after another; with a context where the model takes one."""

    def __init__(self, contract: Contract, shape: tuple[int, ...], num_frames: int, model: Any, like: Tensor) -> None:
        self.flows, self.shape = max(getattr(model, "num_flows", 1), 1), shape
        self.k = torch.arange(2 * self.flows, device=like.device) // 2
        self.frames = contract.rand(len(self.k), num_frames, *shape, like=like)
        self.t = torch.arange(num_frames, device=like.device).to(like)
        size, count = getattr(model, "context", 0), len(self.k)
        self.also: dict[str, Any] = {}
        if isinstance(size, Mapping):
            self.also["context"] = {name: contract.randn(count, each, like=like) for name, each in size.items()}
        elif isinstance(size, int) and size:
            self.also["context"] = contract.randn(count, size, like=like)

    def rows(self, row: int | slice) -> dict[str, Any]:
        """What comes beside some of the sequences."""
        row = slice(row, row + 1) if isinstance(row, int) else row
        return self._each(lambda part: part[row])

    def deep(self) -> dict[str, Any]:
        """What comes beside the sequences in two leading dimensions."""
        return self._each(lambda part: part.reshape(2, -1, part.shape[-1]))

    def _each(self, work: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        context = self.also.get("context")
        if isinstance(context, Mapping):
            return {"context": {name: work(part) for name, part in context.items()}}
        return {} if context is None else {"context": work(context)}


def _generator(like: Tensor, seed: int = 0) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(seed)


def _terms(contract: Contract, terms: Any, like: Tensor) -> dict[str, Tensor]:
    """The terms by name, checked to be finite scalars."""
    contract.require(
        "a call gives Terms", dataclasses.is_dataclass(terms), terms, "a dataclass of tensors such as Terms"
    )
    found = {field.name: getattr(terms, field.name) for field in dataclasses.fields(terms)}
    contract.require("Terms have a loss", "loss" in found, sorted(found), "loss")
    for name, value in found.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            contract.require(f"{name} is finite", value.isfinite().all(), value, "finite numbers")
    contract.tensor("the loss", found["loss"], (), like)
    return found


def _check_terms(contract: Contract, model: Any, batch: _Batch) -> None:
    """The objective on a batch, in training and in evaluation."""
    frames, t, k = batch.frames, batch.t, batch.k
    start = copy.deepcopy(model.state_dict())
    losses = []
    with contract.silent():
        for _ in range(2):
            model.load_state_dict(start)
            model.train().zero_grad()
            terms = _terms(
                contract,
                contract.attempt("training", lambda: model(frames, t, k, generator=_generator(t), **batch.also)),
                t,
            )
            contract.require(
                "the loss carries gradients", terms["loss"].requires_grad, "none", "a graph to the parameters"
            )
            terms["loss"].backward()
            losses.append(terms["loss"])
        contract.close("equal generators give equal losses", *losses)
    got = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    contract.require("the loss has gradients", any(g.abs().sum() > 0 for _, g in got), "no parameter with one", "some")
    for name, gradient in got:
        contract.require(f"the gradient of {name} is finite", gradient.isfinite().all(), gradient, "finite numbers")
    model.load_state_dict(start)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    shown = [quiet(lambda: model(frames, t, k, generator=_generator(t), **batch.also)) for _ in range(2)]
    first, second = (_terms(contract, terms, t) for terms in shown)
    contract.close("evaluation repeats under equal generators", first["loss"], second["loss"])
    for name, value in model.state_dict().items():
        kept = torch.equal(value, before[name])
        contract.require(f"evaluation leaves {name} as it was", kept, "another value", "the same value")


def _check_frames(contract: Contract, model: Any, batch: _Batch) -> None:
    """Posteriors, decoded frames and transformed images of a model in evaluation mode."""
    x, t = batch.frames, batch.t
    q = contract.attempt("encode takes frames", lambda: model.encode(x))
    fits = isinstance(q, Distribution) and tuple(q.batch_shape) == tuple(x.shape[:2]) and len(q.event_shape) == 1
    contract.require("encode gives a posterior of every frame", fits, q, f"batch {list(x.shape[:2])} and event [D]")
    mean = q.mean.detach()
    contract.tensor("decoded frames", model.decode(mean), (*x.shape[:2], *batch.shape), x)
    contract.close("each frame is encoded by itself", model.encode(x[0, 1]).mean, mean[0, 1])
    start = x[:, 0]
    times = t[:3]
    weights = contract.rand(len(start), batch.flows, like=x)
    for kind, control in (("an int", 0), ("an index", batch.k), ("weights", weights)):
        try:
            frames = quiet(lambda c=control: model.transform(start, times, c, **batch.also))
        except (ValueError, TypeError):  # a model that cannot superpose says so; one flow is what all can do
            contract.require(f"transform takes {kind}", kind == "weights", "a refusal", "frames")
            continue
        contract.tensor(f"transformed images ({kind})", frames, (len(start), len(times), *batch.shape), x)
        if contract.keeps("permutation"):
            alone = quiet(
                lambda c=control: model.transform(
                    start[1:2], times, c if isinstance(c, int) else c[1:2], **batch.rows(1)
                )
            )
            contract.close(f"each image is transformed by itself ({kind})", alone[0], frames[1], 1e-3)
    try:
        deep = quiet(lambda: model.transform(start.reshape(2, -1, *batch.shape), times, 0, **batch.deep()))
    except ValueError:
        pass
    else:
        contract.tensor("images of two leading dimensions", deep, (2, len(start) // 2, len(times), *batch.shape), x)
    _check_inference(contract, model, batch)


def _check_inference(contract: Contract, model: Any, batch: _Batch) -> None:
    """`infer_factor` and `log_likelihood`, where the model has them."""
    frames, t, k = batch.frames, batch.t, batch.k
    if hasattr(model, "infer_factor"):
        try:
            q = model.infer_factor(frames)
        except ValueError:
            q = None  # it infers none, and says so
        if q is not None:
            fits = isinstance(q, Categorical) and q.probs.shape == (len(frames), batch.flows)
            contract.require("infer_factor gives q(k|x)", fits, q, f"a Categorical [{len(frames)}, {batch.flows}]")
            contract.close(
                "each sequence is judged by itself", model.infer_factor(frames[1:2]).probs[0], q.probs[1], 1e-4
            )
    if hasattr(model, "log_likelihood"):
        bounds = [
            quiet(lambda: model.log_likelihood(frames, t, k, samples=2, generator=_generator(t), **batch.also))
            for _ in range(2)
        ]
        contract.tensor("log_likelihood", bounds[0], (len(frames),), frames)
        contract.close("log_likelihood repeats under equal generators", *bounds)
        contract.refuses("no importance sample", lambda: model.log_likelihood(frames, t, k, samples=0, **batch.also))


def _outputs(model: Any, batch: _Batch) -> list[Tensor]:
    return [model.transform(batch.frames[:, 0], batch.t[:3], 0, **batch.also), model.encode(batch.frames).mean]


def _check_files(contract: Contract, model: Any, batch: _Batch, parts: dict[str, Any]) -> None:
    """A saved model comes back; left out where the model cannot be saved, or is excused from its state_dict."""
    if not hasattr(model, "save_pretrained") or not contract.keeps("state_dict"):
        return
    require("safetensors", extra="io")  # a check that is left out without a word would pass
    with tempfile.TemporaryDirectory() as folder:
        contract.attempt("save_pretrained", lambda: model.save_pretrained(folder))
        loaded = contract.attempt("from_pretrained", lambda: type(model).from_pretrained(folder, **parts))
        for a, b in zip(quiet(lambda: _outputs(loaded, batch)), quiet(lambda: _outputs(model, batch)), strict=True):
            contract.close("a model that was saved and loaded gives the same", a, b)
