"""deepspeed.moe: the layer, and what tells its experts' parameters from others."""
