collect_ignore = ["toys.py"]  # a program of its own: pytest, which looks for doctests, would import it
