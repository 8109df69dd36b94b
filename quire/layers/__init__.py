"""The layers that models are made of.

Shapes in names: T tokens of a step, H hidden size, N output features, I intermediate size, V
vocabulary, E experts, K experts per token, D head size, B requests of a step.
"""
