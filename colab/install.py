"""Installs this checkout in a notebook's own Python: `%run .../colab/install.py`.

It installs jax's support for the accelerator that is present, or nothing if everything is
installed. It restarts the notebook only if an imported library now has another version.
"""

import glob
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
CUDA13 = 580  # the first NVIDIA driver for CUDA 13


def extra(driver: str, tpu: bool) -> str:
  """Returns the extra of pyproject.toml for a TPU, or for an NVIDIA driver's version ("": none)."""
  if tpu:
    return "[tpu]"
  if not driver:
    return ""
  return "[cuda]" if int(driver.split(".")[0]) >= CUDA13 else "[cuda12]"


def driver() -> str:
  """Returns the version of the NVIDIA driver; "" if there is none."""
  query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  try:
    done = subprocess.run(query, capture_output=True, text=True)
  except FileNotFoundError:
    return ""
  return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else ""


def has_tpu() -> bool:
  return bool(
    glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or "TPU_ACCELERATOR_TYPE" in os.environ
  )


def stale(modules) -> list[str]:
  """Returns the imported libraries whose version differs from the one installed now."""
  found = []
  for name in ("numpy", "scipy", "jax", "jaxlib", "flax", "optax", "matplotlib", "ml_dtypes"):
    version = getattr(modules.get(name), "__version__", None)
    if version is not None and version != importlib.metadata.version(name):
      found.append(f"{name} {version}")
  return found


def devices() -> str:
  """Returns jax's devices; asks a separate process, so that the notebook can still restart."""
  program = "import jax; print(*jax.devices(), sep=', ')"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  return (done.stdout or done.stderr).strip().splitlines()[-1]


def main() -> None:
  """Installs, prints the devices that jax finds, and restarts the notebook if needed."""
  wanted, stamp = extra(driver(), has_tpu()), ROOT / ".installed"
  if not (stamp.exists() and stamp.read_text() == wanted + sys.prefix):
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"{ROOT}{wanted}"]
    print(f"installing nash_jax{wanted}, a minute or two")
    subprocess.run(command, check=True)
    stamp.write_text(wanted + sys.prefix)
    importlib.invalidate_caches()
  print(f"devices: {devices()}")
  if old := stale(sys.modules):
    print(f"imported before: {', '.join(old)}. The notebook restarts: continue with the next cell.")
    get_ipython().kernel.do_shutdown(restart=True)  # noqa: F821
  else:
    print("ready")


if __name__ == "__main__":
  main()
