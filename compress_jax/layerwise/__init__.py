"""One layer at a time: the least-squares problem of a layer, its evidence, and the loop over leaves that solvers share."""

__all__: list[str] = []


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
