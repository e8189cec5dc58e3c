"""Threads of a group hold no tensor any more when its process goes on to exit."""

import time
import weakref

import pytest
import torch
import torch.distributed as dist

from megatron_moe.utils.groups import end_groups


@pytest.mark.distributed
def test_tensors_of_the_last_collective_are_free(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: None)  # the group that a mesh in torch's caches holds outlives its end
        for _ in range(20):  # two in five are held for a moment, where nobody waits for it
            time.sleep(0.02)  # the group's threads fall asleep, and wake up late
            tensor, gathered = torch.ones(4), [torch.empty(4)]
            dist.all_gather(gathered, tensor)
            held = [weakref.ref(tensor), weakref.ref(gathered[0])]
            del tensor, gathered
            end_groups()
            assert [tensor() for tensor in held] == [None, None]
    end_groups()
    assert not dist.is_initialized()
