"""What a process has once and every run needs for itself: random generators, accelerate's step state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState


class OwnState:
    """The generators as they are when it is made, and no step taken yet."""

    def __init__(self) -> None:
        self._keep_generators()
        self._steps: dict[str, Any] = {}  # accelerate begins anew where it finds nothing

    def enter(self) -> None:
        """Put the generators and the step state in place."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._steps)

    def leave(self) -> None:
        """Keep them as they are now."""
        self._keep_generators()
        self._steps = dict(GradientState._shared_state)

    def _keep_generators(self) -> None:
        self._python: Any = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
