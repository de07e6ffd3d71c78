"""Compressed CNNs: Tucker decomposition tuned by distillation, held against adversarial attacks."""
