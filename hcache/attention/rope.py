"""The model's rotary position embedding, for states that take it off keys and put it on again.

It is the model's own module and function, so any layout (halves, interleaved, partial) and any scaling that
doesn't change with the sequence is right. Knows nothing of caches or methods.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

STATIC = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of scaling whose angles depend on the position alone."""


class Halves(NamedTuple):
    """The common layout as a formula: number i of a head is turned together with number F + i, by position *
    frequency i in float32; numbers behind the first 2F stay as they are.

    Args:
        frequencies_F: [F] float32, radians a token.
        scaling: factor of what is turned.
    """

    frequencies_F: Tensor
    scaling: float


class Rope:
    """Rotation by position, computed in float32, returned in the dtype that came in.

    Shapes: x [B, heads, T, D], positions [B, T] int64.

    Args:
        rotary: the model's module: (x, positions) -> cos and sin [B, T, R].
        apply: the model's function: (q, k, cos, sin) -> both rotated.
        scaling: factor in cos and sin (YaRN's attention factor); 1 for most models.
    """

    def __init__(self, rotary: nn.Module, apply: Callable[..., Any], scaling: float) -> None:
        self._rotary, self._apply, self._scaling = rotary, apply, scaling
        self._halves: dict[int, tuple[Tensor, Halves | None]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rope:
        """The rotary embedding of a transformers decoder, tried before it is trusted.

        Raises:
            ValueError: the model has none that can be taken off and put on again at any position.
        """
        rotary = getattr(model.base_model, "rotary_emb", None)
        module = sys.modules[type(model.base_model).__module__]
        apply = getattr(module, "apply_rotary_pos_emb", None)
        kind = getattr(rotary, "rope_type", None)
        if rotary is None or apply is None or kind not in STATIC:
            raise ValueError(
                f"{type(model).__name__} has no rotary embedding that depends on the position alone "
                f"(rope_type {kind!r}, supported: {', '.join(STATIC)}); choose a method that keeps keys "
                "as they are"
            )
        if not all(getattr(model.config, "no_rope_layers", None) or [True]):
            raise ValueError(
                f"{type(model).__name__} has layers without rotary embedding; choose a method that keeps "
                "keys as they are"
            )
        rope = cls(rotary, apply, float(getattr(rotary, "attention_scaling", 1.0)))
        rope._try(model)
        return rope

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys or queries as the model has them before rotation, rotated to `positions`."""
        return self._turn(x, positions, 1.0)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        return self._turn(x, -positions, self._scaling**-2)

    def shift(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotated keys or queries moved on by `by` positions (negative: back)."""
        return self._turn(x, by, 1 / self._scaling)

    def halves(self, dim: int) -> Halves | None:
        """The rotation of heads of `dim` numbers as a formula, None if it is of another layout.

        Tried, not told by a name, and tried again when the model's frequencies have changed. Synchronises.
        """
        frequencies = getattr(self._rotary, "inv_freq", None)
        if not isinstance(frequencies, Tensor):
            return None
        known = self._halves.get(dim)
        if known is None or known[0] is not frequencies:
            formula = Halves(frequencies.detach().float(), self._scaling)
            known = self._halves[dim] = (frequencies, formula if self._follows(formula, dim) else None)
        return known[1]

    def _follows(self, formula: Halves, dim: int) -> bool:
        """Whether the model's module and function do what the formula says, near and far."""
        frequencies_F, scaling = formula
        half = frequencies_F.numel()
        if frequencies_F.dim() != 1 or 2 * half > dim:
            return False
        positions = torch.tensor([0, 1, 5, 911, 100_003], device=frequencies_F.device)
        x_TD = torch.linspace(-1, 1, len(positions) * dim, device=frequencies_F.device).view(-1, dim)
        angles_TF = positions.unsqueeze(1).float() * frequencies_F
        cos, sin = angles_TF.cos() * scaling, angles_TF.sin() * scaling
        left, right, rest = x_TD.split([half, half, dim - 2 * half], dim=1)
        expected = torch.cat([left * cos - right * sin, right * cos + left * sin, rest], 1)
        turned = self.rotate(x_TD.view(1, 1, -1, dim), positions.unsqueeze(0)).view_as(expected)
        return torch.allclose(turned, expected, rtol=0, atol=1e-3)

    def _turn(self, x: Tensor, positions: Tensor, factor: float) -> Tensor:
        numbers = x.float()
        cos, sin = self._rotary(numbers, positions)
        turned, _ = self._apply(numbers, numbers[:, :1], cos, sin)
        return (turned if factor == 1.0 else turned * factor).to(x.dtype)

    def _try(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless rotating, moving on and taking off agree for this model's layout."""
        dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        device = model.device
        x = torch.linspace(-1, 1, 3 * dim, device=device).view(1, 1, 3, dim)
        near, far = (torch.arange(3, device=device).unsqueeze(0) + start for start in (5, 905))
        try:
            moved = self.shift(self.rotate(x, near), far - near)
            agree = torch.allclose(moved, self.rotate(x, far), atol=1e-3)
            agree = agree and torch.allclose(self.undo(moved, far), x, atol=1e-3)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the rotary embedding of {type(model).__name__} can't be applied: {error}"
            ) from error
        if not agree:
            raise ValueError(f"the rotary embedding of {type(model).__name__} is not a rotation by position")
