"""How model families speak: chat encoders where there is no template, and parsers of answers."""
