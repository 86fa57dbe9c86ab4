"""What a scheduler is given: one module per kind of cluster, a `Job` in, a script or a manifest out.

All of them run the same entry point with the same arguments and restart it when a restart can help: it was
preempted and saved everything (exit code 75), a checkpoint could not be written (4), another process failed (6), or a
signal ended it. Any other exit code is final, a wrong configuration (2) above all. launch/cli.py has the table.
"""
from launch.clusters import gke, local, slurm, tpu_vm
from launch.clusters.job import Job, Script

CLUSTERS = {"local": local.script, "slurm": slurm.script, "tpu_vm": tpu_vm.script, "gke": gke.script}

__all__ = ("CLUSTERS", "Job", "Script")
