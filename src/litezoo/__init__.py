"""A zoo of lightweight CNNs with deployment recipes."""
