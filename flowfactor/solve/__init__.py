"""The engine: how a flow is solved.

`LatentFlow` checks its arguments and calls `flowfactor.solve.two_ways.solve_from` with its field, its solver and its kind of
divergence. That calls `flowfactor.solve.solve.solve` once, or once each way where a solve begins inside of its times. From
there a solve goes one way down:

1. **Check.** The states, times (`times`), control and costs are checked before any work; what the engine adds is that flows
   exist and controls have the shape of the batch (`flowfactor.control.resolve`).
2. **Cut into stretches.** A schedule is cut at its switching times, so that no step straddles one
   (`problem.segments_of`). State, log-determinant and running costs are one packed state ``[*batch, S]``
   (`problem.Packing`); z and the log-determinant steer the steps, the costs do not.
3. **Closed form or torchdiffeq.** Each stretch is solved by one of two engines, which take the same steps:

    - The *closed form* (`closed_form`), where the field and the costs have their derivatives written out: the steps run
      without autograd (`forward`, by the arithmetic of `runge_kutta`), and their adjoint is written out too.
    - The *general engine* (`general`), torchdiffeq and autograd, for any field and cost, every method and option
      (`odeint`; its right-hand side `dynamics`, or a program of it by torch.compile, `compiled`). It also explains
      what the closed form could not solve (`diagnosis`): errors are raised in one place.

   `Solver.engine` chooses or forbids one; `SolveStats.engine` and `SolveStats.reason` say which one ran and why.
4. **Path.** The packed states at the wanted times become a `FlowPath`.

Gradients are found in one of three modes, ``Solver.gradient``, by either engine:

- ``direct``: of the steps that were taken, whose stages are all kept. In closed form by `discrete_adjoint`, else by autograd
  through torchdiffeq.
- ``checkpoint``: of the same steps, with a state an output (or every few steps) kept and the stages between them evaluated
  anew, a few steps at a time. By `discrete_adjoint`, else by `checkpoint`.
- ``adjoint``: of the solution, correct to the tolerance, with memory that does not grow with the steps. By
  `continuous_adjoint`, else by ``torchdiffeq.odeint_adjoint``.

The discrete adjoint carries the cotangent of z back from stage to stage; the continuous one solves the adjoint equation
backwards in time. Both ask a field for the same: velocity and residuals at a stage, the pullback of a cotangent, and the
gradients of its parameters over many stages at once. Tensors that a field captures have their gradient in all modes
(`captured` finds them for the general engine). Gradients of gradients always go through the general engine.
"""
