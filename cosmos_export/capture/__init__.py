"""Capture: the published model's own forward as a program of the IR."""
