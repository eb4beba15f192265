"""Kinds of values that keys have, and what all sections of the configuration share."""
import re
from typing import Any, NamedTuple, Optional, Tuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from typing_extensions import Annotated

from ..system.text import drawn


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is for the user."""


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(drawn(message))  # pydantic takes no surrogates there


def listed(value: Any) -> str:
    """Write a list as users do; anything else as it is."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


# Marks keys whose value is a path of this machine, in which `~` and variables are replaced.
PATH = 'a path of this machine'


def _not_empty(value: str) -> str:  # not by min_length, for which pydantic wants a path to be UTF-8
    require(value != '', 'should have at least 1 character')
    return value


Place = Annotated[str, PATH]
GivenPlace = Annotated[str, PATH, AfterValidator(_not_empty)]
LONGEST, LARGEST = 1e12, 2 ** 53  # steps or epochs of a run; any whole number: what float64 and int64 both hold


class Duration(NamedTuple):
    """A point or span of training, as the user wrote it: ``500`` or ``500 steps``, ``10 epochs``, ``5%`` of the run.

    A key that says so also takes time by the clock: ``10 minutes``, ``2 hours``.
    """
    value: float
    unit: str  # 'steps', 'epochs', '%' or 'minutes'

    def steps(self, per_epoch: int, total: int = 0) -> int:
        """In steps, the unit of time inside the program; `total` is the length of the run in steps. Not of minutes."""
        scale = {'steps': 1, 'epochs': per_epoch, '%': total / 100}[self.unit]
        return int(round(self.value * scale))

    def __str__(self) -> str:
        value = int(self.value) if self.value == int(self.value) else self.value
        return f'{value}%' if self.unit == '%' else f'{value} {self.unit}'


UNITS = {'': 'steps', 'step': 'steps', 'epoch': 'epochs', '%': '%'}
CLOCK = {'minute': 1, 'min': 1, 'hour': 60, 'h': 60}  # in minutes


def parse_time(value: Any) -> Duration:
    """The length of time that a user wrote, which may be by the clock.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Duration):
        return value
    text = str(value) if isinstance(value, (str, int, float)) and not _huge(value) else type(value).__name__
    match = re.fullmatch(r'\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(|%|(?:step|epoch|minute|min|hour)s?|h)\s*', text,
                         re.ASCII)
    if not match or isinstance(value, bool):
        raise ValueError(f"'{text}' is not a length of time: write steps as 500, or '10 epochs', or '5%' of the run")
    number, unit = float(match[1]), match[2].rstrip('s')
    require(number <= LONGEST, f"'{text}' is longer than any run: at most {LONGEST:.0e} steps, epochs or per cent")
    return Duration(number * CLOCK[unit], 'minutes') if unit in CLOCK else Duration(number, UNITS[unit])


def parse_duration(value: Any) -> Duration:
    """The length of time that a user wrote, in steps, epochs or per cent.

    Raises:
        ValueError: it is none, or one by the clock.
    """
    found = parse_time(value)
    require(found.unit != 'minutes', f"'{value}' is a time by the clock, which checkpoint.every takes and nothing "
            "else: write steps as 500, or '10 epochs', or '5%' of the run")
    return found


def _huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > LARGEST


Time = Annotated[Duration, BeforeValidator(parse_duration), PlainSerializer(str, return_type=str)]
ClockTime = Annotated[Duration, BeforeValidator(parse_time), PlainSerializer(str, return_type=str)]
BOOLEANS: Tuple[Any, ...] = (bool, Optional[bool])  # types of keys that take true and false


class Section(BaseModel):
    """What all parts of the configuration share: no unknown key, no change after the checks."""
    model_config = ConfigDict(frozen=True, extra='forbid', populate_by_name=True, protected_namespaces=(),
                              allow_inf_nan=False)

    @field_validator('*', mode='before')
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what the conversions of pydantic would let pass: true as a number, numbers that no machine holds."""
        require(not isinstance(value, bool) or cls.model_fields[str(info.field_name)].annotation in BOOLEANS,
                 f"{str(value).lower()} is no value for it")
        require(not isinstance(value, str) or '\0' not in value, 'a NUL character is no part of any value')
        return value

    @field_validator('*')
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        require(not any(map(_huge, value if isinstance(value, tuple) else (value,))),
                 f'larger than {LARGEST:,}, the largest whole number of a configuration')
        return value
