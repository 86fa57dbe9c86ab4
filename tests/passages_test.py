"""What is there more than once: passages that are planted, and n-grams that were seen far back."""
import numpy as np
import pytest

from nsa import data
from nsa.config import DataConfig
from nsa.data import counter, planting, recurrence, sources


def test_passages_are_planted_as_often_as_is_said(tmp_path):
  """Found again by their bytes: 0, 1, 4, 16 or 64 times in a whole deck, nowhere else, and the rest of the rows is as
  it was."""
  (tmp_path / "train").mkdir()
  for i in range(3):
    noise = counter.integers(counter.key("planting", i), np.arange(100_000), 256)
    (tmp_path / "train" / f"{i}.txt").write_bytes(noise.astype(np.uint8).tobytes())
  config = DataConfig(source=f"files:{tmp_path}", context=4096, global_batch=8, align=64, planted=0.125, task_rows=1,
                      tasks=("mqar:pairs=4",))
  pipeline = data.make(config, seed=1)
  steps = planting.SETS * 85 * 4 // 7 + 1  # a row in four
  batches = [pipeline.batch_at(step) for step in range(steps)]
  passages = pipeline.planted(steps)
  assert [p.planted for p in passages[:20]] == [0, 1, 4, 16, 64] * planting.SETS == [p.times for p in passages[:20]]
  assert len({p.document for p in passages}) == 1 and len({p.start for p in passages[:20]}) == 20
  aside = passages[0].document
  assert aside not in {d.name for one in pipeline.texts for d in one.documents} | {d.name for d in pipeline.documents}
  tokens = next(d.tokens for d in sources.load(config.source, "train") if d.name == aside)
  rows = np.concatenate([b["inputs"] for b in batches])
  targets = np.concatenate([b["targets"] for b in batches])
  segments = np.concatenate([b["segment_ids"] for b in batches])
  for p in passages[:5]:
    head = tokens[p.start:p.start + 8]
    found = np.argwhere((np.lib.stride_tricks.sliding_window_view(rows, 8, axis=1) == head).all(-1))
    assert len(found) == p.planted
    for row, at in found:
      here = slice(at, at + planting.SIZE)
      assert at % 64 == 0
      np.testing.assert_array_equal(rows[row, here], tokens[p.start:p.start + planting.SIZE])
      np.testing.assert_array_equal(targets[row, here], tokens[p.start + 1:p.start + planting.SIZE + 1])
      own = segments[row, at]
      assert ((segments[row] == own).sum() == planting.SIZE
              and not set(segments[row, :at]) & (set(segments[row, at + planting.SIZE:]) - {0}))
  share = sum(p.planted for p in passages) * planting.SIZE / (steps * 7 * 4096)
  assert share == pytest.approx(0.125, abs=0.001)
  part = data.make(config, seed=1).batch_at(5, rows=slice(2, 6))
  for name in part:
    np.testing.assert_array_equal(part[name], batches[5][name][2:6])
  # In rows of 512 the same passages at the same steps, over four rows each.
  rows = [pipeline.batch_at(step, context=512) for step in range(100)]
  whole = [pipeline.batch_at(step) for step in range(100)]
  parts = [tokens[p.start + at:p.start + at + 512] for p in passages[:20] for at in range(0, planting.SIZE, 512)]
  found = sum((b["inputs"] == part).all(1).sum() for b in rows for part in parts)
  assert found == pytest.approx(4 * sum(p.planted for p in pipeline.planted(100)), abs=3) and found > 600
  heads = {tuple(tokens[p.start:p.start + 512]) for p in passages[:20]}
  assert [sum(tuple(x) in heads for x in b["inputs"]) for b in rows] == [
      sum(tuple(x[at:at + 512]) in heads for x in b["inputs"] for at in range(0, 2049, 64)) for b in whole]
  assert [p.start for p in data.make(config, seed=2).planted(steps)][:20] != [p.start for p in passages][:20]
  early = pipeline.planted(steps // 2)
  assert 150 < sum(p.planted for p in early) < 190 and all(p.planted <= p.times for p in early)
  with pytest.raises(ValueError, match="data.planted = 0.125: passages have 2048 tokens"):
    pipeline.check_context(32_768)
  with pytest.raises(ValueError, match="data.planted = 0.01: .* gives 0 of 2048 tokens; 20 are needed"):
    planting.Planting({}, 0.01, 64, 0)


@pytest.mark.parametrize("ngram, letters", [(1, 150), (2, 20), (3, 8), (5, 3), (8, 2)])
def test_recurrences_equal_a_search(ngram, letters):
  rng = np.random.default_rng(ngram)
  targets = rng.integers(0, letters, (3, 90)).astype(np.int32)
  inputs = np.concatenate([np.full((3, 1), 7, np.int32), targets[:, :-1]], axis=1)
  train = [sources.Document("a", rng.integers(0, letters, 300).astype(np.uint16)),
           sources.Document("b", np.zeros(2, np.uint16))]
  got = recurrence.distances(targets, inputs, train, ngram=ngram, rare=2, least=4)
  text = [tuple(document.tokens.tolist()) for document in train]
  found = 0
  for w in range(3):
    whole = (7, *targets[w].tolist())
    for t in range(90):
      gram, want = whole[t + 2 - ngram:t + 2] if t + 2 >= ngram else None, 0
      if gram:
        back = [d for d in range(1, t + 3 - ngram) if whole[t + 2 - ngram - d:t + 2 - d] == gram]
        seen = sum(line[i:i + ngram] == gram for line in text for i in range(len(line) - ngram + 1))
        want = back[0] if back and back[0] >= 4 and seen <= 2 else 0
      assert got[w, t] == want, (w, t)
      found += want > 0
  assert found > 2
