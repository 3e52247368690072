"""What is measured of a round and of a model: disagreement, cross term, layers, evaluation."""
