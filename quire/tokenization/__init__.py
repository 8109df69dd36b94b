"""Text to tokens and back: tokenizers, streaming detokenizer, stop strings, chat templates.

Nothing is imported here: the template worker is a process of its own that must start fast.
"""
