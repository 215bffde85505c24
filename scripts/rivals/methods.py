"""Means of every method of the table over its seeds."""

from __future__ import annotations

from typing import Any

from scripts.zoo.fashion import score

HEAD = "| method | seeds | distance | range | ratio | obeyed | seconds | with the teacher's |"


def means(made: dict[str, Any]) -> dict[str, Any]:
    """Return every method's means over its seeds, its least and largest distance, and its seconds in two readings.

    In the second reading the seconds of the teacher are charged to what begins with it.

    Args:
        made: record of :mod:`scripts.rivals.fashion`; its rows are named METHOD-SEED.
    """
    seeds: dict[str, list[dict[str, Any]]] = {}
    for name, row in [*made["rivals"].items(), *made["students"].items()]:
        seeds.setdefault(name.rpartition("-")[0], []).append({"teacher": True, **row})

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return round(sum(float(row[key]) for row in rows) / len(rows), 4)

    found = {}
    for name, rows in seeds.items():
        distances, distance, seconds = [row["fd"] for row in rows], mean(rows, "fd"), mean(rows, "seconds")
        charged = made["teacher_seconds"] if rows[0]["teacher"] else 0.0
        found[name] = {
            "seeds": len(rows), "fd": distance, "fd_range": [min(distances), max(distances)],
            "ratio": score.ratio(distance, made["teacher_fd"], made["floor"]), "obeyed": mean(rows, "obeyed"),
            "seconds": seconds, "seconds_with_teacher": round(seconds + charged, 1),
        }  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[1]["fd"]))


def shown(found: dict[str, Any], at_a_time: int) -> str:
    """Return the means of methods as a table."""
    lines = [f"{at_a_time} run{'s' * (at_a_time > 1)} at a time on one device", HEAD, "|---" * 8 + "|"]
    for name, row in found.items():
        low, high = row["fd_range"]
        cells = [name, row["seeds"], f"{row['fd']:.3f}", f"{low:.3f} to {high:.3f}", row["ratio"],
                 f"{row['obeyed']:.3f}", f"{row['seconds']:.0f}", f"{row['seconds_with_teacher']:.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
