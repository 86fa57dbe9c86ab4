"""The plans of experiments/scale.py side by side: every size, context, method and topology as one table.

    python -m launch.plans --out=experiments/results/plans

Arithmetic alone (nsa/planning/forecast.py), seconds per plan; `launch.compile` asks the compiler for one of them.
Writes plans.csv (a row per step) and runs.csv (chip hours per run).
"""
import csv
import pathlib

from absl import flags

from launch import cli

_OUT = flags.DEFINE_string("out", None, "Directory.")
_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5p:8x8x8", "h100x512"], "Of launch.compile, with equally many chips.")
flags.mark_flag_as_required("out")


def main():
  from experiments import scale
  from nsa.planning import plan, topology
  steps, runs = [], []
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  for size in scale.MODELS:
    for context in (131_072, 1_048_576):
      hours = {}
      for name in _TOPOLOGIES.value:
        machine = topology.parse(name)
        for method in scale.METHODS:
          config = scale.get_config(f"size={size},context={context},method={method},devices={machine.devices}")
          made = plan.ahead(config, machine, compile_steps=False, inactive=scale.INACTIVE.get(size, 0.0))
          where = dict(size=size, context=context, method=method, topology=name)
          mesh = " ".join(f"{axis}={n}" for axis, n in made["mesh"].items() if n > 1)
          for row in made["steps"]:
            b = row["bounds_seconds"]
            steps.append({**where, "mode": row["mode"], "mesh": mesh, "gb_per_device": round(row["bytes"] / 1e9, 1),
                          "fits": row["fits"], "change": row.get("change", ""), "seconds": round(row["seconds"], 2),
                          "seconds_without_overlap": round(row["seconds_without_overlap"], 2), "bound": row["bound"],
                          **{f"{part}_seconds": round(value, 2) for part, value in b.items()},
                          "mfu_percent": round(100 * row["mfu"]),
                          "tflops_per_device": round(sum(row["flops"].values()) / 1e12),
                          **{f"gb_{part}": round(value / 1e9, 2) for part, value in row["memory_bytes"].items()},
                          "gb_received": round(sum(row["collectives_bytes"].values()) / 1e9, 1)})
          for regime, cost in made["chip_hours"].items():
            if method != "dense" and regime == "dense":
              continue  # the dense arm's own row is the one without a selector's unused parameters
            hours[name, method, regime] = cost
            runs.append({**where, "regime": regime, "tokens": made["tokens"], "chip_hours": round(cost),
                         "of_dense": round(cost / hours[name, "dense", "dense"], 3)})
        print(f"{size} {context} {name}", flush=True)
  for file, rows in (("plans.csv", steps), ("runs.csv", runs)):
    with open(out / file, "w", newline="") as f:
      writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n",
                              restval="")
      writer.writeheader()
      writer.writerows(rows)


if __name__ == "__main__":
  cli.run(main)
