"""Every number of the study's verdict, and of its curricula, once more, from its records alone: NumPy and SciPy.

    python experiments/results/main/reanalysis.py                     # all study*.tar.xz beside this file
    python experiments/results/main/reanalysis.py runs/main [--sealed]

A path is a published archive, what it unpacks to, or a study's own directory; of several, one after the other, runs
add up and the last one's study.json counts. --sealed: the values of the sealed evaluations, of the tiers that were
opened (launch.report --open); endpoints are admitted by the controls of the plain ones all the same. Without it words
say whether those values repeat them. Rules: PLAN.md.
"""
import collections
import itertools
import json
import math
import pathlib
import sys
import tarfile

import numpy as np
from scipy import optimize, special, stats

# metric -> (kind of record, field, weight of a record, kind of endpoint, less is better, the controls' least loss, the
# oracle's largest)
METRICS = {
    "second_half_bits_per_byte": ("language", "second_half_bits_per_byte", "second_half_bytes", "text", True, .02,
                                  .005),
    "bits_per_byte": ("language", "bits_per_byte", "bytes", "text", True, .02, .005),
    "ar_hit_nll": ("ar_hit", "nll", "hits", "text", True, .1, .02),
    "exact_match": ("task", "exact_match", "items", "recall", False, None, .02),
    "far_exact_match": ("task", "far_exact_match", "far_answers", "recall", False, None, .02),
    "answer_nll": ("task", "answer_nll", "items", "recall", True, None, None),
    "far_answer_nll": ("task", "far_answer_nll", "far_answers", "recall", True, None, None),
}
NODES, WEIGHTS = np.polynomial.legendre.leggauss(300)
GATED_BY = {"answer_nll": "exact_match", "far_answer_nll": "far_exact_match"}


def read(*paths):
  """(study.json, {run: {file: text}}) of archives and directories."""
  files = {}
  for path in map(pathlib.Path, paths):
    if path.is_file():
      with tarfile.open(path) as tar:
        files |= {member.name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}
      continue
    names = ("config.json", "metrics.jsonl", "DONE", "FAILED", "eval/*.json")
    files |= {str(f.relative_to(path)): f.read_text() for name in names for f in path.glob(f"runs/*/{name}")}
    files["study.json"] = (path / "study.json").read_text()
  runs = collections.defaultdict(dict)
  for name, text in files.items():
    if name.startswith("runs/"):
      _, run, file = name.split("/", 2)
      runs[run][file] = text
  return {"controls": {}, "alpha": 0.05, "quantities": ["R", "A", "Delta"], **json.loads(files["study.json"])}, runs


class Values:
  """value[arm, size, run mode, metric] = {seed: number} of the finished runs; own[arm]; tokens[arm, size]; config[arm,
  size], log[arm, size] = {seed: lines} of what was logged."""

  def __init__(self, runs, metrics, sealed=False):
    self.value, self.own, self.tokens, self.asked = collections.defaultdict(dict), {}, {}, collections.defaultdict(set)
    self.config, self.log = {}, collections.defaultdict(dict)
    for files in runs.values():
      if "config.json" not in files:
        continue
      config = json.loads(files["config.json"])
      arm, size = config["arm"], config["size"]
      self.own.setdefault(arm, "dense" if config["schedule"]["stages"][-1]["mode"] == "dense" else "sparse")
      self.config.setdefault((arm, size), config)
      if "DONE" not in files or "FAILED" in files:
        continue
      steps = [int(n[5:-5]) for n in files if n.startswith("eval/") and n[5:-5].isdigit()]
      name = f"eval/{max(steps)}{'-sealed' if sealed else ''}.json"
      if name not in files:
        continue
      evaluation, last, once = json.loads(files[name]), {}, set()
      finite = lambda one: isinstance(one.get("loss"), (int, float)) and math.isfinite(one["loss"])
      for line in files.get("metrics.jsonl", "").splitlines():
        one = json.loads(line)
        last[one["seed"]] = one
        self.log[arm, size].setdefault(one["seed"], []).append(one)
        once |= {one["seed"]} if finite(one) else set()
      lost = {seed for seed in once if not finite(last[seed])}  # diverged
      tokens = [one.get("tokens", 0.) for one in last.values()]
      self.tokens[arm, size] = max([self.tokens.get((arm, size), 0.), *tokens])
      settings = evaluation.get("settings", {})
      self.asked[size].add(json.dumps([settings.get(n) for n in ("windows_sha256", "examples_sha256", "near")]))
      by = collections.defaultdict(list)
      for record in evaluation["records"]:
        if record.get("seed", config["seeds"][0]) not in lost:
          by[record["seed"], record["run_mode"], record["kind"]].append(record)
      for (seed, mode, kind), records in by.items():
        for metric in metrics:
          if METRICS[metric.partition(":")[0]][0] == kind and (x := mean(records, metric)) is not None:
            self.value[arm, size, mode, metric][seed] = x

  def of(self, arm, size, metric, mode=None):
    return self.value.get((arm, size, mode or self.own.get(arm), metric), {})


