class Mistake(Exception):
    """One sentence about what the user can correct. It is printed, and nothing is written."""
