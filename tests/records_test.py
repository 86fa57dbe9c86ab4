"""nsa.records: the schema refuses what it does not know, and condensed records have the same means."""
import math

import numpy as np
import pytest

from nsa import records

COMMON = dict(seed=0, arm="dense", size="s", step=9, run_mode="dense")


def test_a_field_that_is_not_in_the_schema_is_refused_by_name():
  assert records.make("layer", layer=0, overlap=0.5) == {"kind": "layer", "layer": 0, "overlap": 0.5}
  for kind, fields, message in (("layer", {"layer": 0, "sharpness": 1.0}, "field 'sharpness' is not in nsa/records.py"),
                                ("layer", {"overlap": 1.0}, "field 'layer' is missing"),
                                ("sound", {}, "kind 'sound': nsa/records.py has language, position")):
    with pytest.raises(ValueError, match=message):
      records.make(kind, **fields)


def test_condensed_records_have_the_same_weighted_means_and_no_items():
  rng = np.random.default_rng(0)
  text = [{**records.make("language", split="val", document=f"d{i % 3}", start=i, bits_per_byte=rng.normal(2, 1),
                          bytes=100 + i, second_half_bits_per_byte=float(rng.normal(2, 1)), second_half_bytes=50),
           **COMMON} for i in range(30)]
  items = [{**records.make("task", task="mqar", index=i, exact_match=float(i % 2), answer_nll=float(i),
                           far_exact_match=1.0 * (i > 2), far_answers=i % 4), **COMMON} for i in range(8)]
  layers = [{**records.make("layer", layer=0, overlap=1 / 3), **COMMON}]
  short = records.condense(text + items + layers)
  assert [r["kind"] for r in short] == ["language"] * 3 + ["task", "layer"] and "start" not in short[0]
  for name in ("bits_per_byte", "second_half_bits_per_byte"):
    assert records.mean(short[:3], name) == pytest.approx(records.mean(text, name), rel=1e-14)
  assert short[0]["bytes"] == sum(r["bytes"] for r in text[::3])
  task = short[3]
  assert task["items"] == 8 and task["exact_match"] == 0.5 and task["answer_nll"] == 3.5 and "index" not in task
  assert task["far_answers"] == 12 and task["far_exact_match"] == pytest.approx((3 + 1 + 2 + 3) / 12)
  assert short[4]["overlap"] == 0.3333
  assert records.condense(short) == short


def test_a_value_that_is_not_finite_is_not_hidden_and_one_that_is_missing_is_left_out():
  make = lambda value, count: records.make("language", split="val", document="a", bits_per_byte=value, bytes=count)
  assert records.mean([make(1.0, 1), make(4.0, 2), make(None, 5)], "bits_per_byte") == 3.0
  assert math.isnan(records.mean([make(1.0, 1), make(math.nan, 2)], "bits_per_byte"))
  assert math.isnan(records.mean([], "bits_per_byte"))
