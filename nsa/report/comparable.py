"""Whether the runs of two arms were trained on the same documents and asked the same questions: else their difference
says nothing.

eval/<step>.json says what was asked (nsa/held_out.py), versions.json what was read. Runs of before those had it are
known by the documents, bytes and items of their records.
"""
from __future__ import annotations

import collections
from pathlib import PurePath

from nsa.report.runs import Run, Study

# Settings that refuse a comparison where they differ, what is easier to understand first; and those that are only
# named.
_ASKED = ("split", "context", "tokenizer", "sequences", "tasks", "task_examples", "near", "corpus_sha256",
          "windows_sha256", "examples_sha256")
_NAMED = ("blocks", "implementation")


def reason(study: Study, arm: str, other: str, size: str) -> str:
  """Why the finished runs of two arms cannot be compared, in words; "" where they can."""
  runs = [run for run in study.finished if run.arm in (arm, other) and run.size == size]
  return next((found for run in runs[1:] if (found := _difference(runs[0], run))), "")


def problems(study: Study) -> list[str]:
  """A line for every finished run that differs from the first one of its size."""
  out, first = [], {}
  for run in study.finished:
    one = first.setdefault(run.size, run)
    found = _difference(one, run) or _first(one.settings, run.settings, _NAMED, one, run)
    out += [found] if found else []
  return out


def _difference(a: Run, b: Run) -> str:
  if _source(a) == _source(b):  # another source, or another name for it, is meant
    found = _first(a.versions, b.versions, ("corpus_sha256",), a, b)
    if found:
      return "trained on other documents: " + found
  found = (_first(a.settings, b.settings, _ASKED, a, b)
           or _first(_of_records(a), _of_records(b), ("text", "items"), a, b))
  return "evaluated on other questions: " + found if found else ""


def _first(a: dict, b: dict, names, one: Run, other: Run) -> str:
  # A dense arm states the geometry of its run modes, a sparse one has its method's: {} says nothing.
  name = next((n for n in names if n in a and n in b and a[n] != b[n] and not (n == "blocks" and {} in (a[n], b[n]))),
              None)
  if name is None:
    return ""
  values = [_short(x[name], y[name]) for x, y in ((a, b), (b, a))]
  return f"`{one.name}` has {name} = {values[0]}, `{other.name}` {values[1]}"


def _short(value, other):
  """The value in a few words: of an object its first entry that differs."""
  if isinstance(value, dict) and isinstance(other, dict):
    key = next(k for k in [*value, *other] if value.get(k) != other.get(k))
    return f"{key}: {_short(value.get(key), other.get(key))}"
  text = str(value)
  return text if len(text) <= 40 else text[:12] + "..."


def _source(run: Run) -> tuple[str, ...]:
  data = run.config.get("data", {}) if run.config else {}
  texts = (data.get("corpora") or {"": data.get("source", "")}).values()
  return tuple(PurePath(str(name)).name for name in (*texts, data.get("tokenizer", "")))


def _of_records(run: Run) -> dict:
  """Bytes by document and items by task of one seed in the arm's own run mode; {} without records."""
  text, items = collections.Counter(), collections.Counter()
  own = [r for r in run.records if r.get("run_mode", run.headline_mode) == run.headline_mode]
  for record in own:
    if record.get("seed") != own[0].get("seed"):
      continue
    if record["kind"] == "language":
      where = "/".join([record.get("split", "val"), *(str(record[n]) for n in ("corpus", "document") if n in record)])
      text[where] += record.get("second_half_bytes") or 0
    elif record["kind"] == "task":
      items[record.get("task")] += record.get("items", 1)
  return {**({"text": dict(text)} if text else {}), **({"items": dict(items)} if items else {})}
