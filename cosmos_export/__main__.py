"""``python -m cosmos_export``: the same command as ``cosmos-export``."""

from cosmos_export.cli import main

if __name__ == "__main__":
    main()
