"""Public names."""

import lowprec


def test_all_public_names_resolve_and_are_listed_where_they_live() -> None:
    assert sorted(lowprec.__all__) == sorted({*lowprec._HOME, "__version__"})
    for name in lowprec.__all__:
        assert getattr(lowprec, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lowprec, "optimise")
