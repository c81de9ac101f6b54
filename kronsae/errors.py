"""The one exception that the command line turns into a message instead of a traceback."""


class InputError(ValueError):
    """What the caller gave cannot work: the message names what was expected and what came.

    Everything that a user can cause (a flag, a file, a dataset, a model name) raises this; a
    bug of ours raises something else and keeps its traceback.
    """
