import pytest
from loraplex.core.errors import LoraplexError, NotFound, error_from_code


def _tree(cls: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


@pytest.mark.parametrize("cls", [cls for cls in _tree(LoraplexError) if not cls.__name__.startswith("_")])
def test_each_class_is_found_again_by_its_code(cls: type[LoraplexError]) -> None:
    error = error_from_code(cls("m").class_code, "m")
    assert type(error) is cls
    assert error.message == "m"


def test_special_codes_and_unknown_ones() -> None:
    assert type(error_from_code(NotFound("m", code="adapter_not_found").class_code, "m")) is NotFound
    unknown = error_from_code("of_the_future", "m")
    assert (type(unknown), unknown.code, unknown.class_code) == (LoraplexError, "of_the_future", "of_the_future")
