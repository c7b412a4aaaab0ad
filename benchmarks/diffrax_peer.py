"""The same solve by diffrax, in a process of its own: ``python -m benchmarks.diffrax_peer THREADS BITS``.

jax and torch each keep threads that go on looking for work for a while, and disturb each other in one process. This one
reads requests, one line of JSON each, from its standard input, and answers each by one line:

``{"do": "load", "path": ...}``
    Takes weights, states, times and probe from an npz file.
``{"do": "run", "what": ..., "tolerance": ..., "path": ...}``
    Compiles and runs a side, writes its results to an npz file, and says how long compiling took.
``{"do": "time", "what": ..., "tolerance": ..., "calls": n}``
    Answers with the milliseconds of a call and those of the processor, on average over n calls.

The sides are ``forward``, ``step`` (diffrax's recursive checkpointing, its fastest gradient) and ``adjoint`` (its
continuous adjoint); each is one jitted function, so that jax compiles the whole solve with its gradient.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from functools import partial
from typing import Any

import numpy as np


def limit_threads(threads: int) -> None:
    """Holds the process to some of its processors: jax makes a thread for each that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["NPROC"] = str(threads)


def potential(w: dict[str, Any], frequencies: Any, z: Any, t: Any) -> Any:
    """u(z, t) of states ``[B, D]``: `MLPPotential` by hand."""
    import jax
    import jax.numpy as jnp

    def logcosh(a: Any) -> Any:
        return jax.nn.softplus(2 * a) - a - math.log(2.0)

    features = jnp.concatenate([jnp.sin(t * frequencies), jnp.cos(t * frequencies)])
    h = logcosh(z @ w["w1"].T + (w["v1"] @ features + w["b1"][0]))
    h = logcosh(h @ w["w2"].T + (w["v2"] @ features + w["b2"][0]))
    return h @ w["w3"][0] + 0.5 * (w["scale"][0] * (z @ w["quad"].T) ** 2).sum(-1) + z @ w["linear"][0]


def field(t: Any, y: Any, args: Any) -> Any:
    """Velocity and divergence of packed states ``[B, D + 1]``."""
    import jax
    import jax.numpy as jnp

    w, frequencies, probe = args
    z = y[:, :-1]
    if probe is not None:
        gradient = jax.grad(lambda z: potential(w, frequencies, z, t).sum())
        velocity, along = jax.jvp(gradient, (z,), (probe,))
        divergence = (along * probe).sum(-1)
    else:
        of_one = jax.grad(lambda x: potential(w, frequencies, x[None], t)[0])
        units = jnp.eye(z.shape[1], dtype=z.dtype)

        def each(x: Any) -> tuple[Any, Any]:
            value, along = jax.linearize(of_one, x)
            return value, jnp.trace(jax.vmap(along)(units))

        velocity, divergence = jax.vmap(each)(z)
    return jnp.concatenate([velocity, divergence[:, None]], -1)


def solve(w: Any, z0: Any, frequencies: Any, probe: Any, t: Any, tolerance: Any, adjoint: Any) -> tuple[Any, Any]:
    """Path ``[T, B, D + 1]`` with log-determinants last, and the number of steps."""
    import diffrax as dfx
    import jax.numpy as jnp

    y0 = jnp.concatenate([z0, jnp.zeros((z0.shape[0], 1), z0.dtype)], -1)
    made = dfx.diffeqsolve(
        dfx.ODETerm(field),
        dfx.Dopri5(),
        t[0],
        t[-1],
        None,
        y0,
        args=(w, frequencies, probe),
        saveat=dfx.SaveAt(ts=t),
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=adjoint,
        max_steps=4096,
    )
    return made.ys, made.stats["num_steps"]


class Peer:
    """Holds the arrays and the compiled sides."""

    def __init__(self) -> None:
        self.sides: dict[str, Any] = {}

    def load(self, path: str) -> dict[str, Any]:
        import diffrax as dfx
        import jax
        import jax.numpy as jnp

        arrays = {name: jnp.asarray(value) for name, value in np.load(path).items()}
        w = {name[2:]: value for name, value in arrays.items() if name.startswith("w/")}
        probe = arrays["probe"] if arrays["probe"].size else None
        fixed = {"frequencies": arrays["frequencies"], "probe": probe, "t": arrays["t"]}
        self.arguments = (w, arrays["z0"])

        def loss(w: Any, z0: Any, tolerance: Any, adjoint: Any) -> tuple[Any, Any]:
            ys, steps = solve(w, z0, tolerance=tolerance, adjoint=adjoint, **fixed)
            return (ys[..., :-1] ** 2).mean() - ys[..., -1].mean(), (ys, steps)

        direct, adjoint = dfx.RecursiveCheckpointAdjoint(), dfx.BacksolveAdjoint()
        self.sides = {"forward": jax.jit(partial(loss, adjoint=direct))}
        for name, mode in (("step", direct), ("adjoint", adjoint)):
            self.sides[name] = jax.jit(jax.value_and_grad(partial(loss, adjoint=mode), (0, 1), has_aux=True))
        return {}

    def run(self, what: str, tolerance: float, path: str) -> dict[str, Any]:
        import jax

        begin = time.perf_counter()
        made = jax.block_until_ready(self._call(what, tolerance))
        seconds = time.perf_counter() - begin
        value, gradients = (made, ({}, None)) if what == "forward" else made
        _, (ys, steps) = value
        found = {"z": ys[..., :-1], "log_det": ys[..., -1]} | {f"g/{n}": g for n, g in gradients[0].items()}
        if gradients[1] is not None:
            found["g/z0"] = gradients[1]
        np.savez(path, **{name: np.asarray(value) for name, value in found.items()})
        return {"seconds": seconds, "steps": int(steps)}

    def time(self, what: str, tolerance: float, calls: int) -> dict[str, Any]:
        import jax

        begin, spent = time.perf_counter(), time.process_time()
        for _ in range(calls):
            jax.block_until_ready(self._call(what, tolerance))
        spent, wall = time.process_time() - spent, time.perf_counter() - begin
        return {"ms": wall / calls * 1e3, "processor ms": spent / calls * 1e3}

    def _call(self, what: str, tolerance: float) -> Any:
        return self.sides[what](*self.arguments, tolerance)


def main() -> None:
    """Serves requests until the input ends."""
    limit_threads(int(sys.argv[1]))
    import jax

    jax.config.update("jax_enable_x64", sys.argv[2] == "64")
    jax.config.update("jax_platforms", "cpu")
    answers, peer = os.fdopen(os.dup(1), "w"), Peer()
    os.dup2(2, 1)  # whatever else is printed must not come between the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