def mean(records, metric):
  """One number of the records of a run mode; None without any."""
  base, _, part = metric.partition(":")
  kind, field, weight, *_ = METRICS[base]
  groups = collections.defaultdict(list)
  for r in records:
    mine = r.get("corpus", "") if kind != "task" else r["task"].partition(":")[0]
    if part in ("", mine, r.get("task")) and r.get(field) is not None and r.get(weight, 1) > 0:
      groups[r["task"] if kind == "task" else ""].append((r[field], r.get(weight, 1)))
  means = [math.fsum(x * w for x, w in pairs) / math.fsum(w for _, w in pairs) for pairs in groups.values()]
  return float(np.mean(means)) if means and np.isfinite(means).all() else None


def paired(a, b):
  return {s: a[s] - b[s] for s in sorted(set(a) & set(b))}


def average(x):
  return float(np.mean(list(x.values()))) if x else math.nan


def gates(plan, v, metric, size, arms):
  """{control: passed} of an endpoint. Arms of a later tier than dense's measure nothing (amendment 5)."""
  base = metric.partition(":")[0]
  metric = GATED_BY[base] + metric[len(base):] if base in GATED_BY else metric
  _, _, _, kind, less, behind, near = METRICS[metric.partition(":")[0]]
  sign, dense = 1 if less else -1, plan["dense_arm"]
  get = lambda mode: v.of(dense, size, metric, mode)
  level, lost = average(get("dense")), lambda mode: sign * average(paired(get(mode), get("dense")))
  close = []  # to every arm that saw no more tokens
  tier = {}
  for number, keys in enumerate(((plan.get("plan") or {}).get("tiers") or {}).values()):
    for key in keys:
      tier.setdefault(key, number)
  last = tier.get(f"{dense}-{size}", math.inf)
  for arm in [arm for arm in arms if tier.get(f"{arm}-{size}", -1) <= last]:
    ours = v.of(arm, size, metric)
    common = sorted(set(ours) & set(get("dense")))
    if common and not v.tokens.get((arm, size), 0.) > 1.005 * v.tokens.get((dense, size), math.inf):
      theirs, mine = (float(np.mean([x[s] for s in common])) for x in (ours, get("dense")))
      close.append(mine <= theirs * 1.02 if kind == "text" else mine >= theirs - .02)
  out = {dense: bool(close) and all(close) or kind == "recall" and level >= .95}
  for mode in ("random", "sink_window"):
    x = average(get(mode))
    out[mode] = lost(mode) >= behind - 1e-12 if kind == "text" else x <= .5 and x < level / 2
  return {**out, "oracle": lost("oracle") <= near + 1e-12}


def one_sided(x, bound):
  """p of "the mean is at most `bound`"."""
  distance, error = float(np.mean(x)) - bound, np.std(x, ddof=1) / math.sqrt(len(x))
  if not error:
    return 0. if distance > 0 else .5 if distance == 0 else 1.
  return float(stats.t.sf(distance / error, len(x) - 1))


def unequal(x):
  """Two-sided p of "the mean is 0"."""
  return min(1., 2 * min(one_sided(x, 0), one_sided(-x, 0)))


def detectable(x, alpha):
  """The mean difference that so many pairs of this scatter find with 80 % power."""
  n, critical = len(x), stats.t.ppf(1 - alpha / 2, len(x) - 1)
  scatter = stats.chi(n - 1, scale=1 / math.sqrt(n - 1))  # of an SD that is estimated
  s = (NODES + 1) / 2 * scatter.isf(1e-12)
  weights = WEIGHTS * scatter.pdf(s) * scatter.isf(1e-12) / 2
  below = lambda t, d: special.ndtr(t * s - d * math.sqrt(n))
  missed = lambda d: weights @ (below(critical, d) - below(-critical, d)) - .2
  top = .1
  while missed(top) > 0:
    top *= 2
  return float(np.std(x, ddof=1) * optimize.brentq(missed, 0, top))


