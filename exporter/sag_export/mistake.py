class Mistake(Exception):
    """What the user can mend, in one sentence. The tool prints it and leaves nothing behind."""
