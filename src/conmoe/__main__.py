"""``python -m conmoe`` and ``torchrun -m conmoe``."""

from conmoe.cli import main

if __name__ == "__main__":
    main()
