"""Names of logged metrics: none is a folder of another, since some loggers keep each metric in a file of its name."""

OF_KIND = "_of/"
"""What stands between the name of a metric and a kind, in the name of the metric of that kind."""


def of_kind(metric: str, kind: str) -> str:
    """Name of a metric of one kind, such as ``perplexity_of/Couplet``; ``perplexity`` is that of all kinds."""
    return f"{metric}{OF_KIND}{kind}"


def parted(name: str) -> tuple[str, str | None]:
    """A metric and its kind, from the name; None for the kind of a metric of all kinds."""
    metric, by_kind, kind = name.partition(OF_KIND)
    return metric, kind if by_kind else None


def renamed(name: str) -> str:
    """The name that a metric has today, from one that runs of before had: ``val_perplexity/Couplet``."""
    metric, slash, kind = name.partition("/")
    of_before = slash and metric.startswith(("val_", "test_")) and OF_KIND not in name
    return of_kind(metric, kind) if of_before else name
