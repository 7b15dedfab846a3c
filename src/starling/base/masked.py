"""Sums, means and variances over the kept entries of a tensor.

Masks: True = keep. What stands at a masked-out entry, NaN included, changes neither a result nor a
gradient. Nothing kept is an error, never a zero. Half precision is summed and returned in float32.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Values = Float[Tensor, "*shape"]
Mask = Bool[Tensor, "*shape"]
Reduced = Float[Tensor, "..."]


def masked_sum(values: Values, mask: Mask, *, dim: int | None = None) -> Reduced:
    """Sum the kept entries, all of them or along `dim`.

    Raises ValueError when nothing is kept (along `dim`: in any slice) or the shapes differ, and
    TypeError when the mask is not bool.
    """
    kept = _kept(values, mask, dim)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Values, mask: Mask) -> Reduced:
    """Average the kept entries, each with the same weight. Raises like `masked_sum`."""
    return _kept(values, mask, None).sum() / mask.sum()


def masked_var(values: Values, mask: Mask) -> Reduced:
    """The population variance (divided by the count) of the kept entries. Raises like the sum."""
    kept = _kept(values, mask, None)
    return masked_mean((kept - kept.sum() / mask.sum()).square(), mask)


def _kept(values: Values, mask: Mask, dim: int | None) -> Values:
    """The values with zeros where the mask is False, once both have been checked."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, found {mask.dtype}")
    if values.shape != mask.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} differ in shape")
    has_kept = mask.any() if dim is None else mask.any(dim).all()
    if not has_kept:
        raise ValueError("the mask keeps nothing" if dim is None else "a slice keeps nothing")
    # Chosen by `where`, not multiplied: zero times NaN is NaN, in the gradient too.
    zeros = torch.zeros((), dtype=values.dtype, device=values.device)
    return torch.where(mask, values, zeros).to(torch.promote_types(values.dtype, torch.float32))
