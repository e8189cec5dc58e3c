"""How the process groups of a run end."""

from __future__ import annotations

import time

import torch.distributed as dist

LET_GO_SECONDS = 0.05  # microseconds are enough; a machine with more processes than cores needs more


def end_groups() -> None:
    """Ends every process group of this process; it may exit at once then.

    The groups' threads can outlive them, and drop the tensors of the last collectives, for which they need the interpreter. One that
    asks for it while the interpreter ends aborts the process (seen in one of five exits right behind a collective of gloo): they get it
    here, while this thread sleeps.
    """
    dist.destroy_process_group()
    time.sleep(LET_GO_SECONDS)
