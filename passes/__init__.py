"""Graph passes, one a file. A pass works on dataflow and shapes; it knows no backend and no name of the model."""
