"""What we know: training recipes, devices, and the trainer that runs the first."""
