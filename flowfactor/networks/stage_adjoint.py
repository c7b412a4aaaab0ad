"""What a part offers to solves by closed forms, and the reason where it offers nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoClosedForm:
    """Why something is not solved by closed forms, so that the general engine solves it.

    Attributes:
        reason: In words for users, such as ``"Mine overrides flow_potential of MLPPotential"``.
    """

    reason: str
