"""What a network costs: measuring and reporting."""
