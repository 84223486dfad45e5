"""Which neurons of a dense FFN go together: published strategies as pure functions of tensors.

One paper per module; each function returns a `Grouping`, in which every neuron occurs once. What
the routers of these papers would be is in `routers`. Nothing here reads a file or a model.
"""
