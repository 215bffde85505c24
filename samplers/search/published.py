"""The published form of a search: a preset whose settings stand where no option says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from diffaccel.samplers.search.config import SearchConfig


@dataclass(frozen=True, kw_only=True)
class PublishedForm(SearchConfig):
    """Base of searches whose defaults differ from what their paper does.

    Args:
        preset: "default", or "paper": the published settings. Options given beside it win over them, where they are
            not the default.
    """

    published: ClassVar[dict[str, Any]] = {}  # options as the paper has them

    preset: Literal["default", "paper"] = "default"

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """Return the published form."""
        return cls(preset="paper", **options)

    def __post_init__(self) -> None:
        if self.preset == "paper":
            defaults = {field.name: field.default for field in fields(self)}
            for option, published in self.published.items():
                if getattr(self, option) == defaults[option]:
                    object.__setattr__(self, option, published)
        super().__post_init__()
