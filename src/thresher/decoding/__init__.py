"""One pass and one token: a ragged batch through the model, and its logits to tokens."""
