"""What an export brings along when transformers has no architecture for a model: two files that import torch and transformers alone.

They are copied as they are, and never imported here: transformers does that, with trust_remote_code=True, where this package need not be.
"""
