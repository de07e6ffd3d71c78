"""Thin bindings to the C++ core in csrc/, each beside a plain torch reference that says what it computes."""
