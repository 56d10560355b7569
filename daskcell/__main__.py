"""``python -m daskcell``."""

from daskcell.cli import main

if __name__ == "__main__":
    main()
