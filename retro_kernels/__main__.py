"""`python -m retro_kernels`: the command line, where no script of that name is on the path."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
