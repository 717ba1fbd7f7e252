"""Few combinations of values in which every two meet."""

import itertools
from collections.abc import Sequence


def pairwise(*factors: Sequence) -> list[tuple]:
    """Rows, a value of each factor, in which every two values of two factors meet.

    Each row starts with a pair that has not met; each further value is the one that makes most
    pairs meet with those that the row has.

    Source: Cohen et al., "The AETG system: an approach to testing based on combinatorial design"
    (1997), without its random candidates.
    """
    columns = range(len(factors))
    # A place is (which factor, which of its values); of a pair the lower factor comes first.
    places = [[(column, i) for i in range(len(factors[column]))] for column in columns]
    left = dict.fromkeys(
        pair
        for one, other in itertools.combinations(places, 2)
        for pair in itertools.product(one, other)
    )
    rows = []
    while left:
        row = dict(next(iter(left)))
        for column in columns:
            if column not in row:
                _, row[column] = max(places[column], key=lambda place: _meets(place, row, left))
        for pair in itertools.combinations(sorted(row.items()), 2):
            left.pop(pair, None)
        rows.append(tuple(factors[column][row[column]] for column in columns))
    return rows


def _meets(place, row, left):
    return sum(tuple(sorted((place, other))) in left for other in row.items())
