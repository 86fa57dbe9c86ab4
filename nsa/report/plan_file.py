"""The plan of a study, written before the first run that counts: PLAN.md to read, plan.json to compare with.

    write(study, directory)      # of a nsa.study.Study: launch.study --plan
    deviations(report_study)     # what ran and was not planned, what was planned and did not run

study.run puts plan.json into study.json. The hash in both files is of everything the report judges by: the question,
arms with their configs, endpoints, margins, gates, the family of tests, seeds and the rule to stop.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from nsa.report import archive, endpoints, gates, statistics
from nsa.report.runs import Study

GATES = {"dense exact match at least": gates.SOLVED, "or within, of the best arm of no more tokens": gates.BEST,
         "random blocks and sink + window, exact match at most": gates.HALF,
         **{f"{name}: random blocks and sink + window behind dense at least": m.behind
            for name, m in endpoints.METRIC.items() if m.kind == "text"},
         **{f"{name}: oracle blocks behind dense at most": m.near
            for name, m in endpoints.METRIC.items() if not m.gated_by}}


def make(study) -> dict:
  """The plan of a nsa.study.Study, JSON-ready, with its hash."""
  from nsa import config as config_lib, study as study_lib
  arms = {}
  for arm in study.arms:
    config = json.loads(json.dumps(config_lib.to_dict(arm)))
    arms[f"{arm.arm}-{arm.size}"] = archive.comparable(config, {}, False)
  plan = {**study_lib.asked(study), "gates": GATES, "stopping": study.stopping, "notes": list(study.notes),
          "tiers": {k: list(v) for k, v in study.tiers.items()},
          "seeds": {f"{arm.arm}-{arm.size}": list(study_lib.seeds_of(study, arm)) for arm in study.arms},
          "configs": arms}
  return {**plan, "hash": digest(plan)}


def _today(config: dict) -> dict:
  """A planned config as it would be written now: fields of a later version have their defaults."""
  return json.loads(json.dumps(archive.comparable(config, {}, False)))


def digest(plan: dict) -> str:
  """SHA-256 of a plan without its hash."""
  rest = {name: value for name, value in plan.items() if name != "hash"}
  return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(study, directory: Path) -> Path:
  """PLAN.md and plan.json; returns the former. ValueError where another plan lies there: a plan is changed by hand, in
  git, with its reason."""
  directory, plan = Path(directory), make(study)
  if (directory / "plan.json").is_file():
    from nsa import study as study_lib
    old = json.loads((directory / "plan.json").read_text())  # what it lacks, of a later version, is as it is by default
    old_asked = {**json.loads(json.dumps(study_lib.asked(study_lib.Study()))), **old}
    rest = lambda tree: {k: v for k, v in tree.items() if k not in ("hash", "configs")}
    field = archive.difference(rest(old_asked), json.loads(json.dumps(rest(plan))), "") or archive.difference(
        {key: _today(config) for key, config in old["configs"].items()},
        {key: _today(config) for key, config in plan["configs"].items()}, "configs")
    if field:
      raise ValueError(f"{directory / 'plan.json'}: {field[0]} = {field[1]!r} was planned, and {field[2]!r} is asked "
                       "for: delete both files to plan anew, and say so where the study is reported")
    plan = old  # to the byte: its hash stands in other places
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
  (directory / "PLAN.md").write_text(text(study, plan))
  return directory / "PLAN.md"


def text(study, plan: dict) -> str:
  """PLAN.md: the question, arms, endpoints, gates, margins, seeds, family of tests, power, and the cost of each
  tier."""
  from nsa.report import document
  Heading, Text, Bullets, Table = document.Heading, document.Text, document.Bullets, document.Table
  metrics = {e["metric"]: (endpoints.metric(e["metric"]), e) for e in plan["endpoints"]}
  kinds = list(dict.fromkeys(m.kind for m, e in metrics.values() if e["primary"]))
  blocks = [Text(plan["question"], "note"), Text(f"Plan hash: `{plan['hash']}`"), Heading("Arms"), Table(
      ["arm", "size", "attention", "stages", "steps", "forks from", "tokens", "seeds"],
      [_arm(arm, plan) for arm in study.arms],
      "Configs in full: plan.json. Tokens: of the whole run, its trunk's included", left=4)]
  blocks += [Heading("Endpoints"), Table(["endpoint", "role", "margin"], [
      [m.title, f"primary, family \"{m.kind}\"" if e["primary"] else "secondary", f"{m.text(e['margin'])} {m.unit}"]
      for m, e in metrics.values()],
      f"Text is measured on {_asked(study)} items per task and length, the same for all arms and seeds",
      left=2)]
  blocks += [Heading("Gates"),
             Text("An endpoint counts only if its controls behave; one that fails is shown and supports no verdict."),
             Bullets([f"{name}: {value:g}" for name, value in plan["gates"].items()])]
  of_size = {size: sum(arm.size == size and arm.arm in plan["budgets"] and len(plan["seeds"][f"{arm.arm}-{size}"]) > 1
                       for arm in study.arms) for size in _sizes(study)}
  per = lambda kind: sum(m.kind == kind and e["primary"] for m, e in metrics.values())
  tests = {(kind, size): per(kind) * sum(1 if q == "A" else count for q in plan["quantities"])
           for kind in kinds for size, count in of_size.items()}
  alike = lambda kind: {n: [size for size in of_size if tests[kind, size] == n]
                        for n in (tests[kind, s] for s in of_size)}
  of_kind = lambda kind: " and ".join(f"{n} tests ({', '.join(sizes)})" for n, sizes in alike(kind).items())
  blocks += [Heading("Family of tests"), Text(
      f"Of every primary endpoint: {', '.join(plan['quantities'])} (R: a retrofit minus its dense control; A: "
      f"{plan['dense_arm']} minus {plan['reference_arm']}; Delta = R + A), paired by seed. Two one-sided t tests "
      f"against the margin (a match) and a two-sided t test against 0, each under Holm within its family: "
      + "; ".join(f"{kind}, alpha {plan['alpha'] / len(kinds):g}, {of_kind(kind)}" for kind in kinds)
      + ". A planned test whose runs are missing counts as one that failed. Sizes are families of their own; so are, "
      "together, secondary endpoints and the quantities not named. Beside them, without a verdict: exact sign flips, "
      "leave-one-out, a bootstrap over (seed, document), counts where seeds fall into two groups. A limit of large "
      "budgets is claimed only where the two largest budgets are equivalent within the margin. All else is "
      "exploratory."),
      Heading("Seeds, and when it stops"), Text(plan["stopping"])]
  if plan["notes"]:
    blocks += [Heading("Notes"), Bullets(plan["notes"])]
  blocks += [Heading("Power"), *_power(study, plan, kinds, tests)]
  blocks += [Heading("Cost"), *_cost(study)]
  return document.markdown(f"Plan: {plan['name']}", blocks)


def _asked(study) -> str:
  """How much text and how many items the last evaluations ask."""
  listed = lambda found: " or ".join(map(str, dict.fromkeys(found)))
  text = listed(f"{arm.eval.sequences} windows of each corpus" if arm.eval.sequences >= 0 else "all of val"
                for arm in study.arms)
  return f"{text}, recall on {listed(arm.eval.task_examples for arm in study.arms)}"


def _sizes(study) -> list[str]:
  return list(dict.fromkeys(arm.size for arm in study.arms))


def _arm(arm, plan):
  from nsa import config as config_lib
  stages = ", ".join(f"{s.mode} {last - first}"
                     for s, (first, last) in zip(arm.schedule.stages, config_lib.steps_of(arm.schedule)))
  seeds = plan["seeds"][f"{arm.arm}-{arm.size}"]
  fork = f"{arm.fork.workdir} at {arm.fork.step}" if arm.fork.workdir else "-"
  return [arm.arm, arm.size, type(arm.attention).__name__, stages, str(arm.schedule.steps), fork,
          f"{arm.schedule.steps * arm.data.global_batch * arm.data.context:.3g}", str(len(seeds))]


def _power(study, plan, kinds, tests):
  from nsa.report import document
  lines = []
  for e in plan["endpoints"]:
    m = endpoints.metric(e["metric"])
    for size in _sizes(study):
      for q in plan["quantities"]:
        sd = study.expected_sd.get(f"{m.kind} {q} {size}", study.expected_sd.get(f"{m.kind} {q}"))
        if sd is None or not e["primary"] or "nll" in e["metric"]:
          continue
        of = {plan["dense_arm"], plan["reference_arm"]} if q == "A" else set(plan["budgets"])
        n = min((len(plan["seeds"][k]) for k in plan["seeds"]
                 if plan["configs"][k]["size"] == size and plan["configs"][k]["arm"] in of), default=0)
        if n < 2:
          continue
        alpha = plan["alpha"] / len(kinds)
        first = alpha / max(tests[m.kind, size], 1)
        seen = [m.text(statistics.smallest_detectable_effect(sd, n, alpha=a)) for a in (alpha, first)]
        equal = [f"{100 * statistics.tost_power(sd, n, e['margin'], a):.0f} %" for a in (alpha, first)]
        lines.append([m.title, size, q, f"{sd * m.scale:g}", str(n), " / ".join(seen), " / ".join(equal)])
  if not lines:
    return [document.Text("Not given: the study states no expected scatter (`expected_sd`).")]
  return [document.Table(["endpoint", "size", "quantity", "SD expected", "fewest seeds",
                          "difference seen in 80 %: last / first test of Holm", "a true match is found: last / first"],
                         lines, "From the pilots' scatter over seeds of paired differences", left=3)]


def _cost(study):
  from nsa import chips, model as model_lib, study as study_lib
  from nsa.report import document, planning
  chip, lines, total = chips.find(planning.DEVICE), [], np.zeros(4)
  named = {name: set(arms) for name, arms in study.tiers.items()} or {"all": {arm.arm for arm in study.arms}}
  left = list(study.arms)
  for name, wanted in [*named.items(), ("in no tier", {arm.arm for arm in study.arms})]:
    mine = [arm for arm in left if {arm.arm, f"{arm.arm}-{arm.size}"} & wanted]
    left = [arm for arm in left if arm not in mine]
    cost = np.zeros(4)
    for arm in mine:
      first = max(arm.fork.step, 0) if arm.fork.workdir and not arm.fork.reset else 0
      work, seconds = planning.own_work(model_lib.Static(planning.bare(arm)), first, chip.kind)
      seeds = len(study_lib.seeds_of(study, arm))
      cost += [seeds, seeds * work, seeds * work / study.flops_per_second / study.training_share / 3600,
               seeds * seconds / 3600]
    total += cost
    if mine:
      lines.append([name, ", ".join(f"{arm.arm}-{arm.size}" for arm in mine), *_cost_cells(cost)])
  lines.append(["all", "", *_cost_cells(total)])
  return [document.Table(["tier", "arms", "runs", "training FLOPs", "device hours, expected", "hours, floor"], lines,
                         f"One {chip.kind}. Expected: at {study.flops_per_second:.3g} FLOP/s of those that an arm "
                         f"needs, training being {100 * study.training_share:.0f} % of the wall time. Floor: steps "
                         "alone, by nsa/planning/forecast.py", left=2)]


def _cost_cells(cost):
  runs, work, hours, floor = cost
  return [f"{runs:.0f}", f"{work:.3g}", f"{hours:.1f}", f"{floor:.1f}"]


# --- afterwards ---------------------------------------------------------------------


def deviations(study: Study) -> list[str] | None:
  """Every difference between the plan and what ran, in lines; [] where there is none, None of a study without a
  plan."""
  plan = study.plan
  if not plan:
    return None
  out = []
  if plan.get("hash") != digest(plan):
    out.append("plan.json was changed after it was written: it gives the hash "
               f"{str(plan.get('hash'))[:12]}, its content has {digest(plan)[:12]}.")
  asked = {name: value for name, value in archive.description(study).items()
           if name in plan and name not in ("arms", "plan", "name")}
  asked = {**asked, "gates": GATES}
  for name, value in asked.items():
    found = archive.difference(plan[name], json.loads(json.dumps(value)), name)
    if found:
      out.append(f"{found[0]}: planned {found[1]!r}, judged by {found[2]!r}.")
  directories, seen, seeds = {run.name: run.arm for run in study.runs}, set(), {}
  for run in study.runs:
    key = f"{run.arm}-{run.size}"
    seeds.setdefault(key, {}).update(
        {s: run.status for s in run.seeds if run.status == "done" or s not in seeds.get(key, {})})
    if key not in plan.get("configs", {}):
      out += [f"{key}: was not planned."] if key not in seen else []
    elif run.config:
      mine = json.loads(json.dumps(archive.comparable(run.config, directories, False)))
      found = archive.difference(_today(plan["configs"][key]), mine, key)
      if found and found[0] not in seen:
        out.append(f"{found[0]}: planned {_short(found[1])}, ran {_short(found[2])}.")
        seen.add(found[0])
    seen.add(key)
  planned, later = {}, {}
  for key, asked in plan.get("seeds", {}).items():
    config = plan.get("configs", {}).get(key)  # a size can have a - in its name
    arm, size = (config["arm"], config["size"]) if config else key.rpartition("-")[::2]
    got, planned[arm, size] = seeds.get(key, {}), set(asked)
    if more := sorted(set(got) - set(asked)):
      out.append(f"{key}: seeds {', '.join(map(str, more))} ran and were not planned.")
    less = sorted(s for s in asked if got.get(s, "pending") not in ("done", "pending"))
    if less:
      out.append(f"{key}: planned seeds {', '.join(map(str, less))} are not finished "
                 f"({', '.join(sorted({got[s] for s in less}))}).")
    later[arm, size] = {s for s in asked if got.get(s, "pending") == "pending"}
  forks = {}
  for run in study.runs:
    if how := run.versions.get("trunk_again"):
      forks.setdefault(f"{run.arm}-{run.size}", []).append(
          f"seed {', '.join(map(str, run.seeds))} (from step {how['from_step']} on; training bits per byte differ by "
          f"{how['largest_difference']:.2g} at most, by {how['difference_at_end']:.2g} at the fork)")
  out += [f"{key}: forked from a trunk that was trained again and logged other bits: {'; '.join(each)}."
          for key, each in forks.items()]
  return out + [f"Not run, or not yet, of size {size}: {arms}." for size, arms in by_size(planned, later).items()]


def by_size(meant: dict, waiting: dict) -> dict[str, str]:
  """{size: "native, within_25 (seeds 1 to 3, 5)"} of {(arm, size): seeds}: seeds where not all that were meant wait."""
  out = {}
  for (arm, size), seeds in waiting.items():
    spans = []
    for s in sorted(seeds):
      if spans and s == spans[-1][-1] + 1:
        spans[-1].append(s)
      else:
        spans.append([s])
    words = ", ".join(f"{x[0]} to {x[-1]}" if len(x) > 2 else ", ".join(map(str, x)) for x in spans)
    if seeds:
      out.setdefault(size, []).append(arm if seeds == meant[arm, size] else f"{arm} (seeds {words})")
  return {size: ", ".join(arms) for size, arms in out.items()}


def _short(value):
  words = repr(value)
  return words if len(words) < 120 else words[:117] + "..."
