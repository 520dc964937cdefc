"""`python -m hpc` is `scattergen`."""

from hpc.cli import main

if __name__ == "__main__":
    main()
