"""How far a compiled program is from the published implementation."""
