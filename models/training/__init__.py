"""How a model comes to its weights: batches in, history and scores out; knows no Ray.

Open in this order: recipes (how to train, as one value) with rates and augment; batches, balance,
losses, optimizers; fit, the loop, and states, what it leaves behind; scores. demo, gallery and
synthetic are programs.
"""
