"""Measuring: a bundle, or a published geometry with random weights, on whatever device there is."""
