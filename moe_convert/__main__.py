"""`python -m moe_convert` is the same as the `moe-convert` script."""

from moe_convert.cli import main

if __name__ == "__main__":
    main()
