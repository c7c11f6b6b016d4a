"""ConvNeXt's training: what train.py and validate.py are made of."""
