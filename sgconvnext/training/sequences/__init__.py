"""Long sequences and their classes, or their next bytes: generated, read, and by name."""
