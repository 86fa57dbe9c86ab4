"""What tests of reports share: a planted study, and what its report and its verdict say."""
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