def tests(differences, margin):
  """Everything that is said of one list of paired differences, before Holm."""
  x = np.array(list(differences.values()))
  out = {"n": len(x), "mean": float(x.mean())}
  if len(x) < 2:
    return out
  half = stats.t.ppf(.975, len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))
  signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
  without = [np.delete(x, i) for i in range(len(x))] if len(x) > 2 else []
  return {**out, "low": float(x.mean() - half), "high": float(x.mean() + half),
          "tost": max(one_sided(x, -margin), one_sided(-x, -margin)), "difference": unequal(x),
          "flips": float(np.mean(np.abs(signs @ x) >= abs(x.sum()) * (1 - 1e-12))),
          "without": [unequal(y) for y in without], "detectable": detectable(x, .05),
          "match_without": [max(one_sided(y, -margin), one_sided(-y, -margin)) for y in without]}


def holm(p):
  order, out, worst = np.argsort(p, kind="stable"), [0.] * len(p), 0.
  for rank, i in enumerate(order):
    worst = max(worst, min(1., (len(p) - rank) * p[i]))
    out[i] = worst
  return out


def opened(plan, runs):
  """The runs of the tiers that were opened; of a study without tiers, all."""
  if not plan.get("opened"):
    sys.exit("what is sealed has not been opened: launch.report --open --publish does it, when a tier is complete")
  tiers = (plan.get("plan") or {}).get("tiers")
  shown = {key for tier in plan["opened"] for key in tiers[tier]} if tiers else ()
  key = lambda files: "{arm}-{size}".format(**json.loads(files.get("config.json", '{"arm": "", "size": ""}')))
  return {name: files for name, files in runs.items() if not tiers or key(files) in shown}


def analyse(paths, sealed=False):
  """(comparisons, admissions, lines) of the verdict: lists of dicts, {(metric, size): {control: passed}}, words."""
  plan, runs = read(*paths)
  metrics = [e["metric"] for e in plan["endpoints"]]
  metrics += [GATED_BY[base] + m[len(base):] for m in metrics if (base := m.partition(":")[0]) in GATED_BY]
  control_values = Values(runs, metrics)
  v = Values(opened(plan, runs), metrics, sealed=True) if sealed else control_values
  assert all(len(asked) == 1 for asked in v.asked.values()), "runs of one size were asked different questions"
  there, dense, native = {(j["arm"], j["size"]) for j in plan["jobs"]}, plan["dense_arm"], plan["reference_arm"]
  sizes = list(dict.fromkeys(j["size"] for j in plan["jobs"]))
  retrofits = sorted(plan["budgets"], key=plan["budgets"].get)
  kinds = {METRICS[e["metric"].partition(":")[0]][3] for e in plan["endpoints"] if e["primary"]}
  found, admitted = [], {}
  for e, size in itertools.product(plan["endpoints"], sizes):
    metric, kind = e["metric"], METRICS[e["metric"].partition(":")[0]][3]
    known = lambda values: any(s == size and m == metric for _, s, _, m in values.value)
    if known(control_values):
      admitted[metric, size] = gates(plan, control_values, metric, size, {arm for arm, s in there if s == size})
    if not known(v) and not e["primary"] and any(s == size for _, s, _, _ in v.value):
      continue  # it is not measured there; of a size without results its tests are missing ones
    for quantity in ("R", "A", "Delta"):
      for arm in [dense] if quantity == "A" else retrofits:
        if (arm, size) not in there and any(a == arm for a, _ in there):
          continue
        control = plan["controls"].get(arm, dense)
        get = lambda a: v.of(a, size, metric)
        r, a = paired(get(arm), get(control)), paired(get(dense), get(native))
        d = r if quantity == "R" else a if quantity == "A" else {s: r[s] + a[s] for s in r if s in a}
        if quantity == "Delta" and control == dense:
          d = paired(get(arm), get(native))
        main = e["primary"] and quantity in plan["quantities"]
        one = {"metric": metric, "size": size, "quantity": quantity, "arm": arm, "differences": d,
               "less": METRICS[metric.partition(":")[0]][4], "family": f"{kind} {size}" if main else "secondary",
               "alpha": plan["alpha"] / (len(kinds) if main else 1), "margin": e["margin"], "control": control,
               "admitted": all(admitted.get((metric, size), {0: True}).values())}
        found.append({**one, **(tests(d, e["margin"]) if d and any(d.values()) else {"n": 0})})
  for family in {c["family"] for c in found}:
    mine = [c for c in found if c["family"] == family]
    for name in ("tost", "difference"):
      for c, p in zip(mine, holm([c.get(name, 1.) for c in mine])):  # a test that could not be made counts as failed
        c[f"{name}_holm"] = p if name in c else math.nan
  for c in found:
    c["word"] = ("not admitted" if not c["admitted"] else "cannot be judged" if "tost" not in c else
                 "matches" if c["tost_holm"] <= c["alpha"] else "undecided" if c["difference_holm"] > c["alpha"] else
                 "worse" if (c["mean"] > 0) == c["less"] else "better")
    if c["word"] == "matches":  # the tests of the word
      c["without"] = c["match_without"]
  return found, admitted, remarks(plan, runs, found, v, sizes)


