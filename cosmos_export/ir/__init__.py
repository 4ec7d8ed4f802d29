"""The intermediate representation: programs of functional tensor graphs over symbolic dims, without weight data.

This package imports nothing else of the project but its diagnostics.
"""
