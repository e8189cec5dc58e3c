"""The benchmark of what is hidden: it runs, and a wire on which nobody waits hides all."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from distributed_pool import run_distributed

from benchmarks import __main__ as command
from benchmarks import overlap
from megatron_moe.moe.dispatch import exchange

pytestmark = pytest.mark.distributed


def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "on_two_ranks", lambda function, *args: run_distributed(function, 2, *args))
    assert command.main(["overlap", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("overlap-*.json")
    found = json.loads(file.read_text())
    assert set(found["figures"]) == set(overlap.WAYS)
    assert all(0 <= found["figures"][name][way]["median"] <= 1 for name in overlap.WAYS for way in ("forward", "backward"))


@pytest.mark.parametrize(("seconds_between", "hidden"), [(0.0, 0.0), (0.05, 0.5), (0.2, 1.0)])
def test_hidden_is_the_share_of_the_wire_in_which_something_else_was_done(monkeypatch, seconds_between, hidden):
    """100 rows of 4 bytes at 4000 bytes per second: a tenth of a second."""
    monkeypatch.setattr(overlap.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(exchange._Link, "start", lambda link, x, receive, send: x)
    monkeypatch.setattr(exchange._Link, "wait", lambda link: None)
    wire, link = overlap.Wire(4000.0), SimpleNamespace(group=None)
    with wire.between_ranks():
        exchange._Link.start(link, torch.ones(100, 1), [7, 50], [3, 100])
        time.sleep(seconds_between)
        exchange._Link.wait(link)
    assert wire.hidden() == pytest.approx(hidden, abs=0.1)
