"""The network: kernel, layer, block, and the models that timm knows."""
