"""What onchip holds its own parts to, for those who write parts of their own."""

from onchip.testing.mixers import MIXER_CHECKS, check_mixer

__all__ = ["MIXER_CHECKS", "check_mixer"]
