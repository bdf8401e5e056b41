"""`python -m kvbench` does what the command `kvbench` does."""

from kvbench.cli import main

if __name__ == "__main__":
    main()
