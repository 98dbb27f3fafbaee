"""Other libraries' functions, computed by onchip."""
