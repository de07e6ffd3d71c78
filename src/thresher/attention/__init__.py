"""Attention methods: one file, one frozen dataclass, one paper each."""
