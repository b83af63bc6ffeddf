"""A pre-trained model, linearized in its weights."""
