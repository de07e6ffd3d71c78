"""The KV cache: sequences that share what they have in common, and files that outlive the process."""
