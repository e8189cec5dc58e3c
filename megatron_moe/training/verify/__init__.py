"""--verify-parallelism: the layout of a run, on a small model, against one device.

    RunConfig --shrink.py--> Small --reference.py--> what one process computes   \
                                   --layout.py-----> what the ranks compute      /  compare.py --> Verdict

ranks.py runs it on the ranks of a run that is about to start, folded.py on processes of its own, in place of ranks that are not here.
"""
