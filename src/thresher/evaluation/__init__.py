"""Measuring: speed against the machine's floor and against other engines."""
