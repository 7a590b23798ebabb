"""Online: feed items to a model and train it.

`feed` executes a movement plan and yields `MiniBatch`es; `layers` and `models` compute on their blocks.
`trainer` runs epochs, checkpoints and resumes; `evaluate` and `infer` go over the whole graph, layer by layer.
"""
