"""The bending energy of paths, by the second differences of their frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.regularizers import Bending

T = torch.tensor([0.0, 0.5, 2.0, 3.0, 3.25], dtype=torch.float64)


def thrown(t: Tensor, pull: Tensor) -> Tensor:
    """A path of constant acceleration, ``[T, 3, 2]``."""
    start, speed = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = t.reshape(*t.shape, *[1] * (3 - t.ndim))
    return start + speed * t + 0.5 * pull * t.square()


PULL = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("backwards", [False, True])
def test_constant_acceleration_is_found_exactly_at_uneven_times(backwards: bool) -> None:
    z, t = (x.flip(0) if backwards else x for x in (thrown(T, PULL), T))
    counted = 3.25 - (0.5 + 0.25) / 2  # all but the outer halves of the first and the last interval
    torch.testing.assert_close(Bending()(z, t), counted * PULL.square().sum(-1))


def test_a_line_that_is_not_of_constant_speed_bends() -> None:
    line = torch.tensor([[1.0, 2.0]]).expand(5, 1, 2)
    assert float(Bending()(line * T.float().reshape(5, 1, 1), T.float())) < 1e-9
    assert float(Bending()(line * T.float().square().reshape(5, 1, 1), T.float())) > 1


def test_with_many_frames_it_is_the_acceleration_of_the_solve() -> None:
    turn = ff.fields.from_module(lambda z, t: torch.stack([-z[..., 1], z[..., 0]], -1), dim=2)
    t = torch.linspace(0, 3, 301, dtype=torch.float64)
    z0 = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    path = ff.LatentFlow(turn, ff.Solver(rtol=1e-8, atol=1e-8))(z0, t, costs={"bend": ff.regularizers.Acceleration()})
    torch.testing.assert_close(Bending()(path.z, t), path.costs["bend"][-1], rtol=5e-3, atol=0)


def test_each_path_may_have_times_of_its_own_and_rest() -> None:
    rests = torch.tensor([0.0, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    own = torch.stack([T, T + 1, rests], 1)
    pull = PULL + 1
    z = torch.stack([thrown(own[:, n], pull)[:, n] for n in range(3)], 1)
    first = [Bending()(thrown(own[:, n], pull)[:, n : n + 1], own[:, n]) for n in range(2)]
    short = Bending()(thrown(rests[:3], pull)[:, 2:], rests[:3])
    torch.testing.assert_close(Bending()(z, own), torch.cat([*first, short]))
    assert float(short) > 0


@pytest.mark.parametrize(("switch", "left"), [(2.0, [1, 3]), (2.5, [1]), (-1.0, [1, 2, 3]), (3.25, [1, 2, 3])])
def test_where_a_schedule_switches_a_path_may_bend(switch: float, left: list[int]) -> None:
    z = thrown(T, PULL)
    z[2] += 7.0
    alone = [Bending()(z[i - 1 : i + 2], T[i - 1 : i + 2]) for i in (1, 2, 3)]
    schedule = ff.Schedule([(-5.0, 0), (switch, 1)])
    torch.testing.assert_close(Bending()(z, T, schedule), torch.stack([alone[i - 1] for i in left]).sum(0))


def test_gradients_are_those_of_finite_differences() -> None:
    z, own = thrown(T, PULL).requires_grad_(), torch.stack([T, T + 1, T.clamp(max=2.0)], 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: Bending()(z, T), (z,))
    assert torch.autograd.gradcheck(lambda z: Bending()(z, own.detach()), (z,))
    (grad,) = torch.autograd.grad(Bending()(z, own).sum(), own)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("frames", [1, 2])
def test_fewer_than_three_frames_do_not_bend(frames: int) -> None:
    assert Bending()(torch.randn(frames, 4, 2), torch.arange(float(frames))).tolist() == [0.0] * 4


@pytest.mark.parametrize("t", [torch.arange(4.0), torch.zeros(5, 2), torch.tensor(1.0)])
def test_times_that_do_not_fit_are_refused(t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Bending takes paths \[T\+1, \*batch, D\] and their times"):
        Bending()(torch.zeros(5, 3, 2), t)


SHAPE, FRAMES, KS = (1, 8, 8), torch.rand(4, 5, 1, 8, 8), torch.tensor([0, 1, 1, 0])


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    return ff.models.build_vae(SHAPE, 2, 4, hidden=(8, 8), **{"hj_weight": 0.0, "start_weight": 0.0, **settings})


def terms_of(model: Any, t: Tensor, control: Any = KS, **also: Any) -> Any:
    return model(FRAMES, t, control, generator=torch.Generator().manual_seed(0), **also)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("reference", ["first", "random"])
def test_models_add_its_mean_over_time(relative: bool, reference: str) -> None:
    t = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0])
    with_it, without = (
        terms_of(build(bending_weight=w, relative_weights=relative, reference=reference).train(), t)
        for w in (50.0, 0.0)
    )
    assert float(without.bending.detach()) == 0 and float(with_it.bending.detach()) > 0
    torch.testing.assert_close(
        with_it.loss - without.loss, (64 if relative else 1) * 50 * with_it.bending, rtol=1e-3, atol=1e-4
    )
    if reference == "first":
        model = build(bending_weight=50.0).train()
        z0 = ff.objectives.draw(model.encode(FRAMES[:, 0]), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(with_it.bending, (Bending()(model.flow(z0, t, KS).z, t) / 5).mean())


def test_training_with_it_straightens_paths() -> None:
    z0, angle = torch.zeros(1, 4), torch.linspace(0, torch.pi, 5)
    half_circle = torch.stack([1 - angle.cos(), angle.sin(), 0 * angle, 0 * angle], -1).unsqueeze(1)

    def arc(weight: float) -> float:
        generator = torch.Generator().manual_seed(0)
        flow = ff.LatentFlow(
            ff.fields.FreeField(4, 1, hidden=(16, 16), generator=generator), solver=ff.Solver("rk4", step_size=1.0)
        )
        optimiser = torch.optim.Adam(flow.parameters(), 0.02)
        for _ in range(60):
            path = flow(z0, torch.arange(5.0)).z
            loss = (path - half_circle).square().sum() + weight * Bending()(path, torch.arange(5.0)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        path = path.detach()
        return float(path.diff(dim=0).norm(dim=-1).sum() / (path[-1] - path[0]).norm())

    assert arc(0.0) > 1.2
    assert arc(10.0) < 1.05


def test_schedules_pauses_and_weak_supervision_are_taken() -> None:
    model = build(bending_weight=5.0)
    switched = terms_of(model, torch.arange(5.0), ff.Schedule([(0.0, 0), (2.0, 1)]))
    whole = terms_of(model, torch.arange(5.0), ff.Schedule([(0.0, 0)]))
    assert 0 < float(switched.bending.detach()) < float(whole.bending.detach())
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True, True] + [False] * 3, [True] + [False] * 4])
    masked = terms_of(model, torch.arange(5.0), mask=mask)
    assert bool(masked.loss.isfinite())
    masked.loss.backward()
    weak = build(bending_weight=5.0, supervision="weak", num_frames=5)
    assert float(terms_of(weak, torch.arange(5.0), None).bending.detach()) > 0


def test_its_weight_is_saved_and_checked(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    build(bending_weight=5.0).save_pretrained(tmp_path)
    assert ff.models.load_pretrained(tmp_path).bending_weight == 5
    with pytest.raises(ValueError, match="bending_weight"):
        build(bending_weight=-1.0)


def test_a_model_whose_weights_change_at_every_frame_has_none() -> None:
    with pytest.raises(TypeError, match="bending_weight"):
        ff.models.build_sparse_vae(SHAPE, 2, 4, hidden=(8, 8), bending_weight=5.0)
