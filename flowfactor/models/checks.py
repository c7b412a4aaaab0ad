"""Checks of what users hand to a model."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor.control import Control, times
from flowfactor.fields import GradientField
from flowfactor.latent_flow import LatentFlow


def check_frames(
    frames: object, t: object, event: tuple[int, ...] | None, *, own_times: bool = False
) -> tuple[Tensor, Tensor]:
    """Checks sequences ``[B, T+1, C, H, W]`` and their times ``[T+1]``.

    Args:
        frames: The sequences.
        t: The times, in frames; or the same times for every sequence, ``[B, T+1]``, as a DataLoader collates them.
        event: Expected ``(C, H, W)``; None where any will do.
        own_times: Whether the rows of ``[B, T+1]`` may differ.

    Returns:
        Frames and times as tensors: ``[T+1]``, or ``[T+1, B]`` where each sequence has its own.

    Raises:
        TypeError: If frames are no floats.
        ValueError: If a shape does not fit, there is no sequence, frames are not finite or the times are not strictly
            monotone.
    """
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames must be a float tensor [B, T+1, C, H, W] with values in [0, 1], got {got}")
    if frames.ndim != 5 or (event is not None and tuple(frames.shape[2:]) != event):
        wanted = "C, H, W" if event is None else ", ".join(map(str, event))
        raise ValueError(f"frames must have shape [B, T+1, {wanted}], got {list(frames.shape)}")
    if not len(frames):
        raise ValueError(f"frames must hold at least one sequence, got shape {list(frames.shape)}")
    if not bool(frames[:, 0].sum().isfinite()):  # the sum is one cheap pass
        raise ValueError("frames hold NaN or infinity; expected values in [0, 1]")
    if isinstance(t, Tensor) and t.ndim == 2 and t.shape == frames.shape[:2] and bool((t == t[:1]).all()):
        # As torch's DataLoader collates the times of sequences. Times that repeat are each sequence's own, which may rest.
        t = t if own_times and bool((t[0].diff() == 0).any()) else t[0]
    when = times(t, frames)
    if own_times and when.ndim == 2:
        if when.shape != frames.shape[:2]:
            raise ValueError(
                f"t must hold one time a frame, shape [{frames.shape[1]}], or those of each sequence, "
                f"{list(frames.shape[:2])}; got {list(when.shape)}"
            )
        return frames, when.mT
    if when.shape != frames.shape[1:2]:
        raise ValueError(f"t must hold one time a frame, shape [{frames.shape[1]}], got {list(when.shape)}")
    return frames, when


def check_flow_parts(encoder: object, decoder: object, flow: object) -> None:
    """Checks that a flow is one, and that encoder and decoder have latents of its size."""
    if not isinstance(flow, LatentFlow):
        raise TypeError(f"flow must be a flowfactor.LatentFlow, got {type(flow).__name__}")
    check_latent_size("encoder", encoder, flow.dim)
    check_latent_size("decoder", decoder, flow.dim)


def check_latent_size(name: str, part: object, dim: int) -> None:
    """Raises ValueError where a part says that its latents are of another size than the flow's."""
    size = getattr(part, "latent_dim", getattr(part, "dim", dim))
    if size != dim:
        raise ValueError(f"the {name} has latents of size {size} and the flow of size {dim}")


def check_same_rest(encoder: object, prior: object) -> None:
    """Raises ValueError where encoder and prior differ in what dimensions start at rest, which would cost a divergence."""
    rests = [getattr(part, "at_rest", None) for part in (encoder, prior)]
    if rests[0] != rests[1]:
        wrote, held = ("none" if rest is None else f"{rest[0]} at scale {rest[1]:g}" for rest in rests)
        raise ValueError(
            f"of the dimensions of a latent the encoder leaves at rest {wrote}, and the prior {held}: the two must start "
            "them alike, as encoders.AugmentedEncoder(encoder, augment_dim, scale) and priors.Augmented(prior, augment_dim, "
            "scale) do with equal settings (build_vae: augment_dim, augment_scale)"
        )


def check_force(force: object) -> None:
    """Raises ValueError for a name that is no force of the Hamilton-Jacobi equation."""
    if isinstance(force, str) and force != "negative_square":
        raise ValueError(f'force must be "negative_square", None or a module f(z, t), got {force!r}')


def check_batch_control(control: Control, batch: int) -> None:
    """Checks that a control with one entry per sequence has as many entries as there are sequences."""
    if isinstance(control, Tensor) and control.ndim and not control.is_floating_point() and control.shape != (batch,):
        raise ValueError(f"k must be an int or one index a sequence, shape [{batch}], got {list(control.shape)}")


def check_weight(name: str, value: float) -> float:
    """Checks a weight of a loss term: a finite number that is not negative."""
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
    return float(value)


def check_running_costs(flow: LatentFlow, solenoidal: float, acceleration: float) -> None:
    """Raises ValueError where a weight asks for what the flow's field has not, or its solver cannot integrate."""
    kind, instead = type(flow.field).__name__, 'leave it at 0, or take a HelmholtzField (build_vae: field="helmholtz")'
    if solenoidal and isinstance(flow.field, GradientField):
        raise ValueError(
            f"solenoidal_weight={solenoidal:g} weighs what moves a state beside the gradient of the potential, and a {kind} "
            f"has nothing beside it: {instead}"
        )
    if solenoidal and not flow.field.has_potential:
        raise ValueError(
            f"solenoidal_weight={solenoidal:g} weighs what moves a state beside the gradient of a potential, and a {kind} "
            f"has no potential: {instead}"
        )
    if acceleration and any(solver.compile for solver in (flow.solver, flow.evaluation_solver) if solver):
        raise ValueError(
            f"acceleration_weight={acceleration:g} takes a forward derivative that torch.compile cannot follow: leave it at "
            "0, or take a solver without compile=True"
        )


def check_commutator(flow: LatentFlow, weight: float) -> None:
    """Raises ValueError where a weight of the flows' commutators meets one flow alone."""
    if weight and flow.num_flows < 2:
        raise ValueError(
            f"commutator_weight={weight:g} asks pairs of flows to commute, and the model has one flow alone: leave it at 0"
        )


def check_relative(relative: bool, event: tuple[int, ...] | None) -> bool:
    """Checks whether weights are relative to the size of a frame, which the decoder then has to say."""
    if not isinstance(relative, bool):
        raise TypeError(f"relative_weights must be True or False, got {relative!r}")
    if relative and event is None:
        raise ValueError(
            "relative_weights=True counts penalties by the values of a frame, and the decoder does not say its event_shape "
            "(C, H, W): give it one, or leave relative_weights at False"
        )
    return relative


def check_positive(name: str, value: float) -> float:
    """Checks a setting: a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """Raises ValueError where a generator lives on another device than the data."""
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"the generator is on {generator.device} and the data on {device}; make one on {device}")
    return generator
