"""The schema of evaluation records, in one place: what eval/<step>.json holds, how it is averaged, what is published of
it.

A record is a flat JSON object: its `kind`, the names of COMMON, and the fields of its kind. Evaluation makes records
with `make`, which refuses what is not written here; the report averages by the weights that stand here and draws by
these names; `condense` makes of many windows and items what a published archive keeps. A new scalar per layer is one
line under "layer": with `column=True` its mean over layers is a column of results.csv too, and layers.csv has every
one.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

COMMON = ("seed", "arm", "size", "step", "run_mode")


@dataclasses.dataclass(frozen=True)
class Field:
  """One name of a record.

  role: key (tells records apart, and stays), item (names one window or item: gone once condensed), mean (averaged,
  weighted
    by the field `weight`), total (summed), count (summed; 1 where it is not written: of a single window or item),
    list (what the field `weight` names of each item, in the order of their numbers: see `condense`).
  needed: whether every record of the kind has it.
  digits: significant digits that a published archive keeps; 0 = all.
  column: whether the mean over a run's records is a column of results.csv.
  """
  about: str
  role: str = "mean"
  weight: str = ""
  needed: bool = False
  digits: int = 0
  column: bool = False


def _key(about, needed=True):
  return Field(about, "key", needed=needed)


def _item(about):
  return Field(about, "item")


def _total(about):
  return Field(about, "total")


def _layer(about, column=False):
  return Field(about, digits=4, column=column)


SCHEMA: dict[str, dict[str, Field]] = {
    "language": {  # one window of held-out text
        "corpus": _key("name of the source where several are mixed", needed=False),
        "split": _key("train | val | test | ood"),
        "document": _key("name of the document"),
        "start": _item("first byte of the window in its document"),
        "windows": Field("how many windows", "count"),
        "bits_per_byte": Field("over the window's bytes", weight="bytes"),
        "bytes": _total("bytes scored"),
        "second_half_bits_per_byte": Field("over the bytes of the second half of the context",
                                           weight="second_half_bytes"),
        "second_half_bytes": _total("bytes scored in the second half"),
    },
    "position": {  # held-out text by position in the context, all windows together
        "corpus": _key("as of language", needed=False),
        "start": _key("first position, tokens"),
        "end": _key("one past the last position, tokens"),
        "bits_per_byte": Field("over these positions", weight="bytes", digits=6),
        "bytes": _total("bytes scored"),
    },
    "context_gain": {  # the same last bytes of a window with less and less before them
        "corpus": _key("as of language", needed=False),
        "context": _key("bytes of context before the scored ones"),
        "bits_per_byte": Field("over the scored bytes", weight="bytes", digits=6),
        "bytes": _total("bytes scored"),
    },
    "ar_hit": {  # tokens that complete an n-gram seen before in the document and rare in training (Arora et al. 2023)
        "corpus": _key("as of language", needed=False),
        "start": _key("least distance to the earlier occurrence, tokens"),
        "end": _key("one past the largest distance, tokens"),
        "nll": Field("nats per hit", weight="hits", digits=6),
        "hits": _total("tokens scored"),
    },
    "task": {  # one item of a recall task; "far" answers have evidence that forced and local blocks do not hold
        "task": _key("name with parameters"),
        "index": _item("number of the item"),
        "exact_match": Field("share of the answers with all tokens right", weight="items"),
        "greedy_exact_match": Field("share of the answers that greedy decoding with the cache writes", weight="items"),
        "answer_nll": Field("nats per answer token", weight="items"),
        "far_exact_match": Field("exact match of the far answers", weight="far_answers"),
        "far_answer_nll": Field("nats per token of the far answers", weight="far_answers"),
        "far_answers": _total("how many answers are far"),
        "items": Field("how many items", "count"),
        "exact_matches": Field("exact_match of each item: where a section of the report draws items anew", "list",
                               "exact_match"),
        "tokens_visible": Field("tokens that a query attends to, of a method that chooses once per prompt: mean over "
                                "layers, heads and the queries that it thins out", weight="items", digits=6),
        "tokens_causal": Field("the same of dense attention", weight="items", digits=6),
        "evidence_distance": _item("tokens from the evidence to the question, mean over the answers"),
        "depth": _item("place of the evidence, 0 to 1"),
        "answers": _item("one by one: [first token of the query, last token of the evidence, 1 if right, nats per "
                         "token]"),
    },
    "answer": {  # answers of a task by distance to their evidence, all items together
        "task": _key("as of task"),
        "start": _key("least distance, tokens"),
        "end": _key("one past the largest distance, tokens"),
        "forced": _key("whether forced and local blocks hold the evidence", needed=False),
        "exact_match": Field("share of the answers with all tokens right", weight="answers", digits=6),
        "answer_nll": Field("nats per answer token", weight="answers", digits=6),
        "answers": _total("how many"),
    },
    "layer": {  # diagnostics of attention, means over KV heads and queries (methods/blocks.py, methods/prompt.py)
        "corpus": _key("as of language", needed=False),
        "layer": _key("0 = first"),
        "captured_mass": _layer("share of the dense attention mass on the chosen blocks", column=True),
        "oracle_mass": _layer("share on the best blocks, as many", column=True),
        "block_recall": _layer("share of the best blocks that are chosen"),
        "score_recall": _layer("mass on blocks both best and chosen"),
        "entropy": _layer("of the dense attention over tokens, nats"),
        "overlap": _layer("share of a query's blocks that the next one chose too", column=True),
        "tile_union": _layer("blocks of a tile of query rows over those of one query", column=True),
        "tile_common": _layer("share of the choices on blocks that a third of the tile chose", column=True),
        "queries_limited": _layer("share of the queries with more blocks than they could take", column=True),
        "tokens_visible": _layer("tokens attended to, per query"),
        "tokens_causal": _layer("tokens that dense attention would attend to, per query"),
        "attention_flops": _layer("of a query, selection included"),
    },
    "heat": {  # which key blocks one head selects: an illustration
        "corpus": _key("as of language", needed=False),
        "layer": _key("0 = first"),
        "kv_head": _key("0 = first"),
        "document": _key("name of the document"),
        "heat": Field("[query block][key block], share of the queries", digits=3),
    },
}
# What hidden/<step>.json holds, a list of it under "snapshots": one snapshot of one seed (nsa/look/snapshots.py).
# Columns have one entry for each item; [item][point] lists have a row for each, and in it a number for each point, null
# for none.
HIDDEN_STATES: dict[str, str] = {
    "seed": "of the run", "arm": "of the run", "size": "of the model", "step": "optimizer steps done",
    "run_mode": "how attention ran, as in eval.run_modes",
    "tokens": "of every item: each stands alone in a row",
    "width": "D, dimensions of a state",
    "points": "where states were taken: behind which layer, 0 = first; \"norm\" = behind the final norm",
    "trimmed": "[point][dimension]: which were left out as the largest, by mean squares over the held-out passages",
    "trimmed_energy": "[point]: their share of the energy there",
    "null": "variant -> {measure: [mean, SD over passages]}: independent normal numbers of the same shape",
    "kind": "column: planted (in training) | held_out (split val) | ood (split ood) | shuffled (tokens of held_out) | "
            "recall (mqar)",
    "corpus": "column: name of the source, as data.corpora has it; \"\" of one alone, and of recall",
    "document": "column: name of the document; of recall the task",
    "start": "column: first token in it; of recall the number of the example",
    "times": "column: of planted ones how often their deck plants them, null of others",
    "planted": "column: of planted ones how often they had been by then, 0 of other text, null of recall",
    "pairs": "column: of recall how many, null of others",
    "distance": "column: of recall tokens from the evidence to the last token, null of others",
    "bits_per_byte": "column: loss of the whole item; of recall bits of the answer alone",
    "correct": "column: share of its tokens that were guessed right; of recall of the answer",
    "entropy": "[item][layer]: of dense attention, nats, mean over heads and queries; of recall of the last query",
    "captured_mass": "[item][layer]: of dense attention on the chosen blocks; null where none are chosen",
    "values": "variant -> {measure: [item][point]}: means over the item's states; of recall of the last one, behind "
              "the last layer and the final norm",
}
LAYER = tuple(name for name, field in SCHEMA["layer"].items() if field.role == "mean")


def make(kind: str, **fields: Any) -> dict:
  """A record. Raises ValueError for a kind or a field that the schema does not have, and for a key that is missing."""
  if kind not in SCHEMA:
    raise ValueError(f"record of kind {kind!r}: nsa/records.py has {', '.join(SCHEMA)}; add the kind there")
  unknown = [name for name in fields if name not in SCHEMA[kind]]
  missing = [name for name, field in SCHEMA[kind].items() if field.needed and name not in fields]
  if unknown or missing:
    raise ValueError(f"record of kind {kind!r}: " + (
        f"field {unknown[0]!r} is not in nsa/records.py; add a line there" if unknown
        else f"field {missing[0]!r} is missing"))
  return {"kind": kind, **fields}


def snapshot(**fields: Any) -> dict:
  """A snapshot of hidden states. Raises ValueError unless its fields are those of HIDDEN_STATES."""
  wrong = fields.keys() ^ HIDDEN_STATES.keys()
  if wrong:
    raise ValueError(f"snapshot of hidden states: {sorted(wrong)[0]!r} is missing, or not in nsa/records.py")
  return fields


def number(value: Any) -> float:
  """The value, or NaN for what is missing or no number."""
  return float(value) if isinstance(value, (int, float)) else math.nan


def mean(records: list[dict], name: str) -> float:
  """The mean of a field, weighted as the schema says; NaN without values.

  A value that is not finite makes the mean so: it is not hidden. fsum, as sum() has other last digits from Python 3.12
  on.
  """
  pairs = [(number(r[name]), _weight(r, name)) for r in records if r.get(name) is not None]
  pairs = [(v, w) for v, w in pairs if not w <= 0]
  total = math.fsum(w for _, w in pairs)
  return math.fsum(v * w for v, w in pairs) / total if total else math.nan


def condense(records: list[dict], lists: bool = False) -> list[dict]:
  """One record for all that agree in COMMON and the keys of their kind: means by weight, totals summed, items gone.

  Digits are cut as the schema says. A kind that the schema does not have is left out. The same means come out of the
  condensed records, to the last digits of a float. lists: whether what is asked of each item stays, as a list.
  """
  groups: dict[tuple, list[dict]] = {}
  for record in records:
    schema = SCHEMA.get(record.get("kind"))
    if schema:
      keys = [name for name, field in schema.items() if field.role == "key"]
      groups.setdefault(tuple(record.get(n) for n in ("kind", *COMMON, *keys)), []).append(record)
  out = []
  for (kind, *_), mine in groups.items():
    first = mine[0]
    one = {name: first[name] for name in ("kind", *COMMON) if name in first}
    for name, field in SCHEMA[kind].items():
      if field.role == "key" and name in first:
        one[name] = first[name]
      elif field.role == "count" or field.role == "total" and any(name in r for r in mine):
        one[name] = sum(r.get(name, int(field.role == "count")) for r in mine)
      elif field.role == "mean" and any(r.get(name) is not None for r in mine):
        value = first[name] if len(mine) == 1 else mean(mine, name)
        one[name] = _cut(value, field.digits)
      elif field.role == "list" and lists:
        one[name] = each(mine, field.weight, name)
    out.append(one)
  return out


def each(records: list[dict], name: str, listed: str) -> list[float]:
  """A field of every item in the order of their numbers, of records of items or of one record that has them listed."""
  ordered = sorted(records, key=lambda r: r.get("index", 0))
  return [value for r in ordered for value in r.get(listed, [r.get(name)])]


def _weight(record, name):
  """A field without a weight, or whose weight the record lacks, counts once: records of before a weight was written."""
  weight = SCHEMA[record["kind"]][name].weight
  return number(record.get(weight, 1)) if weight else 1.0


def _cut(value, digits):
  if isinstance(value, list):
    return [_cut(v, digits) for v in value]
  return float(f"{value:.{digits}g}") if digits and math.isfinite(number(value)) else value
