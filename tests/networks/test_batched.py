"""Products over stages and samples, by whatever multiplies them."""

from __future__ import annotations

import pytest
import torch

from flowfactor.networks import batched
from flowfactor.networks.batched import flat, matmul, outer, outer_into, product, transposed

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch is built without oneDNN",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Has oneDNN multiply whatever the processor and however small, and notes what."""
    seen: list[torch.Size] = []
    by_onednn = batched._by_onednn

    def noted(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(x.shape)
        return by_onednn(x, weight, out)

    monkeypatch.setattr(batched, "_by_onednn", noted)
    monkeypatch.setattr(batched, "prefers_onednn", lambda: True)
    monkeypatch.setattr(batched, "_LARGE", 1)
    monkeypatch.setattr(batched, "_WIDE", 1)
    return seen


@needs_onednn
@pytest.mark.parametrize("networks", [1, 3])
def test_onednn_multiplies_as_torch_does(calls: list[torch.Size], networks: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(networks, 4, 5, size, generator=g) for size in (6, 7))
    w = torch.randn(networks, 6, 7, generator=g)
    place = torch.full((networks, 2, 5, 7), torch.nan)[:, 1]
    wanted = torch.einsum("ksni,kij->ksnj", x.double(), w.double())
    for weight in (w, w.mT.contiguous().mT):
        torch.testing.assert_close(product(x, weight).double(), wanted, atol=1e-5, rtol=1e-5)
        assert matmul(x[:, 1], weight, place) is place
        torch.testing.assert_close(place.double(), wanted[:, 1], atol=1e-5, rtol=1e-5)
    of_weights = torch.einsum("ksni,ksnj->kij", x.double(), y.double())
    torch.testing.assert_close(outer(x, y).double(), of_weights, atol=1e-5, rtol=1e-5)
    assert len(calls) == 5


@needs_onednn
def test_onednn_is_not_asked_for_what_it_has_no_answer_to(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.randn(1, 4, 6), torch.randn(1, 6, 7, requires_grad=True)
    matmul(x, w).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.sum(1).unsqueeze(-1).expand(1, 6, 7))
    matmul(x.double(), w.detach().double())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        matmul(x, w.detach())
    weight, along = w.detach(), torch.randn(1, 4, 6)
    _, tangent = torch.func.jvp(lambda x: matmul(x, weight), (x,), (along,))
    torch.testing.assert_close(tangent, along @ weight)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, along)
        _, tangent = torch.autograd.forward_ad.unpack_dual(matmul(dual, weight))
        torch.testing.assert_close(tangent, along @ weight)
    torch.testing.assert_close(torch.vmap(lambda x: matmul(x, weight))(x.expand(3, 1, 4, 6))[0], x @ weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul(x, weight).dtype == torch.bfloat16
    assert calls == []
    matmul(x, weight)
    assert len(calls) == 1


def test_what_prefers_onednn_is_told_from_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(batched, "_CPUINFO", tmp_path / "cpuinfo")
    ask = batched.prefers_onednn.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert not ask()
    (tmp_path / "cpuinfo").write_text("vendor_id\t: GenuineIntel\n")
    assert not ask()
    (tmp_path / "cpuinfo").write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(batched, "_by_onednn", lambda x, weight: x @ weight)
    assert ask()
    monkeypatch.setattr(batched, "_by_onednn", lambda x, weight: x @ weight + 1)  # an operator that has changed
    assert not ask()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(batched, "_by_onednn", lambda x, weight: x @ weight)
    assert not ask()


def test_outer_products_add_to_what_is_there() -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    before = torch.randn(2, 4, 6)
    total = {"w": before}
    kept = before.clone()
    outer_into(total, "w", x, y)
    outer_into(total, "v", x, y)
    torch.testing.assert_close(total["w"], before + torch.einsum("ksni,ksnj->kij", x, y))
    torch.testing.assert_close(total["v"], outer(x, y))
    torch.testing.assert_close(before, kept)  # it may be somebody else's
    assert flat(x).shape == (2, 15, 4)


@pytest.mark.parametrize("size", [4, 200])
def test_transposed_weights(size: int) -> None:
    w = torch.randn(2, size, 3 * size)
    assert torch.equal(transposed(w), w.mT)
