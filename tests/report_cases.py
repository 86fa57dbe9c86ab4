"""What tests of reports share: a planted study, and what its report and its verdict say."""
import json

from nsa import report
from nsa.report import archive, endpoints, verdict


def with_retrofit(delta, exact=0.0):
  """Dense level with native, and a retrofit of 5 % behind both by what is given."""
  return {"dense": (0.0, 0.0, None), "native_msa": (0.0, 0.0, None), "retrofit_msa_5": (delta, exact, 0.05)}


def words(root):
  return " ".join(report.verdict_table(root).split())  # the terminal's line breaks are not the point


def judged(root):
  study = archive.load([root])
  return verdict.verdict(study, endpoints.rows(study))


def seal(root, behind, but=()):
  """Writes sealed evaluations of runs whose last step is 1,000: val's, retrofits' text `behind` by so many bits per
  byte more."""
  for file in root.glob("runs/*/eval/1000.json"):
    tree = json.loads(file.read_text())
    if file.parents[1].name in but:
      continue
    own = "dense" if tree["arm"] == "dense" else "sparse"
    rows = [r for r in tree["records"] if r["run_mode"] == own and r["kind"] in ("language", "task")]
    for r in rows:
      if r["kind"] == "language":
        r["split"] = "test"
        r["second_half_bits_per_byte"] += behind * tree["arm"].startswith("retrofit")
    (file.parent / "1000-sealed.json").write_text(json.dumps({**tree, "settings": {"split": "test"}, "records": rows}))
