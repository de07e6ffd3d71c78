"""Memory Mosaics: training and experiments."""
