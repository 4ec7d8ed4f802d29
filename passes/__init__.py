"""Graph passes, one per file. A pass works on dataflow and shapes; it knows no backend and no name of the model."""
