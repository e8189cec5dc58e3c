"""The fused all-to-all: rows travel to their experts and back in Triton kernels that write and read the memory of other ranks.

    plan   count -> publish -> place       how many rows each expert gets, where each assignment's row will lie; no host waits
    push   send -> land                    rows into the owners' memory (dispatch; and the gradient of combine)
    pull   stage -> meet -> gather_sum     results out of the owners' memory, added up (combine; and the gradient of dispatch)

    memory.py           memory that all ranks of a group can reach: torch symmetric memory, CUDA IPC, shared memory, virtual ranks
    triton_exchange.py  the kernels
    exchange.py         buffers, and the order in which the kernels run

The same kernels run on GPUs, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), where the memory
of the other ranks is shared memory of their processes.
"""
