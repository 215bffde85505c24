"""The four npm packages of the emoji world, pinned, with the notices that their licences require."""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("noto", "twemoji", "fluent 3d")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned npm package; ``sha512`` is npm's own integrity value (base64)."""

    name: str
    version: str
    sha512: str
    licence: str


NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha512="DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    licence="Apache-2.0",
)
TWEMOJI = Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    sha512="uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    licence="CC-BY-4.0",
)
FLUENT = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha512="Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    licence="MIT",
)
EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha512="Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    licence="MIT",
)
PACKAGES = (NOTO, TWEMOJI, FLUENT, EMOJIBASE)

NOTICE = """\
Noto Emoji (c) Google LLC, Apache License 2.0, https://github.com/googlefonts/noto-emoji
Twemoji graphics (c) Twitter, Inc. and other contributors, CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), https://github.com/jdecked/twemoji; modified (rendered, recoloured,
composed)
Fluent Emoji (c) Microsoft Corporation, MIT, https://github.com/microsoft/fluentui-emoji
Names and tags: emojibase (c) Miles Johnson, MIT, https://github.com/milesj/emojibase; Unicode CLDR
"""


def key(hexcode: str) -> str:
    """Return the key that joins the packages: lower-case code points without the variation selector fe0f."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")
