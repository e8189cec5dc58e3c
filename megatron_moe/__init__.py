"""megatron_moe: pretraining of Mixture-of-Experts GPT models.

Importing the package imports nothing heavy: command-line parsing must answer before torch is loaded.
"""

__version__ = "0.1.0"
