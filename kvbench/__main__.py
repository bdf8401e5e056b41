"""`python -m kvbench` does what the command `kvbench` does."""

from kvbench.cli.main import main

if __name__ == "__main__":
    main()
