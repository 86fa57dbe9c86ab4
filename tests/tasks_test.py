"""Tasks: the answer can be found in the context, and test strings never occur in training."""
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from nsa import data, tasks
from nsa.data import tokenizer
from nsa.tasks import frame, needle, recall, tracking

HERE = pathlib.Path(__file__).parent
BYTE_TASKS = ("needle", "needle:keys=4", "needle:keys=2,haystack=noise,question=first",
              "needle:haystack=needles", "needle:depth=0.25,digits=5", "phonebook:entries=9",
              "copy:length=24")
TOKEN_TASKS = ("mqar:pairs=12", "mqar:pairs=12,updates=6", "mqar:pairs=12,vocab=8192",
               "mqar:pairs=12,updates=6,layout=paper")
SCATTERED = ("recall:pairs=3,updates=1,distractors=1", "recall:pairs=4,template=held_out", "ledger:entries=5",
             "tracking:chains=4,hops=1", "tracking:chains=3,hops=2", "tracking:chains=2,hops=3,template=held_out",
             "common:words=4,often=9,seldom=4")
ALL = BYTE_TASKS + TOKEN_TASKS + SCATTERED
LENGTH = 700


@pytest.fixture(scope="module")
def documents():
  return data.load("stdlib", "val")


def text_of(example):
  """The bytes of an example, one character each, with the marked answer."""
  text = tokenizer.get("bytes").decode_bytes(example.tokens).decode("latin-1")
  answer = tokenizer.get("bytes").decode_bytes(example.tokens[example.answer_mask]).decode("latin-1")
  return text, answer


def solve(name, text):
  """Reads an example without its answer, as a person would; returns (answer, index behind the evidence)."""
  if name.startswith("needle"):
    key = re.search(r"The special magic number for (\S+) is: $", text).group(1)
    found = list(re.finditer(rf"One of the special magic numbers for {key} is: (\d+)\.", text))
  elif name.startswith("phonebook"):
    who = text.rsplit("\n", 1)[1]
    found = list(re.finditer(rf"\n{who}(\d+)(?=\n)", text))
  else:
    found = list(re.finditer(r"\nCopy: ([a-z]+)\.\n", text))
    found = [m for m in found if text.endswith("\nAgain: ")]
  assert len(found) == 1, "evidence must be unique"
  end = found[0].end() - {"copy": 2, "needle": 1}.get(name.partition(":")[0], 0)  # the answer's own end
  return found[0].group(1), end


@pytest.mark.parametrize("name", BYTE_TASKS)
@pytest.mark.parametrize("with_text", [False, True])
def test_answers_are_in_the_context(name, with_text, documents):
  task = tasks.get(name)
  for index in range(25):
    e = task.example(3, index, LENGTH, "val", documents if with_text else None)
    assert e.tokens.shape == (LENGTH,) and e.tokens.dtype == np.int32
    assert e.tokens[0] == tokenizer.BOS and e.tokens[-1] == tokenizer.EOS
    text, answer = text_of(e)
    first = int(np.flatnonzero(e.answer_mask)[0])
    assert e.answer_mask.sum() == len(answer) and np.all(np.diff(np.flatnonzero(e.answer_mask)) == 1)
    found, evidence_end = solve(name, text[:first - 1])  # text has no BOS: token first is character first - 1
    assert found == answer
    assert 0 <= e.depth <= 1
    queries = {"needle": " What is the", "phonebook": "\n\n", "copy": "\nAgain: "}
    start = text[:first - 1].rindex(queries[name.split(":")[0]])
    assert e.evidence_distance == start - (evidence_end - 1)
    (begin, last), = e.evidence[0]
    np.testing.assert_array_equal(e.tokens[begin:last + 1], e.tokens[e.answer_mask])  # the answer stands there
    assert e.query.tolist() == [start + 1] and e.distances.tolist() == [e.evidence_distance]


def pattern(template, **names):
  """A regular expression of one side of a template; names that are not given match any word."""
  out = re.escape(template.decode()).replace(re.escape("{value}"), "{value}")
  for name in ("key", "name", "value"):
    out = out.replace(re.escape("{%s}" % name), "{%s}" % name)
    out = out.replace("{%s}" % name, names.get(name, r"([a-z]+ [a-z]+|[a-z]+|\d+)"))
  return out


