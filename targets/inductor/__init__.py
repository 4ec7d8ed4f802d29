"""Graphs as code that PyTorch compiles."""
