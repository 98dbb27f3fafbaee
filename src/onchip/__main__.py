"""`python -m onchip` is the `onchip` command."""

from onchip.cli import main

main()
