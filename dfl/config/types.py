"""The types of a recipe's fields: what YAML gives becomes a value of them, or they say what is allowed.

Not for what only several fields together can decide (`checks`), nor for how a refusal is worded (`errors`).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from dfl.config.recipes import number

NOT_ALLOWED = "not_allowed"
T = TypeVar("T")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Allowed:
    """What a type allows, in words, beside its constraints in an annotation; `read` makes of a value what people mean by it."""

    text: str
    read: Callable[[Any], Any] = _same

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(self.read(value))
        except ValidationError:
            raise PydanticCustomError(NOT_ALLOWED, "{text}", {"text": self.text}) from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a text."""
    return number(value) if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def one_or_list(value: Any, *of_one: type) -> Any:
    """A list as a tuple, and a value of the types `of_one` as a list of one."""
    return (value,) if isinstance(value, of_one) else tuple(value) if isinstance(value, list) else value


def _expanded(value: Any) -> Any:
    """`$NAME` and `~` of a path. ValueError names a variable that is not set."""
    if not isinstance(value, str):
        return _text(value)
    found = os.path.expandvars(os.path.expanduser(value))
    left = re.search(r"\$\{?(\w+)", found)
    if left:
        raise ValueError(f"the environment variable {left[1]} is not set")
    return found


Count = Annotated[int, Field(strict=True, ge=1), Allowed("a whole number from 1", _whole)]
CountOrZero = Annotated[int, Field(strict=True, ge=0), Allowed("a whole number from 0", _whole)]
ZeroOrOne = Annotated[int, Field(strict=True, ge=0, le=1), Allowed("0 or 1", _whole)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), Allowed("a positive number", _number)]
PositiveOrZero = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), Allowed("zero or a positive number", _number)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), Allowed("a number from 0 up to, not including, 1", _number)]
Switch = Annotated[bool, Field(strict=True), Allowed("true or false")]
Text = Annotated[str, Field(strict=True), Allowed("text", _text)]
Path = Annotated[Text, BeforeValidator(_expanded)]
Folder = Annotated[str, Field(strict=True, pattern=r"\S"), Allowed("the path of a folder", _text), BeforeValidator(_expanded)]
Several = Annotated[tuple[T, ...], BeforeValidator(one_or_list)]
Names = Annotated[tuple[Text, ...], BeforeValidator(lambda value: one_or_list(value, str))]
