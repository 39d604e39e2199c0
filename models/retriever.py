"""The items to put before a visitor: a bundle's table and operator at work."""

from collections.abc import Mapping

import numpy as np
import torch

from models.items import WEIGHTS, RetrieverConfig
from models.xpert import XPert


def operator_of(chosen: RetrieverConfig, tensors: Mapping[str, np.ndarray]) -> XPert:
    """What turns seeds into queries, ready to use. Raises ValueError when the weights do not fit the ranker."""
    width = tensors["vectors"].shape[1]
    weights = {
        name.removeprefix(WEIGHTS): torch.tensor(one) for name, one in tensors.items() if name.startswith(WEIGHTS)
    }
    if chosen.ranker not in ("shared", "residual", "personal"):
        operator = XPert("identity", width, max(len(chosen.seed_bias), 1))
        with torch.no_grad():
            operator.prior.copy_(torch.tensor(chosen.prior))
            operator.seed_bias.copy_(torch.tensor(chosen.seed_bias or (0.0,)))
    else:
        seeds = weights["seed_bias"].shape[0] if "seed_bias" in weights else 1
        operator = XPert(chosen.ranker, width, seeds, chosen.heads, chosen.activation)
        try:
            operator.load_state_dict(weights)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"the weights `{WEIGHTS}...` do not fit the ranker {chosen.ranker!r}: {said}") from None
    return operator.eval().requires_grad_(False)
