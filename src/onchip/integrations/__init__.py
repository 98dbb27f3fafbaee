"""Onchip behind the interfaces that other libraries call."""
