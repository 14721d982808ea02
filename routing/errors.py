"""What can be wrong with a router while it runs. Without torch, so that the command line can name it at once."""


class RouterError(ValueError):
    """A router returned something that is no routing decision; the message names router, layer and step."""


class NotFiniteError(RouterError):
    """A router returned numbers that are not finite: it made them, or was shown such."""
