"""Pages for people: one self-contained HTML file each, from the JSON that a machine reads."""
