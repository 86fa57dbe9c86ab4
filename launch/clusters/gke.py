"""GKE and other Kubernetes clusters: a JobSet manifest, the kind of object that `xpk workload create` makes.

The pods of a run live and die together, as its processes wait for each other: any pod that fails restarts the
whole set, unless its exit code says that a restart would fail alike (2, a wrong configuration, say): that ends
it. Needs JobSet 0.6 or later.
"""
from __future__ import annotations

import json
import shlex

from launch.clusters.job import Job, Script

# What does not come back: errors of launch/cli.py's table, and a shell that finds no command.
FINAL = (1, 2, 3, 5, 126, 127)
PORT = 1234


def script(job: Job) -> Script:
  """A manifest; options: image, accelerator (a GPU or TPU node label), topology (TPU, e.g. 4x4), chips, volume."""
  image = job.option("image", "europe-docker.pkg.dev/my-project/nsa/nsa:1")
  accelerator, topology = job.options.get("accelerator", ""), job.options.get("topology", "")
  claim, _, mount = job.options.get("volume", "").partition(":")
  if bool(claim) != mount.startswith("/"):
    raise ValueError(f"--volume={job.options['volume']}: CLAIM:/path, a persistent volume claim and where it goes")
  if not claim:
    job.need_remote_workdir("take gs://BUCKET/..., or --volume=CLAIM:/path")
  if topology and not accelerator:
    raise ValueError(f"--topology={topology}: needs --accelerator, e.g. tpu-v5-lite-podslice")
  selector, limits = {}, {}
  if topology:
    selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    limits = {"google.com/tpu": job.options.get("chips") or "4"}
  elif job.gpus:
    selector = {"cloud.google.com/gke-accelerator": accelerator} if accelerator else {}
    limits = {"nvidia.com/gpu": str(job.gpus)}
  command = f"{job.setup} && exec {job.python}" if job.setup else f"exec {job.python}"
  if not topology and job.nodes > 1:  # on TPUs jax finds its peers itself
    service = shlex.quote(f"{job.name}-node-0-0.{job.name}")
    command = (f"export JAX_COORDINATOR_ADDRESS={service}:{PORT} JAX_NUM_PROCESSES={job.nodes} "
               f'JAX_PROCESS_ID="$JOB_COMPLETION_INDEX"; {command}')
  container = {"name": "run", "image": image, "command": ["bash", "-c", command]}
  if limits:
    container["resources"] = {"limits": limits}
  pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 120, "containers": [container]}
  if selector:
    pod["nodeSelector"] = selector
  if claim:
    container["volumeMounts"] = [{"name": "shared", "mountPath": mount}]
    pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
  # When a node dies, its peers may end with an error (1) of their own: that is no reason to give up.
  final = [code for code in FINAL if code != 1 or job.nodes == 1]
  pod_rules = [
      {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
      {"action": "FailJob", "onExitCodes": {"containerName": "run", "operator": "In", "values": final}},
  ]
  manifest = {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": job.name},
      "spec": {
          "failurePolicy": {
              "maxRestarts": job.max_restarts,
              "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{
              "name": "node", "replicas": 1,
              "template": {"spec": {
                  "parallelism": job.nodes, "completions": job.nodes, "completionMode": "Indexed",
                  "backoffLimit": 0, "podFailurePolicy": {"rules": pod_rules},
                  "template": {"spec": pod}}}}]}}
  # JSON is YAML, and needs no library to write.
  return Script(".yaml", json.dumps(manifest, indent=2) + "\n", ("kubectl", "apply", "--filename={file}"))
