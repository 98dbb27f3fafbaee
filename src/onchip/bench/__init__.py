"""Measuring: onchip against its peers, side by side in one process, as ratios; what `onchip bench` runs."""
