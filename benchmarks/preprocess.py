"""x"""
PEERS={}
