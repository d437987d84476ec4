"""JSON files as typed records: each file has one class, which alone knows its fields."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import AGAIN, write_json


class Record(BaseModel):
    """The content of a JSON file of any version: unknown fields are ignored, and those that were added later have defaults."""

    # What to do about a damaged file; other text for files that people write.
    advice: ClassVar[str] = AGAIN
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record in the file at `path`; raises UserError if that is missing or damaged, naming the first field."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {f'{field}: ' if field else ''}{first['msg'][:200]}; {cls.advice}") from None

    def write(self, path: Path) -> None:
        """Write the record atomically to `path` as indented UTF-8 JSON."""
        write_json(path, self.model_dump(mode="json"))
