"""What was behind an error."""

from collections.abc import Iterator

__all__ = ["behind"]


def behind(problem: BaseException) -> Iterator[BaseException]:
    """Yield an error, then those that it was raised from or while they were handled, the latest first."""
    seen: set[int] = set()
    each: BaseException | None = problem
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or each.__context__
