"""x"""

PEERS = {}
