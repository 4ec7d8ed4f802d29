"""Precision: schemes of quantization, and recipes that say which product of a model gets which."""
