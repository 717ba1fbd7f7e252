import itertools

from tests.pairwise import pairwise


def test_every_two_values_meet_in_few_rows():
    factors = "abc", (None, 1), [{"x": 1}, {"x": 2}], range(4)
    rows = pairwise(*factors)
    for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2):
        for a, b in itertools.product(one, other):
            assert any(row[i] == a and row[j] == b for row in rows), (a, b)
    assert len(rows) <= 15  # of 48 combinations; 12 at least
