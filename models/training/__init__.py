"""How a model comes to its weights: batches in, history and scores out; knows no Ray."""
