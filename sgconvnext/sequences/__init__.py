"""SGConv for signals, and networks for sequences of it: layer -> mixer -> backbone -> network -> timm."""
