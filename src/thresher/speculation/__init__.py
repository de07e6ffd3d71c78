"""Speculative decoding: who drafts, how drafts are verified, how long they are."""
