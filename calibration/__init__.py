"""Calibration data sources, observers and scale tables."""