def solve_scattered(name, before):
  """The answer to the question that `before`, a text, ends with; None if the text does not hold it."""
  family = name.partition(":")[0]
  if family == "ledger":
    key = re.search(r'"(\w+)": "$', before).group(1)
    found = re.findall(rf'"{key}": "(\w+)"', before)
    return found[-1] if found else None
  if family == "common":
    words = re.findall(r"\[([a-z]+)\] ", before)
    counts = {word: words.count(word) for word in words if word in needle.NOUNS}
    return max(counts, key=counts.get)
  asked = lambda question: re.search(pattern(question.partition(b"{value}")[0]) + "$", before)
  statement, value = next((statement, found.group(1)) for statement, question in
                          {"recall": recall, "tracking": tracking}[family].TEMPLATES if (found := asked(question)))
  while not value.isdigit():
    found = [m.group(1) for m in re.finditer(pattern(statement, key=value, name=value), before)]
    if not found:
      return None
    value = found[-1]
  return value


@pytest.mark.parametrize("name", SCATTERED)
@pytest.mark.parametrize("with_text", [False, True])
def test_a_solver_that_reads_the_evidence_is_always_right(name, with_text, documents):
  """And one that does not see it never is; questions come behind their evidence, wherever that is."""
  task, places = tasks.get(name), []
  for index in range(25):
    e = task.example(5, index, LENGTH, "val", documents if with_text else None)
    assert e.tokens.shape == (LENGTH,) and e.tokens[0] == tokenizer.BOS and e.tokens[-1] == tokenizer.EOS
    text = "^" + tokenizer.get("bytes").decode_bytes(e.tokens).decode("latin-1")  # one character for each token
    for g in range(len(e.query)):
      answer = np.flatnonzero(e.answer_group == g)
      assert solve_scattered(name, text[:answer[0]]) == text[answer[0]:answer[-1] + 1]
      pieces = e.evidence[g][e.evidence[g, :, 0] >= 0]
      assert pieces[:, 1].max() < e.query[g] < answer[0] and e.distances[g] == e.query[g] - pieces[:, 1].max()
      said = {text[first:last + 1] for first, last in pieces}
      assert text[answer[0]:answer[-1] + 1] in said and len(said) == (task.hops if name.startswith("tracking") else 1)
      hidden = text[:pieces[0, 0]] + "0" * (pieces[0, 1] - pieces[0, 0] + 1) + text[pieces[0, 1] + 1:answer[0]]
      if not name.startswith("common"):
        assert solve_scattered(name, hidden) != text[answer[0]:answer[-1] + 1]
      visible = np.ones(LENGTH, bool)
      assert task.answerable(e, g, visible)
      visible[LENGTH // 2:] = False
      visible[pieces[0, 0]] = name.startswith("common")
      assert not task.answerable(e, g, visible) or name.startswith("common")
      places += (pieces.mean(axis=1) / LENGTH).tolist()
  assert np.min(places) < 0.15 and np.max(places) > 0.7


def test_the_end_of_the_text_misleads_who_counts_there_alone():
  task = tasks.get("common")
  examples = [task.example(0, i, 2000, "train") for i in range(60)]
  right = [task.answerable(e, 0, np.arange(2000) >= begin) for begin in (0, 1400) for e in examples]
  assert all(right[:60]) and np.mean(right[60:]) < 0.1


def test_what_is_held_out_is_not_trained_on():
  assert all(tasks.get(name).trainable for name in ("recall", "tracking", "common", "mqar"))
  assert not any(tasks.get(name).trainable
                 for name in ("ledger", "recall:template=held_out", "tracking:template=held_out"))
  texts = [text_of(tasks.get("recall").example(0, i, 2000))[0] for i in range(40)]
  assert not any("belongs number" in text or "What number has" in text for text in texts)
  seen = [[template[0].split(b"{")[0].decode() in text for text in texts] for template in recall.TEMPLATES[:4]]
  assert min(map(sum, seen)) > 2  # all four others are


def test_needle_depths_spread_and_can_be_fixed(documents):
  drawn = [tasks.get("needle").example(0, i, 900, "train", documents).depth for i in range(200)]
  assert min(drawn) < 0.15 and max(drawn) > 0.9 and 0.4 < np.mean(drawn) < 0.65
  fixed = [tasks.get("needle:depth=0.5").example(0, i, 4000, "train", documents).depth for i in range(5)]
  assert all(abs(d - 0.5) < 0.05 for d in fixed)
  many = text_of(tasks.get("needle:haystack=needles").example(0, 0, 2000))[0]
  assert len(re.findall("One of the special", many)) > 25


@pytest.mark.parametrize("name", TOKEN_TASKS)
def read_mqar(task, e):
  """(bindings, answers): {key: [(place of its value, value), ...]} before each query, and {key: value answered}."""
  half, bound, answered = task.vocab // 2, {}, {}
  for p, token in enumerate(e.tokens.tolist()):
    if token < half:  # every key is followed by its value, in a binding or as an answer
      value = int(e.tokens[p + 1])
      assert value >= half
      if e.answer_mask[p + 1]:
        assert token not in answered
        answered[token] = value
      else:
        assert token not in answered, "bound again behind its query"
        bound.setdefault(token, []).append((p + 1, value))
  return bound, answered


@pytest.mark.parametrize("name", TOKEN_TASKS)
def test_mqar_answers_are_the_last_binding(name):
  task = tasks.get(name)
  for index in range(30):
    e = task.example(1, index, 301, "test")
    assert e.tokens.shape == (301,) and e.tokens.min() >= 1 and e.tokens.max() < task.vocab
    bound, answered = read_mqar(task, e)
    assert len(bound) == task.pairs and sum(map(len, bound.values())) == task.pairs + task.updates
    assert answered == {key: values[-1][1] for key, values in bound.items()}
    assert all(a[1] != b[1] for values in bound.values() for a, b in zip(values, values[1:]))
    assert sorted(e.answer_group[e.answer_mask].tolist()) == list(range(task.pairs))
    for g in range(task.pairs):
      key = int(e.tokens[e.query[g]])
      assert e.answer_group[e.query[g] + 1] == g and e.evidence[g].tolist() == [[bound[key][-1][0]] * 2]
      assert e.distances[g] == e.query[g] - bound[key][-1][0] > 0


def test_mqar_evidence_is_anywhere():
  """p(d) = 2 (1 - d) without updates: an eighth of the length reaches 1 - (7/8)^2 = 23.4 % of the evidence."""
  examples = [tasks.get("mqar:pairs=16").example(0, i, 4097) for i in range(150)]
  distance = np.concatenate([e.distances for e in examples]) / 4096
  for near in (1 / 8, 1 / 2):
    assert abs(np.mean(distance < near) - (1 - (1 - near) ** 2)) < 0.03  # 2400 answers: 3 standard deviations
  place = np.concatenate([e.evidence.ravel() for e in examples])
  assert abs(np.mean(place < 4096 / 8) - (1 - (7 / 8) ** 2)) < 0.03  # the same from the other end


def test_mqar_gaps_follow_the_power_law():
  """p(g) ~ g^(a - 1): half of the queries lie in the first part of the room, on a log scale."""
  where = []
  for i in range(150):
    e = tasks.get("mqar:pairs=4,layout=paper").example(0, i, 2008)
    assert e.evidence.max() < 8
    where += ((np.flatnonzero(e.answer_mask) - 1 - 8) // 2 + 1).tolist()
  # 4 of 1000 slots: the median is near sqrt(1000) without replacement pushing it up a little.
  assert 10 < np.median(where) < 100 and max(where) > 500


def strings_of(name, e):
  """The keys and values of an example."""
  if name.startswith("mqar"):
    return {f"{k}:{v}" for k, values in read_mqar(tasks.get(name), e)[0].items() for _, v in values}
  text, answer = text_of(e)
  if name.startswith("needle"):
    return set(sum(re.findall(r"magic numbers for (\S+) is: (\d+)\.", text), ()))
  if name.startswith("phonebook"):
    return set(sum(re.findall(r"\n(\w+ \w+): (\d+)(?=\n)", text), ()))
  if name.startswith("recall"):
    found = [m for template in recall.TEMPLATES for m in re.finditer(
        pattern(template[0], key="(?P<key>[a-z]+ [a-z]+)", value=r"(?P<value>\d+)"), text)]
    return {word for m in found for word in (m["key"], m["value"])}
  if name.startswith("ledger"):
    return set(sum(re.findall(r'"(\w+)": "(\w+)"', text), ()))
  if name.startswith("tracking"):
    return {text[a - 1:b] for pieces in e.evidence for a, b in pieces}
  return {answer}


@pytest.mark.parametrize("name", ["needle:keys=4", "phonebook:entries=12", "copy:length=5",
                                  "recall:pairs=3,updates=1,distractors=1", "ledger", "tracking:chains=3",
                                  *TOKEN_TASKS])
def test_splits_share_no_strings(name):
  task = tasks.get(name)
  seen = {split: set().union(*(strings_of(name, task.example(0, i, LENGTH, split)) for i in range(120)))
          for split in ("train", "val", "test")}
  assert all(len(s) > 50 for s in seen.values())
  assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
  for split, strings in seen.items():
    assert all(frame.in_bucket(s, split) for s in strings)


def test_mqar_has_values_for_every_key_in_every_split():
  for split in ("train", "val", "test"):
    for key in range(1, 128):
      assert sum(frame.in_bucket(f"{key}:{v}", split) for v in range(128, 256)) >= 2


@pytest.mark.parametrize("name", ALL)
def test_examples_are_pure(name, documents):
  task = tasks.get(name)
  first = [task.example(2, i, LENGTH, "val", documents) for i in range(4)]
  again = [task.example(2, i, LENGTH, "val", documents) for i in reversed(range(4))][::-1]
  for a, b in zip(first, again):
    np.testing.assert_array_equal(a.tokens, b.tokens)
  assert len({e.tokens.tobytes() for e in first}) == 4
  assert first[0].tokens.tobytes() != task.example(3, 0, LENGTH, "val", documents).tokens.tobytes()


def checksum():
  tokens = [tasks.get(name).example(7, 1, LENGTH, "test").tokens for name in ALL]
  return int(np.stack(tokens).astype(np.int64).sum(0) @ np.arange(LENGTH))


def test_a_fresh_process_gives_the_same_examples():
  code = "import tasks_test as t; print(t.checksum())"
  out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={
      **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, sys.path)]),
      "PYTHONHASHSEED": "5"})
  assert int(out.stdout) == checksum()


