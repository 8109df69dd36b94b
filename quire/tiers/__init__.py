"""Where KV pages go when the device is full: DRAM, files, Mooncake; and how they come back.

A page is bytes under an identity (quire/kv/identity.py). Whatever is in doubt is a miss: the engine
computes again, so a tier can be slow, full or broken without a wrong token.
"""
