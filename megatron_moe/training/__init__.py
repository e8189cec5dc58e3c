"""The training run: set-up, step, loop, evaluation, stopping."""
