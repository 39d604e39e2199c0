"""SASRec learns from what was known when validation began, and from nothing later."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainer.clicked import by_days, by_place
from trainer.errors import TrainingError
from trainer.sasrec import SASRec, SASRecOptions, fit_sasrec

SMALL = SASRecOptions(width=8, layers=1, heads=1, length=8, batch=50, epochs=1, negatives=10)


def weights(fitted: SASRec) -> torch.Tensor:
    return torch.cat([one.flatten() for one in fitted.model.state_dict().values()])


def test_no_click_after_the_first_validation_snapshot_is_learned() -> None:
    """The days of validation have snapshots of their own: the last of them knows the labels of most cases."""
    task = by_days()
    before = task.snapshots[task.validation.snapshot.min()].at
    assert task.validation.snapshot.max() > task.validation.snapshot.min()
    item = task.log.item.copy()
    item[task.log.ts >= before] = 0
    other = replace(task, log=replace(task.log, item=item))
    assert torch.equal(weights(fit_sasrec(task, SMALL)), weights(fit_sasrec(other, SMALL)))
    item[np.flatnonzero(task.log.ts < before)[::7]] = 1
    assert not torch.equal(weights(fit_sasrec(task, SMALL)), weights(fit_sasrec(other, SMALL)))


def test_without_visitors_of_two_clicks_nothing_can_be_learned() -> None:
    task = by_place()
    first = replace(task, log=task.log.between(-4, -3))
    with pytest.raises(TrainingError, match="SASRec learns from visitors with two clicks or more"):
        fit_sasrec(first, SMALL)
