"""``python -m steepest`` is the command ``steepest``."""

from steepest.lab.cli import main

if __name__ == "__main__":
    main()
