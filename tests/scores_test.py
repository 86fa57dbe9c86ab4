"""nsa/scores.py against the same sums written window by window and answer by answer, to the last bit."""
import numpy as np
import pytest

from nsa import config as config_lib, data, held_out, methods, scores, tasks

T, LN2 = 64, float(np.log(2.0))
E = config_lib.EvalConfig(batch=4, near=(2, 8))


def run_of(seed):
  """A model that says random things, the same of equal rows."""
  def run(params, batch, watch):
    said = [np.random.default_rng([seed, *row[:8], *ids[:48:16]]) for row, ids in zip(batch["inputs"],
                                                                                    batch["segment_ids"])]
    nll = np.stack([rng.exponential(2.0, T).astype(np.float32) for rng in said])
    return nll, np.stack([rng.random(T) < 0.8 for rng in said]), [{"tokens_visible": np.float32([3.0, 4.0])}]
  return run


def mean(values):
  return float(np.mean(list(values)))


@pytest.mark.parametrize("method", [methods.Dense(), methods.get("snapkv")()])
def test_records_of_text(method):
  rng = np.random.default_rng(3)
  ones = np.ones(T, np.int32)
  token_bytes = np.array([0, 1, 1, 2, 3, 0, 1])
  windows = [data.EvalWindow(f"d{i // 3}", 5 * i, *rng.integers(0, 7, (2, T)).astype(np.int32), np.ones(T, np.float32),
                             ones, i % 2) for i in range(10)]
  windows[4].targets[:] = 5  # special tokens alone
  back = np.where(rng.random((10, T)) < 0.3, rng.integers(1, T, (10, T)), 0)
  found = scores.text(run_of(1), None, held_out.Text(windows, token_bytes), E, T, method, back, (8,))
  scored = T // 2 if method.name == "snapkv" else 0
  rows = lambda kind: [row for row in found if row["kind"] == kind]

  def said(some, segment_ids=None):
    ids = [w.segment_ids if segment_ids is None else segment_ids for w in some]
    return run_of(1)(None, {"inputs": [w.inputs for w in some], "segment_ids": ids}, False)[0].astype(np.float64)

  nll = said(windows)
  real = np.stack([token_bytes[w.targets] for w in windows])
  spoken = real > 0
  real[:, 0] -= [w.prefix for w in windows]
  bits = np.stack([x / LN2 * ok for x, ok in zip(nll, spoken)])
  per_byte = lambda b, r: float(b.sum() / r.sum()) if r.sum() else None
  assert [r.get("bits_per_byte") for r in rows("language")] == [
      None if scored else per_byte(bits[i], real[i]) for i in range(10)]
  assert [(r.get("second_half_bits_per_byte"), r["second_half_bytes"], r["bytes"], r["document"], r["start"])
          for r in rows("language")] == [
      (per_byte(bits[i, T // 2:], real[i, T // 2:]), real[i, T // 2:].sum(), real[i, scored:].sum(), w.document,
       w.start) for i, w in enumerate(windows)]
  assert [(r["start"], r["bits_per_byte"]) for r in rows("position")] == [
      (a, per_byte(bits[:, a:b], real[:, a:b])) for a, b in zip((0, 1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64))
      if a >= scored]
  far = [(i, t) for i in range(10) for t in range(scored, T) if spoken[i, t]]
  expected = [[nll[at] for at in far if a <= back[at] < 2 * a] for a in (1, 2, 4, 8, 16, 32)]
  assert [(r["nll"], r["hits"]) for r in rows("ar_hit")] == [(mean(x), len(x)) for x in expected if x]
  cut = said(windows, np.where(np.arange(T) < 40, 1, 2)) / LN2 * (real > 0)
  assert [(r["context"], r["bits_per_byte"]) for r in rows("context_gain")] == ([] if scored else [
      (8, per_byte(cut[:, 48:], real[:, 48:])), (48, per_byte(bits[:, 48:], real[:, 48:]))])


def test_records_of_a_task():
  examples = tasks.batch("mqar:pairs=3", held_out.TASK_SEED, 9, T, "val")
  examples["query"] = np.pad(examples["query"], ((0, 0), (0, 2)), constant_values=-1)  # some examples have more
  examples["evidence"] = np.pad(examples["evidence"], ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=-1)
  found = scores.task(run_of(2), None, "mqar:pairs=3", examples, E, True)
  nll, right, _ = run_of(2)(None, examples, False)
  everything = []
  for i, row in enumerate(r for r in found if r["kind"] == "task"):
    answers = []
    for group in range(examples["answer_group"][i].max() + 1):
      at = np.flatnonzero(examples["answer_group"][i] == group)
      loss = np.cumsum([0.0, *nll[i, at].astype(np.float64)])[-1] / len(at)
      query, evidence = int(examples["query"][i, group]), int(examples["evidence"][i, group, :, 1].max())
      answers.append((query, evidence, int(right[i, at].all()), loss, evidence >= 2 and query - evidence > 8))
    assert row["answers"] == [[q, e, r, round(x, 4)] for q, e, r, x, _ in answers]
    assert row["exact_match"] == mean(r for _, _, r, _, _ in answers)
    far = [one for one in answers if one[-1]]
    assert row["far_answers"] == len(far)
    assert (row.get("far_exact_match"), row.get("far_answer_nll")) == (
        (mean(one[2] for one in far), mean(one[3] for one in far)) if far else (None, None))
    everything += answers
  assert any(far for *_, far in everything) and not all(far for *_, far in everything)
  listed = []
  for a, b in ((0, 32), (32, 64)):
    for far in (True, False):
      mine = [one for one in everything if a <= one[0] - one[1] < b and one[-1] == far]
      listed += [(a, not far, len(mine), mean(one[2] for one in mine), mean(one[3] for one in mine))] if mine else []
  assert [(r["start"], r["forced"], r["answers"], r["exact_match"], r["answer_nll"])
          for r in found if r["kind"] == "answer"] == listed
