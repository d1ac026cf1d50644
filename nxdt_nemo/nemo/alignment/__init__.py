"""Preference training, for which NeMo 2.4 has no schema: the losses, the data and the model of `neuron.alignment`."""
