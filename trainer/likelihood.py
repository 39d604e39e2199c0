"""What token windows cost under a model that learns: the loss of every predictor."""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.adapters import Adapters
from models.vocabulary import PAD
from trainer.windows import Layout

Learner: TypeAlias = PreTrainedModel | Adapters


def nats(model: Learner, layout: Layout, device: torch.device, clusters: np.ndarray | None = None) -> Tensor:
    """What all labels of the layout cost together, in nats; `clusters` (B,) are the rows' adapters."""
    labels = torch.as_tensor(layout.labels, device=device)
    scored = labels != PAD
    context: dict[str, Any] = {"input_ids": torch.as_tensor(layout.inputs, device=device), "use_cache": False}
    if layout.segments is not None:
        context["position_ids"] = torch.as_tensor(layout.positions, device=device)
        context["attention_mask"] = own_past(torch.as_tensor(layout.segments, device=device))
    if isinstance(model, Adapters):
        with model.using(torch.as_tensor(clusters, device=device)) as trunk:
            states = trunk.base_model(**context)[0]
    else:
        trunk = model
        states = model.base_model(**context)[0]
    logits = trunk.get_output_embeddings()(states[scored]).float()  # (B, T, D) -> (tokens, V): none for padding
    return torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")


def own_past(segments: Tensor) -> Tensor:
    """Which tokens each may look at, the earlier ones of its own window: (B, T) -> (B, 1, T, T) bool."""
    together = segments.unsqueeze(2) == segments.unsqueeze(1)
    return together.tril().unsqueeze(1)
