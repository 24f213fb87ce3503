"""What a network is: families, fusing, weights, catalogue."""
