"""One process alone, and waiting for others."""

import logging
import time

import pytest
import torch
import torch.distributed as dist
from processes import ranks
from recalibration_models import mlp, recalibrated, rows

from runningbn import precise_bn, update_bn_stats
from runningbn.recalibration import ranks as ranks_module

# ---------------------------------------------------------------------------------------------------- one process alone


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def alone(rank: int, by_own_loop: bool) -> dict:
    model = mlp(1)
    if rank == 1:
        if by_own_loop:
            with precise_bn(model, process_group=False):
                model(rows(8, seed=1))
        else:
            update_bn_stats(model, [rows(8, seed=1)], process_group=False)
    dist.barrier()
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("by_own_loop", [True, False])
def test_one_process_alone_uses_its_own_data_and_waits_for_nobody(by_own_loop):
    first, second = ranks(2)(alone, by_own_loop)
    assert torch.equal(first["1.running_mean"], mlp(1)[1].running_mean)
    expected = recalibrated(mlp(1), [rows(8, seed=1)])
    assert torch.equal(second["1.running_mean"], expected[1].running_mean)


def late(rank: int, seconds: float) -> list[str]:
    log, logger, patience = Log(), logging.getLogger("runningbn"), ranks_module._WARN_AFTER
    logger.addHandler(log)
    ranks_module._WARN_AFTER = 0.3
    try:
        if rank == 1:
            time.sleep(seconds)
        update_bn_stats(mlp(1), [rows(8, seed=rank)])
    finally:
        logger.removeHandler(log)
        ranks_module._WARN_AFTER = patience
    return log.lines


def test_waiting_for_others_is_told():
    first, second = ranks(2)(late, 2.0)
    assert len(first) == 1
    assert "waiting for 0.3 s for other processes" in first[0]
    assert "process_group=False" in first[0]
    assert second == []


def shares(rank: int) -> tuple:
    report = update_bn_stats(mlp(1), [rows(8, seed=i) for i in range(4 + rank)], 3)
    return report.batches, report.available, str(report)


def test_batches_of_all_processes_are_counted():
    for batches, available, text in ranks(2)(shares):
        assert (batches, available) == (6, 9)
        assert "6 of 9 batches" in text


@pytest.mark.parametrize("wrong", [True, 0, "all"])
def test_process_group_is_a_group_none_or_false(wrong):
    with pytest.raises(TypeError, match="process_group"):
        update_bn_stats(mlp(1), [rows(8)], process_group=wrong)
