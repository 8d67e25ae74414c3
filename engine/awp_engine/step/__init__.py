"""One training step: attack, ascent, descent, update; and the methods that it serves."""
