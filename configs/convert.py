"""Records of other programs and data sets, written as ours.

Question: what is in these files, and how is it read?
Command:  nash-jax convert --from=FILE_OR_FOLDER --to=FILE.jsonl
          Leave out and count records that cannot be read: --bad=skip
          The prompts of comparisons alone: --task=prompts
Cost:     200,000 records take seconds. docs/data.md has the forms.
"""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    {
      "job": "convert",
      "source": "",  # files or folders, separated by commas
      "output": "",  # the file to write, .jsonl
      "task": "found",  # or preferences, responses, prompts, text: what to write
      "bad": "stop",  # at a record that cannot be read; or "skip" it
      "seed": 0,  # of which response of a comparison comes first
    }
  )
