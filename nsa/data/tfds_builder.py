"""A folder of documents as a TFDS dataset in array_record format.

    from nsa.data import tfds_builder
    tfds_builder.build("corpus", data_dir="tfds", name="novels")
    # then: data.source = "tfds:novels", data.data_dir = "tfds"

The folder holds one sub-folder of text files per split (train, val, test, ood),
as for data.source = "files:PATH"; an archive works too. Neither building nor
reading needs TensorFlow. Importing this module needs tensorflow-datasets and
array_record (and importlib_resources, wherever TFDS asks for it).
"""
from __future__ import annotations

import re
import types

import tensorflow_datasets as tfds

from nsa.data import sources


class LongDocuments(tfds.core.GeneratorBasedBuilder):
  """One example per document, {"name": text, "text": text}; the bytes are kept as they are."""
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "The documents as they lie in the folder."}
  code_path = None  # no checksum file beside this module; looking for one would need importlib_resources
  folder = ""  # a folder or an archive; `build` sets it on a subclass

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, description="Long documents, one example each.",
        features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    splits = {}
    for split in sources.SPLITS:
      try:
        splits[split] = self._generate_examples(sources.load(f"files:{self.folder}", split))
      except FileNotFoundError:
        if split == "train":
          raise  # a corpus may lack val, test and ood, but not this
    return splits

  def _generate_examples(self, documents):
    for document in documents:
      text = document.tokens.astype("uint8").tobytes()
      yield document.name, {"name": document.name, "text": text}


def build(folder: str, data_dir: str, *, name: str = "long_documents") -> tfds.core.DatasetBuilder:
  """Writes the dataset `name` under `data_dir` and returns its builder; an existing one is reused.

  Raises:
    ValueError: `name` is not lower_snake_case.
    FileNotFoundError: `folder` or its train/ sub-folder does not exist.
  """
  if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
    raise ValueError(f"name = {name!r}: a TFDS name is lower_snake_case, e.g. 'long_documents'")
  body = {"name": name, "folder": str(folder), "__module__": __name__}
  with tfds.core.registered.skip_registration():  # otherwise a second call with this name would clash
    cls = types.new_class("".join(word.title() for word in name.split("_")), (LongDocuments,), {},
                          lambda namespace: namespace.update(body))
  builder = cls(data_dir=str(data_dir), file_format="array_record")
  builder.download_and_prepare()
  return builder
