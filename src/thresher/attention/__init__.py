"""Attention methods: one file, one frozen dataclass, one paper each."""

DEFAULT_ATTENTION = "auto"  # wherever nothing else is asked for; here, as the registry imports torch
