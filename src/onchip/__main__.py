"""`python -m onchip` is the `onchip` command."""

from onchip.cli import main

if __name__ == "__main__":
    main()