@pytest.mark.parametrize("name", ["mqar:pairs=5", "phonebook:entries=5", "copy:length=5"])
def test_batches_align_answers_with_targets(name, documents):
  b = tasks.batch(name, seed=1, count=3, length=400, split="val", haystack=documents)
  for i in range(3):
    e = tasks.get(name).example(1, i, 401, "val", documents)
    np.testing.assert_array_equal(b["targets"][i][b["weights"][i] == 1], e.tokens[e.answer_mask])
    np.testing.assert_array_equal(b["inputs"][i, 1:], b["targets"][i, :-1])
    np.testing.assert_array_equal(b["answer_group"][i] >= 0, b["weights"][i] == 1)
    assert b["evidence_distance"][i] == e.evidence_distance and b["depth"][i] == e.depth
  assert b["inputs"].shape == (3, 400) and b["inputs"].dtype == np.int32 and np.all(b["segment_ids"] == 1)
  assert set(b["answer_group"].ravel()) == ({-1, 0, 1, 2, 3, 4} if name == "mqar:pairs=5" else {-1, 0})
  later = tasks.batch(name, seed=1, count=1, length=400, split="val", haystack=documents, first=2)
  np.testing.assert_array_equal(later["inputs"][0], b["inputs"][2])


@pytest.mark.parametrize("name, message", [
    ("nedle", "task 'nedle': unknown; the tasks are common, copy, ledger, mqar, needle, phonebook, recall, tracking"),
    ("needle:kies=4", "'kies=4' is no parameter of needle; .*keys"),
    ("needle:keys", "'keys' is no parameter of needle; write name=value"),
    ("needle:keys=four", "keys = 'four' is no int"),
    ("needle:keys=0", "task needle: keys = 0: at least 1"),
    ("needle:haystack=hay", "haystack = 'hay': text, noise or needles"),
    ("mqar:pairs=200", "task mqar: pairs = 200: there are only .* 127 keys"),
    ("phonebook:entries=2", "task phonebook: entries = 2"),
    ("recall:updates=9", "task recall: updates = 9: between 0 and pairs"),
    ("tracking:template=new", "task tracking: template = 'new': known or held_out"),
    ("common:often=8", "task common: often = 8: above seldom = 8"),
    ("mqar:power=1", "task mqar: power = 1.0: belongs to layout=paper"),
])
def test_unknown_names_and_parameters_are_named(name, message):
  with pytest.raises(ValueError, match=message):
    tasks.get(name)


@pytest.mark.parametrize("name, parameter", [
    ("needle:keys=9", "keys=9"), ("phonebook:entries=20", "entries=20"), ("copy:length=90", "length=90"),
    ("mqar:pairs=60", "pairs=60")])
def test_too_short_contexts_name_the_smallest_that_works(name, parameter):
  with pytest.raises(ValueError, match=rf"data.context = 100: .*{parameter}") as error:
    tasks.get(name).example(0, 0, 101)
  need = int(re.search(r"at least (\d+) tokens", str(error.value)).group(1))
  tasks.get(name).example(0, 0, need + 1)
  with pytest.raises(ValueError, match="data.context"):
    tasks.get(name).example(0, 0, need)


def test_more_strings_than_there_are():
  with pytest.raises(ValueError, match="keys = 2000: .* split 'val' has about 921"):
    tasks.get("needle:keys=2000").example(0, 0, 200_000, "val")
  with pytest.raises(ValueError, match="split = 'dev': unknown"):
    tasks.get("copy").example(0, 0, 200, "dev")
