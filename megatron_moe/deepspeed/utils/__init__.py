"""deepspeed.utils."""
