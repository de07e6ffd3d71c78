"""What a computation costs in bytes and operations, and what this machine can do of each in a second."""