def curricula(plan, runs):
  """What ends dense and did not leave a dense trunk, on its seeds: differences from dense attention as both end, with
  as many FLOPs or as much time, and from what goes on as it begins: [dict]. No family, no word."""
  metrics = [e["metric"] for e in plan["endpoints"] if e["primary"]]
  v, dense, out = Values(runs, metrics), plan["dense_arm"], []
  sizes = dict.fromkeys(size for _, size in v.config)
  stages = lambda c: c["schedule"]["stages"]
  length = lambda c: (c["schedule"]["steps"], c["data"]["global_batch"], c["data"]["context"])
  alike = lambda a, b: all(a[k] == b[k] for k in a.keys() & b.keys())
  for size in sizes:
    whole = {arm: c for (arm, s), c in v.config.items() if s == size and not c["fork"]["workdir"]}
    mine = {arm: c for arm, c in whole.items() if arm != dense and dense in whole and stages(c)[-1]["mode"] == "dense"
            and (len(stages(c)) > 1 or length(c) != length(whole[dense]))}
    if not any(len(stages(c)) > 1 for c in mine.values()):
      continue
    goes_on = {arm: next((a for a, o in whole.items() if stages(c)[0]["mode"] != "dense" and len(stages(o)) == 1
                          and stages(o)[0]["mode"] == stages(c)[0]["mode"] and length(o) == length(c)
                          and alike(o["attention"], c["attention"])), None) for arm, c in mine.items()}
    more = [arm for arm, c in mine.items() if len(stages(c)) == 1]
    last = lambda arm, name: {seed: lines[-1][name] for seed, lines in v.log[arm, size].items()}
    shown = [a for a in dict.fromkeys([plan["reference_arm"], *goes_on.values(), *mine]) if v.log.get((a, size))]
    seeds = {seed for arm in mine for seed in v.log[arm, size]}
    for metric, arm in itertools.product(metrics, shown):
      ours, theirs = v.of(arm, size, metric), v.of(dense, size, metric)
      found = {"as they end": paired(ours, theirs), "for its FLOPs": {}, "for its time": {},
               f"minus {goes_on.get(arm)}": paired(ours, v.of(goes_on.get(arm), size, metric))}
      paces = slowness(plan, v, size, arm, mine, goes_on)
      for words, name in (("for its FLOPs", "flops"), ("for its time", "tokens")) if arm not in more else ():
        for seed in set(ours) & set(theirs):
          line = sorted((last(a, name)[seed], v.of(a, size, metric)[seed])
                        for a in (*plan["branches"].get(dense, ()), dense, *more) if seed in v.of(a, size, metric))
          at = last(arm, name)[seed] if name == "flops" else paces * last(dense, name)[seed]
          x, y = np.array(line).T
          if x[0] * .995 <= at <= x[-1] * 1.005:
            found[words][seed] = ours[seed] - float(np.interp(math.log(at), np.log(x), y))
      for words, d in found.items():
        d = [d[seed] for seed in sorted(d) if seed in seeds]
        if d:
          half = stats.t.ppf(.975, len(d) - 1) * np.std(d, ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.nan
          out.append({"metric": metric, "size": size, "arm": arm, "what": words, "n": len(d), "mean": float(np.mean(d)),
                      "low": float(np.mean(d) - half), "high": float(np.mean(d) + half)})
  return out


def slowness(plan, v, size, arm, mine, goes_on):
  """Time of an arm's steps over that of dense attention's: both alone, where known; else by its own log."""
  speeds, dense = plan.get("speeds") or {}, plan["dense_arm"]
  total = lambda a: max(lines[-1]["tokens"] for lines in v.log[a, size].values())
  if f"{arm}-{size}" in speeds and f"{dense}-{size}" in speeds:
    return speeds[f"{dense}-{size}"] / speeds[f"{arm}-{size}"] * total(arm) / total(dense)
  out = []
  for one in [arm] if arm in mine else [a for a in mine if goes_on[a] == arm]:
    for lines in v.log[one, size].values():
      of = collections.defaultdict(list)
      for line in lines:
        of[line["stage"]].append(line)
      speed = {stage: np.median([x["tokens_per_second"] for x in lines if "tokens_per_second" in x])
               for stage, lines in of.items()}
      ends = [0., *(lines[-1]["tokens"] for _, lines in sorted(of.items()))]
      ratio = [speed[max(of)] / speed[stage] for stage in sorted(of)]
      out.append(float(np.dot(np.diff(ends), ratio)) / ends[-1] if arm in mine else ratio[0])
  return float(np.mean(out)) * total(arm) / total(dense) if out else math.nan


def remarks(plan, runs, found, v, sizes):
  """What else the verdict says: whether R levels off, outcomes in two groups, failed runs."""
  lines = []
  for e, size in itertools.product([e for e in plan["endpoints"] if e["primary"]], sizes):
    points = sorted((c for c in found if (c["metric"], c["size"], c["quantity"], c["control"]) == (
        e["metric"], size, "R", plan["dense_arm"]) and c["n"] > 1), key=lambda c: plan["budgets"][c["arm"]])
    if len({plan["budgets"][c["arm"]] for c in points}) >= 3:
      x = np.array(list(paired(points[-1]["differences"], points[-2]["differences"]).values()))
      p = max(one_sided(x, -e["margin"]), one_sided(-x, -e["margin"]))
      lines.append(f"{e['metric']} {size}: R between the two largest budgets within the margin: p = {p:.2g}")
    if METRICS[e["metric"].partition(":")[0]][3] == "recall":
      for arm in sorted({j["arm"] for j in plan["jobs"]}):
        x = np.sort(list(v.of(arm, size, e["metric"]).values()))
        if len(x) > 1 and np.diff(x).max() >= max(.2, (x[-1] - x[0]) / 2):
          cut = int(np.diff(x).argmax()) + 1
          lines.append(f"{e['metric']} {size}: {arm}: {len(x) - cut} of {len(x)} seeds at {x[cut]:.3f} to {x[-1]:.3f}, "
                       f"{cut} at {x[0]:.3f} to {x[cut - 1]:.3f}")
  files = [runs.get(j["run"].removeprefix("runs/"), ()) for j in plan["jobs"]]
  failed = sum("FAILED" in f or "DONE" not in f and j["status"] == "failed" for j, f in zip(plan["jobs"], files))
  done = sum("DONE" in f and "FAILED" not in f for f in files)
  return lines + [f"{len(plan['jobs'])} runs planned: {done} done, {failed} failed"]


def published(folder):
  """The archives of a folder, study.tar.xz, study-2.tar.xz and so on, as they were added."""
  return sorted(folder.glob("study*.tar.xz"), key=lambda path: (len(path.name), path.name))


def main(arguments):
  sealed = "--sealed" in arguments
  paths = [a for a in arguments if not a.startswith("--")]
  where = paths or published(pathlib.Path(__file__).parent)
  key = lambda c: (c["metric"], c["size"], c["quantity"], c["arm"])
  found, admitted, lines = analyse(where, sealed)
  for (metric, size), passed in admitted.items():
    failed = [name for name, ok in passed.items() if not ok]
    print(f"{metric} {size}: " + (f"NOT ADMITTED: {', '.join(failed)}" if failed else "admitted"))
  again = {} if sealed or not read(*where)[0].get("opened") else {
      key(c): c["word"] for c in analyse(where, sealed=True)[0] if c["n"] > 1}
  for c in found:
    numbers = f"{c['mean']:+.4f}" if c["n"] else "-"
    if "tost" in c:
      numbers += (f" ({c['low']:+.4f} to {c['high']:+.4f}), p match {c['tost_holm']:.2g}, p difference "
                  f"{c['difference_holm']:.2g}, flips {c['flips']:.2g}, without one "
                  f"{min(c['without'], default=math.nan):.2g} to "
                  f"{max(c['without'], default=math.nan):.2g}, detectable {c['detectable']:.4f}")
    word = c["word"]
    if word in ("matches", "worse", "better") and key(c)[1:] in {k[1:] for k in again}:  # of that arm test has runs
      word += ", repeated" if again.get(key(c)) == word else ", NOT REPEATED by what was sealed: no word"
    print(f"{c['metric']} {c['size']} {c['quantity']} {c['arm']}: {word}, {c['n']} seeds, {numbers}")
  print("\n".join(lines))
  for c in [] if sealed else curricula(*read(*where)):
    print(f"exploratory: {c['metric']} {c['size']} {c['arm']} {c['what']}: {c['n']} seeds, {c['mean']:+.4f} "
          f"({c['low']:+.4f} to {c['high']:+.4f})")


if __name__ == "__main__":
  main(sys.argv[1:])
