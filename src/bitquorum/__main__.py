"""Run the command line: `python -m bitquorum`, also under torchrun."""

from bitquorum.cli import main

if __name__ == "__main__":
    main()
