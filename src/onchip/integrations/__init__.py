"""Other libraries' functions and interfaces, computed by onchip."""
