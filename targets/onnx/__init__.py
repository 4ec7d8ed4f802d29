"""Graphs as ONNX models, with their weights beside them."""
