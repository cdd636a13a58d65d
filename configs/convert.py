"""Converts records of other programs and data sets to ours.

Question: what is in these files, and how is it read?
Command:  nash-jax convert --from=FILE_OR_FOLDER --to=FILE.jsonl
          To leave out and count records that cannot be read: --bad=skip
          To write only the prompts of comparisons: --task=prompts
Cost:     200,000 records take seconds. docs/data.md lists the forms.
"""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict(
    {
      "job": "convert",
      "source": "",  # files or folders, separated by commas
      "output": "",  # the file to write, .jsonl
      "task": "found",  # what to write: preferences, responses, prompts, text, or as found
      "bad": "stop",  # at a record that cannot be read; or "skip" it
      "seed": 0,  # determines which response of a comparison comes first
    }
  )
